"""The model that comes in: an ONNX file, or a torch module that is exported and held against its export."""

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

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


def load(model: object, weights: Path | None, sample: Array) -> Source:
    """Read an `.onnx` file, or import and export a torch module; `sample` is what it will be run with.

    Raises:
        NotFound: the file, module or factory does not exist.
        FormatError: it is no valid ONNX, or uses an operator that onnxruntime does not have.
        UsageError: the argument is neither a file, nor `file.py:factory`, nor `package.module:factory`.
        MissingExtra: torch is needed and not installed.
    """
    if isinstance(model, (str, Path)) and (isinstance(model, Path) or ":" not in model):
        path = Path(model)
        if path.suffix != ".onnx":
            if not path.exists():
                raise NotFound(f"there is no model file {path}")
            raise FormatError(f"{path} is no .onnx file: give one, or file.py:factory of a torch module")
        data = read_bytes(path, "the model", MAX_MODEL_BYTES)
        return Source(check(data, str(path), path.parent), path.name, sha256_hex(data), len(data))
    if isinstance(model, str):
        module, name = _make(model), model
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


def _make(reference: str) -> Any:
    """Call the factory that `file.py:factory` or `package.module:factory` names."""
    path, _, attribute = reference.rpartition(":")
    if not path or not attribute.isidentifier():
        raise UsageError(f"'{reference}' is neither a file, nor file.py:factory, nor package.module:factory")
    _torch()
    try:
        module = _import_file(Path(path)) if path.endswith(".py") else _import_module(path)
    except ModuleNotFoundError as error:
        if error.name and not path.endswith(".py") and f"{path}.".startswith(f"{error.name}."):
            raise NotFound(f"there is no module '{error.name}' to import, here or on PYTHONPATH") from None
        raise MissingExtra(f"{path} needs the module '{error.name}', which is not installed") from None
    except SyntaxError as error:
        raise FormatError(f"{error.filename or path} line {error.lineno}: {error.msg}") from None
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise NotFound(f"{path} has no function '{attribute}'")
    return factory()


def _import_file(path: Path) -> Any:
    """Import a file by its path; what lies beside it can be imported by it."""
    if not path.is_file():
        raise NotFound(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"skerry_factory_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FormatError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in the file look themselves up
    with _also_from(path.parent):
        spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> Any:
    with _also_from(Path.cwd()):
        return importlib.import_module(name)


@contextlib.contextmanager
def _also_from(folder: Path) -> Iterator[None]:
    """Let imports look in a folder too, last of all: nothing in it takes the place of an installed module."""
    entry = str(folder.resolve())
    sys.path.append(entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for at in range(len(sys.path) - 1, -1, -1):
            if sys.path[at] == entry:
                del sys.path[at]  # the last one is ours
                break


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
