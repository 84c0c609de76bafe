"""What a class of device can do with a compressed model: the checked form of `profile.yaml`. Pure."""

import dataclasses
from typing import Annotated, Literal

from skills.errors import FormatError
from skills.manifest import Name, Runtime
from skills.wire import Doc, Limits, decode_yaml


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """A target of compression: runtime, number formats of its fast kernels, and what must stay float there."""

    name: Name
    runtime: Runtime
    arch: Annotated[str, Doc("machine name as uname prints it"), Limits(pattern=r"[a-z0-9_]{2,16}")]
    description: Annotated[str, Limits(max_items=300)] = ""
    runtime_min: Annotated[
        str, Doc("the least version whose kernels this profile relies on"), Limits(pattern=r"\d+(\.\d+){0,2}")
    ] = "1.23"
    isa: Annotated[tuple[str, ...], Doc("instruction sets that the device must have")] = ()
    activation: Annotated[Literal["u8", "s8"], Doc("type of quantized activations")] = "u8"
    weight_bits: Annotated[
        Literal[7, 8], Doc("range used by 8-bit weights: 7 where the kernel's 16-bit sums would saturate")
    ] = 8
    stored_bits: Annotated[
        tuple[Annotated[float, Limits(one_of=(8, 4, 3, 2, 1.6))], ...],
        Doc("widths in which weights may be stored; 1.6 is three values, five of them in a byte"),
        Limits(min=1, max_items=5),
    ] = (8, 4, 3, 2, 1.6)
    quantize_outputs: Annotated[bool, Doc("also quantize the graph's outputs (runtimes that compute in int8 only)")] = (
        False
    )
    whole_numbers: Annotated[
        bool,
        Doc(
            "a .tflite takes and gives its int8 codes, NHWC, where others take and give float32 as the ONNX model does"
        ),
    ] = False
    channel_multiple: Annotated[
        int, Doc("where channels are removed, those left are a multiple of this; 0: 8 in wide layers, 4 in narrow ones"),
        Limits(min=0, max=128),
    ] = 0  # fmt: skip
    channel_block: Annotated[
        int,
        Doc("how many channels the runtime computes at once: a layer with fewer takes as long"),
        Limits(min=1, max=128),
    ] = 1
    accelerator: Annotated[
        str | None,
        Doc("as Arm's Vela names it: a .tflite is compiled for it too"),
        Limits(pattern=r"ethos-u\d{2}-\d{2,4}"),
    ] = None
    system_config: Annotated[str | None, Doc("a section of Vela's Arm/vela.ini: clock and speed of the memories")] = (
        None
    )
    memory_mode: Annotated[str | None, Doc("a section of Vela's Arm/vela.ini: what lies in which memory")] = None
    sram_kib: Annotated[float | None, Doc("of the accelerator; more than that is warned of"), Limits(min=1)] = None
    flash_kib: Annotated[float | None, Doc("that a model may take; a larger one is warned of"), Limits(min=1)] = None
    keep_float: Annotated[tuple[str, ...], Doc("operators that are never quantized"), Limits(max_items=64)] = ()
    slowdown: Annotated[
        float | None, Doc("how many times slower than the planning machine it is; used by split"), Limits(min=0.01)
    ] = None
    memory_mb: Annotated[
        float | None, Doc("memory that a model may take there, in MiB; used by split"), Limits(min=1)
    ] = None
    format: Literal["profile/v1"] = "profile/v1"


def load_profile(text: str, source: str) -> Profile:
    """Check the text of a `profile.yaml`.

    Raises:
        FormatError: what is wrong, with the line and the nearest right key.
    """
    profile = decode_yaml(Profile, text, source)
    if profile.runtime == "onnxruntime" and profile.arch == "x86_64" and profile.activation == "s8":
        raise FormatError(
            f"{source}: activation s8 on x86_64 is slower than float, since onnxruntime fuses none of its residual additions "
            "there: use u8"
        )
    return profile
