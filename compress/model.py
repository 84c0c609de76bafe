"""The model that comes in: an ONNX file, or a torch program or module that is exported and held against its export."""

import contextlib
import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from compress import references
from compress.graph import Array
from compress.measure import answers, batches
from compress.quiet import muted
from skills import ort
from skills.errors import FormatError, MissingExtra, NotFound, UsageError
from skills.files import read_bytes, sha256_hex

MAX_MODEL_BYTES = 1 << 31  # protobuf's own limit
STANDARD = ("", "ai.onnx", "ai.onnx.ml")
EXPORT_OPSET = 20
PARITY = 1e-3  # largest difference between torch and its export, relative to the largest output
PARITY_SAMPLES = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A checked ONNX model, what it was called, and the hash and size of what the user gave."""

    model: Any
    name: str
    sha256: str
    bytes_input: int


def load(model: object, weights: Path | None, sample: Array | None) -> Source:
    """Read an `.onnx` file, or a `.pt2` or a torch module and export it; `sample` is what it will be run with.

    Without data `sample` is None: then a torch module has nothing to be exported with.

    Raises:
        NotFound: the file, module or factory does not exist.
        FormatError: it is no valid ONNX or program, cannot be exported, or uses an operator that onnxruntime lacks.
        UsageError: the argument is neither a file, nor `file.py:factory`, nor `package.module:factory`.
        MissingExtra: torch is needed and not installed.
    """
    if isinstance(model, (str, Path)) and (isinstance(model, Path) or ":" not in model):
        path = Path(model)
        if path.suffix not in (".onnx", ".pt2"):
            if not path.exists():
                raise NotFound(f"there is no model file {path}")
            raise FormatError(f"{path} is neither .onnx nor .pt2: give one, or file.py:factory of a torch module")
        data = read_bytes(path, "the model", MAX_MODEL_BYTES)
        if path.suffix == ".onnx":
            found = check(data, str(path), path.parent)
            beside = sum(
                len(item.raw_data) for item in found.graph.initializer
            )  # more than the file: weights lie beside it
            return Source(found, path.name, sha256_hex(data), max(len(data), beside))
        return Source(
            check(export_program(data, str(path), sample), str(path), None), path.name, sha256_hex(data), len(data)
        )
    if sample is None:
        raise UsageError("a torch module is exported by running it: give data, or an .onnx or .pt2 file")
    if isinstance(model, str):
        _torch()
        factory, name = references.find(model, "factory"), model
        with references.named(model):
            module = factory()
    else:
        module, name = model, type(model).__name__
    data = export(module, name, weights, sample)
    size = weights.stat().st_size if weights is not None else len(data)
    return Source(check(data, name, None), name, sha256_hex(data), size)


def check(data: bytes, name: str, folder: Path | None) -> Any:
    """Return the model that these bytes hold, with one input and everything in one file.

    Raises:
        FormatError: damaged, not valid, several inputs, or an operator that onnxruntime does not have.
    """
    try:
        model = onnx.load_model_from_string(data)
        if folder is not None:
            onnx.external_data_helper.load_external_data_for_model(model, str(folder))
    except Exception as error:  # noqa: BLE001  protobuf and onnx raise unrelated classes for damaged files
        raise FormatError(f"{name} is not an ONNX model that can be read: {_first_line(error)}") from None
    if not model.graph.node:
        raise FormatError(f"{name} is not an ONNX model that can be read: it has no operators")
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        unknown = _unknown_operators(model)
        if unknown:
            raise FormatError(f"{name} uses operators that onnxruntime does not have: {', '.join(unknown)}") from None
        raise FormatError(f"{name} is not valid ONNX: {_first_line(error)}") from None
    unknown = _unknown_operators(model)
    if unknown:
        raise FormatError(f"{name} uses operators that onnxruntime does not have: {', '.join(unknown)}")
    stored = {item.name for item in model.graph.initializer}
    inputs = [item.name for item in model.graph.input if item.name not in stored]
    if len(inputs) != 1:
        raise FormatError(f"{name} has {len(inputs)} inputs ({', '.join(inputs)}), compression takes models with one")
    if not model.graph.output:
        raise FormatError(f"{name} has no output")
    return model


def _unknown_operators(model: Any) -> list[str]:
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    own = {(f.domain, f.name) for f in model.functions}
    found = dict.fromkeys(
        f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        for node in model.graph.node
        if (node.domain in STANDARD and node.op_type not in known)
        or (node.domain not in (*STANDARD, "com.microsoft") and (node.domain, node.op_type) not in own)
    )
    return list(found)


def export(module: Any, name: str, weights: Path | None, sample: Array) -> bytes:
    """Return the ONNX bytes of a torch module in evaluation mode, with a free batch, checked against the module.

    Raises:
        FormatError: no torch module, weights that do not fit, an operator that cannot be exported, or other answers.
        NotFound: the weights file does not exist.
    """
    torch = _torch()
    if not isinstance(module, torch.nn.Module):
        raise FormatError(f"{name} gave {type(module).__name__}, expected a torch module")
    if weights is not None:
        _load_weights(module, weights)
    module = module.eval().cpu()
    if sample.ndim < 1 or not len(sample):
        raise FormatError("the data has no sample to export the model with")
    tensor = torch.from_numpy(np.ascontiguousarray(sample[:2]))
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad(), _plain_attention(torch), muted():
        warnings.simplefilter("ignore")  # the exporter's own deprecation notes
        try:
            expected = module(torch.from_numpy(np.ascontiguousarray(sample[:PARITY_SAMPLES])))
            # The TorchScript exporter: 0.2 s against 3-20 s, and it keeps GlobalAveragePool, which the other writes as
            # ReduceMean.
            torch.onnx.export(
                module, (tensor,), buffer, dynamo=False, input_names=["x"], output_names=["logits"],
                opset_version=EXPORT_OPSET, dynamic_axes={"x": {0: "n"}, "logits": {0: "n"}},
            )  # fmt: skip
        except Exception as error:
            raise FormatError(f"{name} cannot be exported to ONNX: {_first_line(error)}") from error
    data = buffer.getvalue()
    _check_parity(data, name, expected, sample[:PARITY_SAMPLES])
    return data


def export_program(data: bytes, name: str, sample: Array | None) -> bytes:
    """Return the ONNX bytes of a `.pt2` (what `torch.export.save` wrote), checked against the program on `sample`.

    The batch stays as the program has it: free where it was exported so. Without `sample` the program's own example input is
    used.

    Raises:
        FormatError: damaged, several inputs, an input that the program does not take, an operator without ONNX form, or
            other answers after the export.
        MissingExtra: torch or onnxscript is not installed.
    """
    torch = _torch()
    try:
        import onnxscript  # noqa: F401  the exporter of programs is written in it
    except ImportError:
        raise MissingExtra("a .pt2 needs onnxscript: pip install 'skerry[compress]'") from None
    with warnings.catch_warnings(), torch.no_grad(), muted(), _without_remarks():
        warnings.simplefilter("ignore")  # the exporter's own deprecation notes
        try:
            program = torch.export.load(io.BytesIO(data))
        except Exception as error:  # noqa: BLE001  zip, pickle and torch raise unrelated classes for damaged files
            raise FormatError(f"{name} is not a .pt2 that torch.export can load: {_first_line(error)}") from None
        inputs = program.graph_signature.user_inputs
        if len(inputs) != 1:
            raise FormatError(
                f"{name} has {len(inputs)} inputs ({', '.join(map(str, inputs))}), compression takes models with one"
            )
        try:
            tensor = _fill(program, sample)
            expected = program.module()(tensor)
        except Exception as error:
            raise FormatError(f"{name} does not take the data: {_first_line(error)}") from error
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                input_names=["x"],
                output_names=["logits"],
                opset_version=EXPORT_OPSET,
                verbose=False,
            )
        except Exception as error:
            raise FormatError(f"{name} cannot be exported to ONNX: {_first_line(error)}") from error
    exported: bytes = made.model_proto.SerializeToString()
    _check_parity(exported, name, expected, tensor.numpy())
    return exported


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Keep the exporter from logging what it does without, such as torchvision."""
    logger = logging.getLogger("torch.onnx")
    was = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(was)


def _fill(program: Any, sample: Array | None) -> Any:
    """Return inputs that the program takes: as many samples as its batch has, or the program's own example."""
    torch = _torch()
    name = program.graph_signature.user_inputs[0]
    want = next(node.meta["val"] for node in program.graph.nodes if node.name == name)
    if sample is None:
        return program.example_inputs[0][0].detach()
    size = want.shape[0] if want.ndim and isinstance(want.shape[0], int) else PARITY_SAMPLES
    return torch.from_numpy(np.ascontiguousarray(sample[:size]))


@contextlib.contextmanager
def _plain_attention(torch: Any) -> Iterator[None]:
    """Switch off the fused attention of inference, which has no ONNX form."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def _check_parity(data: bytes, name: str, expected: Any, sample: Array) -> None:
    first = expected[0] if isinstance(expected, (tuple, list)) else expected
    want = first.detach().numpy()
    session = ort.session(data)
    batches(session.inputs[0], sample)
    got = answers(session, sample)
    scale = float(np.abs(want).max()) or 1.0
    worst = float(np.abs(got - want).max()) / scale if got.shape == want.shape else float("inf")
    if not worst <= PARITY:
        raise FormatError(f"{name} answers differently after its export to ONNX: by {worst:.2g} of its range")


def _load_weights(module: Any, path: Path) -> None:
    torch = _torch()
    if not path.is_file():
        raise NotFound(f"there is no weights file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        module.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    except Exception as error:  # noqa: BLE001  pickle, zip and torch raise unrelated classes for damaged files
        raise FormatError(f"the weights in {path} do not fit the model: {_first_line(error)}") from None


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise MissingExtra("a torch module needs torch: pip install 'skerry[compress]'") from None
    return torch


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
