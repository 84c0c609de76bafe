"""LiteRT by its makers' tools: a float graph through litert-torch and ai-edge-quantizer, in an environment of their own.

The graph goes there as our own torch twin of it (`compress/to_torch.py`), exported; what comes back is run in LiteRT here and
held against onnxruntime before it is used.
"""

import dataclasses
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress import interpreter
from compress.converters.environment import Environment, Say, call, ready
from compress.graph import Array
from compress.measure import Runner, answers
from skills import ort
from skills.errors import FormatError, SkerryError

LITERT = Environment("litert", 2200)
TOOLS = ("litert-torch", "ai-edge-quantizer")
INPUTS = 100  # that ranges are read from
CHECKED = 16  # that the float file is held against onnxruntime on
SAME = 1e-3  # the largest difference, relative to the largest answer


@dataclasses.dataclass(frozen=True, slots=True)
class Converted:
    """The same graph twice: `weights` has int8 weights and float activations, `static` computes in int8.

    `static` is None where it could not be had or would be larger than the float file; `refused` says why. `left` are the
    kinds of operators that stayed float in it.
    """

    weights: bytes
    static: bytes | None
    refused: str = ""
    left: tuple[str, ...] = ()

    def pack(self) -> bytes:
        """Return it as bytes, for the store that an interrupted run goes on from."""
        head = json.dumps({"refused": self.refused, "left": self.left}).encode()
        buffer = io.BytesIO()
        parts = {"head": head, "weights": self.weights, "static": self.static or b""}
        np.savez(buffer, **{name: np.frombuffer(part, np.uint8) for name, part in parts.items()})  # type: ignore[arg-type]
        return buffer.getvalue()


def unpack(raw: bytes) -> Converted:
    """Return what `Converted.pack` wrote."""
    with np.load(io.BytesIO(raw), allow_pickle=False) as stored:
        head, weights, static = (stored[name].tobytes() for name in ("head", "weights", "static"))
    facts = json.loads(head)
    return Converted(weights, static or None, facts["refused"], tuple(facts["left"]))


def versions() -> str:
    """Return the tools with their versions, in words."""
    pinned = dict(line.split("==") for line in LITERT.requirements().split())
    return " and ".join(f"{name} {pinned[name]}" for name in TOOLS)


def convert(model: Any, x: Array, say: Say, *, static: bool) -> Converted:
    """Return a canonical float graph with one input as `.tflite` files; `static` asks for the one that computes in int8.

    Raises:
        FormatError: the graph has something that torch or litert-torch cannot do, or the file answers otherwise than
            onnxruntime does.
        Unreachable, StorageError, SkerryError: the environment cannot be made.
        DeadlineExceeded: it took too long.
    """
    with tempfile.TemporaryDirectory(prefix="skerry-litert-") as place:
        work = Path(place)
        export(model, x, work / "model.pt2")  # first: what torch cannot do needs no environment
        ready(LITERT, say)
        np.save(work / "inputs.npy", x[:INPUTS])
        ends = {"input": model.graph.input[0].name, "output": model.graph.output[0].name}
        (work / "ask.json").write_text(json.dumps({**ends, "static": static}))
        broke = ""
        try:
            call(LITERT, "run_litert.py", work, say)
        except SkerryError as error:
            if type(error) is not SkerryError:
                raise
            broke = str(error)
        files = {name: work / f"{name}.tflite" for name in ("float", "weights", "static")}
        if not files["weights"].is_file():
            raise FormatError(broke or "litert-torch left no file behind")
        made = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
        said: dict[str, Any] = {"left": [], "refused": broke} if broke else json.loads((work / "said.json").read_text())
    check_same(interpreter.session(made["float"]), ort.session(model.SerializeToString()), x[:CHECKED])
    return offered(made, said["left"], said["refused"])


def offered(made: dict[str, bytes], left: Sequence[str], refused: str) -> Converted:
    """Return what of the files is worth a look. Pure."""
    static = None if refused else made.get("static")
    if static is not None and len(static) > len(made["float"]):
        # Hundreds of small operators, as of an LSTM step by step: the scales weigh more than the weights save.
        refused, static = f"in int8 it takes {len(static)} bytes, in float {len(made['float'])}", None
    return Converted(made["weights"], static, refused, tuple(left) if static is not None else ())


def check_same(converted: Runner, original: Runner, x: Array) -> None:
    """Hold the converted float file against the graph that it came from.

    Raises:
        FormatError: they give other answers than rounding explains.
    """
    got, want = answers(converted, x), answers(original, x)
    scale = float(np.abs(want).max()) or 1.0
    worst = float(np.abs(got - want).max()) / scale if got.shape == want.shape else float("inf")
    if not worst <= SAME:  # written so that NaN fails too
        raise FormatError(f"what litert-torch made answers otherwise than the graph, by {worst:.2g} of its range")


def export(model: Any, x: Array, path: Path) -> None:
    """Leave a canonical float graph as a program that torch exported, for one input of the shape of those in `x`.

    Raises:
        FormatError: torch cannot compute or export it.
    """
    import torch

    from compress.to_torch import Twin

    twin = Twin(model).eval()
    for tensor in (*twin.parameters(), *twin.buffers()):
        # Channels last, as the twin keeps them, litert-torch copies them and knows each copy by an address that the next one has
        # too: a second convolution of the same shape would get the weights of the first.
        tensor.data = tensor.data.contiguous()
    try:
        with torch.no_grad():
            torch.export.save(torch.export.export(twin, (torch.from_numpy(x[:1]),)), path)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise FormatError(
            f"torch cannot export the graph: {lines[0][:300] if lines else type(error).__name__}"
        ) from error
