"""What a skill is: the checked form of `skill.yaml`. Pure: text in, frozen objects or one clear error out."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Annotated, Literal

from skills.errors import FormatError
from skills.wire import Doc, Limits, decode_yaml

NAME = r"[a-z][a-z0-9-]{0,62}"
VERSION = r"(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})"
IDENTIFIER = r"[A-Za-z_][A-Za-z0-9_]{0,62}"

Name = Annotated[str, Limits(pattern=NAME, hint="lower-case letters, digits and '-', beginning with a letter")]
Version = Annotated[str, Limits(pattern=VERSION, hint="a version like 1.2.3")]
Identifier = Annotated[str, Limits(pattern=IDENTIFIER, hint="a Python identifier")]
Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES"
]  # fmt: skip
Runtime = Literal["onnxruntime", "litert"]


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """A named array as the Open Inference Protocol describes it; -1 in `shape` is a free size."""

    name: Identifier
    dtype: Datatype
    shape: Annotated[tuple[int, ...], Limits(max_items=8)]


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """One form of a model for one class of device; the first fitting one in the list is taken."""

    name: Name
    runtime: Runtime
    file: Annotated[str | None, Doc("the model file, relative to the skill's folder")] = None
    split: Annotated[str | None, Doc("instead of `file`: a split plan (split.yaml) with its segments beside it")] = None
    runtime_min: Annotated[
        str | None,
        Doc("the least version of the runtime"),
        Limits(pattern=r"\d+(\.\d+){0,2}", hint="a version like 1.20"),
    ] = None
    arch: Annotated[tuple[str, ...], Doc("machine names as uname prints them; empty: any")] = ()
    isa: Annotated[tuple[str, ...], Doc("instruction sets, all of which the device must have")] = ()
    npu: Annotated[str | None, Doc("the accelerator that the device must have")] = None
    ram_mb: Annotated[int, Limits(min=1), Doc("memory that the variant needs, in MiB")] = 64

    def __post_init__(self) -> None:
        if (self.file is None) is (self.split is None):
            raise FormatError(f"variant '{self.name}' must have either 'file' or 'split'")


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """A file that computes, in one or more variants."""

    variants: Annotated[tuple[Variant, ...], Limits(min=1, max_items=32)]


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """One step of a skill: a function named like the stage in `code`, which is handed its model."""

    name: Identifier
    model: Name
    code: Annotated[str, Doc("a Python file in the skill's folder")]


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """Golden inputs and outputs that a version must reproduce on the device before it serves."""

    file: Annotated[str, Doc("an .npz with arrays in.NAME and out.NAME")] = "probe.npz"
    tolerance: Annotated[float, Limits(min=0), Doc("largest absolute difference of a floating-point output")] = 1e-3
    agreement: Annotated[float, Limits(min=0, max=1), Doc("least share of equal entries of an integer output")] = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Skill:
    """A skill: control code, models and golden outputs that are installed and rolled back together."""

    name: Name
    version: Version
    inputs: Annotated[tuple[Tensor, ...], Limits(min=1, max_items=32)]
    outputs: Annotated[tuple[Tensor, ...], Limits(min=1, max_items=32)]
    models: Annotated[Mapping[str, Model], Limits(min=1, max_items=32)]
    stages: Annotated[tuple[Stage, ...], Limits(min=1, max_items=32)]
    probe: Probe = Probe()
    description: Annotated[str, Limits(max_items=500)] = ""
    assets: Annotated[tuple[str, ...], Limits(max_items=64), Doc("further files that the code reads")] = ()
    placement: Annotated[
        Literal["split.yaml"] | None,
        Doc("a plan of the stages beside skill.yaml: the first ones run on the device, the others where it pays"),
    ] = None
    recipe: Annotated[str | None, Doc("a program that rebuilds the models: python RECIPE --out FOLDER")] = None
    format: Literal["skill/v1"] = "skill/v1"

    def __post_init__(self) -> None:
        for name in self.models:
            if not re.fullmatch(NAME, name):
                raise FormatError(f"a model is called {name!r}, expected lower-case letters, digits and '-'")
        for stage in self.stages:
            if stage.model not in self.models:
                raise FormatError(
                    f"stage '{stage.name}' uses the model '{stage.model}', the skill has {', '.join(self.models)}"
                )
        _unique("stage", [stage.name for stage in self.stages])
        for name, model in self.models.items():
            _unique(f"variant of model '{name}'", [variant.name for variant in model.variants])
        for name, model in self.models.items() if self.placement else ():
            if any(variant.split for variant in model.variants):
                raise FormatError(f"model '{name}' is split, and so is the skill (placement): use one of the two")
        _unique("input", [tensor.name for tensor in self.inputs])
        _unique("output", [tensor.name for tensor in self.outputs])
        for path in self.files():
            check_path(path)

    def files(self) -> Iterator[str]:
        """Yield every path that the manifest names (a split plan names further ones)."""
        yield from sorted({stage.code for stage in self.stages})
        yield self.probe.file
        yield from self.assets
        if self.placement is not None:
            yield self.placement
        if self.recipe is not None:
            yield self.recipe
        for model in self.models.values():
            for variant in model.variants:
                yield str(variant.file or variant.split)


def load_skill(text: str, source: str) -> Skill:
    """Check the text of a `skill.yaml`.

    Raises:
        FormatError: what is wrong, with the line and the nearest right key.
    """
    return decode_yaml(Skill, text, source)


def check_path(path: str) -> None:
    """Refuse a part's path that could leave its folder or surprise a file system.

    Raises:
        FormatError: absolute, empty, with '..', a backslash, a control character, or over 200 characters.
    """
    pure = PurePosixPath(path)
    clean = path == str(pure) and not pure.is_absolute() and ".." not in pure.parts and path not in ("", ".")
    if not clean or len(path) > 200 or re.search(r"[\\\x00-\x1f\x7f:]", path):
        raise FormatError(f"the path {path!r} is not allowed: use a plain relative path with '/'")


def _unique(what: str, names: list[str]) -> None:
    for at, name in enumerate(names):
        if name in names[:at]:
            raise FormatError(f"two entries called '{name}': every {what} needs its own name")
