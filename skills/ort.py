"""The only door to onnxruntime: sessions, timing side by side, and the audit of what the runtime really made of a graph.

Importing this module is cheap; onnxruntime and numpy come in with the first session. Telemetry is switched off before
that import, everywhere.
"""

import dataclasses
import functools
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skills.errors import FormatError, MissingExtra, NotFound
from skills.isa import isa
from skills.macros import call_names, expanded
from skills.timer import Halt

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_OPSET = 26  # the newest that onnxruntime 1.30 and 1.31 accept; a newer one is lowered before it is run
MAX_IR = 13
INT8_OPS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
FLOAT_OPS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "ConvTranspose")
HEAVY_OPS = ("Conv", "Gemm", "MatMul", "ConvTranspose")
FUSED_BEHIND = ("QuantizeLinear", "DequantizeLinear", "Relu", "Clip", "LeakyRelu", "Add")
DTYPES = {
    "tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16", "tensor(uint8)": "uint8",
    "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(int32)": "int32", "tensor(int64)": "int64",
    "tensor(bool)": "bool", "tensor(string)": "object",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a session; `dtype` is numpy's name for it, -1 in `shape` a free size."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Session:
    """A loaded model. `raw` is onnxruntime's own session, for what this door does not cover."""

    raw: Any
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    load_ms: float

    def run(
        self, feeds: Mapping[str, "NDArray[Any]"], names: Sequence[str] | None = None, halt: Halt | None = None
    ) -> dict[str, "NDArray[Any]"]:
        """Run once and return the outputs by name (all of them, or those in `names`).

        Raises:
            FormatError: the arrays do not fit the model; the sentence is the runtime's.
            Halted: `halt` was set; the runtime stops at its next operator.
        """
        wanted = [port.name for port in self.outputs] if names is None else list(names)
        options = None
        if halt is not None:
            halt.check()
            options = runtime().RunOptions()
            halt.then(functools.partial(setattr, options, "terminate", True))
        try:
            return dict(zip(wanted, self.raw.run(wanted, dict(feeds), options), strict=True))
        except Exception as error:
            if halt is not None:
                halt.check()
            raise FormatError(f"onnxruntime refuses the input: {_one_line(error)}") from error


@dataclasses.dataclass(frozen=True, slots=True)
class Passing:
    """A model that is loaded for one run and let go: for a device that has no room for all segments at once."""

    file: Path
    threads: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    @classmethod
    def of(cls, file: Path, threads: int = 1) -> "Passing":
        """Load a model once, to know its inputs and outputs; raises as `session` does."""
        seen = session(file, threads)
        return cls(file, threads, seen.inputs, seen.outputs)

    def run(self, feeds: Mapping[str, "NDArray[Any]"], *, halt: Halt | None = None) -> dict[str, "NDArray[Any]"]:
        """Load, run once and let go; raises as `session` and `Session.run` do."""
        return session(self.file, self.threads).run(feeds, halt=halt)


@dataclasses.dataclass(frozen=True, slots=True)
class Chain:
    """The segments of a model, run in order; between two of them the live tensors are kept by name, the others dropped."""

    sessions: tuple[Session | Passing, ...]
    live: tuple[
        tuple[str, ...], ...
    ]  # live[n]: what lives on after the first n segments; the last one holds the outputs

    @classmethod
    def of(cls, sessions: Sequence[Session | Passing], outputs: Sequence[str]) -> "Chain":
        """Join sessions in order; `outputs` are the whole model's, wherever in the chain they come to be."""
        return cls(tuple(sessions), tuple(_live_after(sessions[at:], outputs) for at in range(len(sessions) + 1)))

    def run(
        self,
        values: Mapping[str, "NDArray[Any]"],
        start: int = 0,
        stop: int | None = None,
        before_each: Callable[[], None] | None = None,
        halt: Halt | None = None,
    ) -> dict[str, "NDArray[Any]"]:
        """Run segments start..stop-1 on the tensors in `values` and return those that live on after them.

        `before_each` is called before every segment; what it raises ends the run.

        Raises:
            FormatError: a tensor is missing or does not fit.
            Halted: `halt` was set.
        """
        stop = len(self.sessions) if stop is None else stop
        alive = dict(values)
        for at in range(start, stop):
            if before_each is not None:
                before_each()
            one = self.sessions[at]
            missing = [port.name for port in one.inputs if port.name not in alive]
            if missing:
                raise FormatError(f"the tensor {missing[0]!r} is missing, there are {', '.join(alive) or 'none'}")
            alive.update(one.run({port.name: alive[port.name] for port in one.inputs}, halt=halt))
            alive = {name: alive[name] for name in self.live[at + 1] if name in alive}
        return {name: alive[name] for name in self.live[stop] if name in alive}


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Wall time of one run, in milliseconds: the middle, nine out of ten, the best, and how many runs were timed."""

    p50_ms: float
    p90_ms: float
    best_ms: float
    runs: int


@dataclasses.dataclass(frozen=True, slots=True)
class AuditRow:
    """What became of one Conv, Gemm or MatMul: `kernel` is the runtime's operator; `reason` says why it stayed float."""

    node: str
    kernel: str
    int8: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Audit:
    """The optimised graph, read back: one row per heavy operator, and how many nodes of each kind there are."""

    rows: tuple[AuditRow, ...]
    counts: Mapping[str, int]

    @property
    def stayed_float(self) -> tuple[AuditRow, ...]:
        """Return the heavy operators that compute in float."""
        return tuple(row for row in self.rows if not row.int8)


def runtime() -> Any:
    """Return the onnxruntime module, with telemetry off.

    Raises:
        MissingExtra: it is not installed.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra("onnxruntime is not installed: pip install 'skerry[edge]'") from None
    return onnxruntime


def version() -> str:
    """Return onnxruntime's version."""
    return str(runtime().__version__)


def versions() -> dict[str, str]:
    """Return what a measurement was made with: onnxruntime, numpy, Python and the machine."""
    import numpy as np

    return {
        "onnxruntime": version(), "numpy": np.__version__, "python": platform.python_version(),
        "machine": platform.machine(), "isa": ",".join(isa()),
    }  # fmt: skip


def session(
    model: bytes | Path, threads: int = 1, *, optimise: bool = True, beside: Path | None = None, exact: bool = False
) -> Session:
    """Load a model on the CPU; `optimise=False` keeps the graph as it was written, for looking at tensors inside it.

    A model given as bytes finds its external data in the folder `beside`. `exact` computes in float between a quantized
    model's codes, for machines whose int8 kernels let sums saturate (docs/decisions/0045-exact-sums.md).

    Raises:
        NotFound: there is no such file.
        FormatError: onnxruntime cannot load it, in its own words.
        MissingExtra: onnxruntime is not installed.
    """
    return _load(model, threads, optimise=optimise, save_to=None, beside=beside, exact=exact)


def chain(files: Sequence[Path], outputs: Sequence[str], threads: int = 1, resident: int | None = None) -> Chain:
    """Load the segments of a model, in order; `outputs` are the whole model's. Only the first `resident` stay in memory.

    Raises:
        NotFound, FormatError, MissingExtra: as for `session`.
    """
    kept = len(files) if resident is None else resident
    return Chain.of(
        [session(file, threads) if at < kept else Passing.of(file, threads) for at, file in enumerate(files)], outputs
    )


def audit(model: bytes, beside: Path | None = None) -> Audit:
    """Load `model` fully optimised, read the result back and say what became of each Conv, Gemm and MatMul.

    Rows carry the names that the operators have in `model`, whatever the optimiser fused them into. A model with external
    data finds it in `beside`.

    Raises:
        FormatError: onnxruntime cannot load it.
        MissingExtra: onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise MissingExtra("the graph audit needs onnx: pip install 'skerry[compress]'") from None
    with tempfile.TemporaryDirectory(prefix="skerry-audit-") as folder:
        path = Path(folder, "optimised.onnx")
        _load(model, 1, optimise=True, save_to=path, beside=beside)
        optimised = onnx.load(path, load_external_data=False)
    called = onnx.load_model_from_string(model)
    written = expanded(called)
    heavy = [node.name for node in optimised.graph.node if node.op_type in (*INT8_OPS, *FLOAT_OPS)]
    layers = _inlined_names(heavy, call_names(called))
    makers = {name: node for node in written.graph.node for name in node.output}
    named = {node.name: node for node in written.graph.node if node.name}
    counts: dict[str, int] = {}
    rows = []
    for node in optimised.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
        if node.op_type not in INT8_OPS and node.op_type not in FLOAT_OPS:
            continue
        source = named.get(layers.get(node.name, "")) or _written_as(node, named, makers)
        name = (source.name or source.output[0]) if source is not None else (node.name or node.output[0])
        int8 = node.op_type in INT8_OPS
        rows.append(AuditRow(name, node.op_type, int8, "" if int8 else _why_float(written, source)))
    return Audit(tuple(rows), dict(sorted(counts.items())))


def _inlined_names(nodes: Sequence[str], calls: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return which call each heavy operator of the optimised graph comes from, where each call of a function has one.

    The runtime names a node from function F `_inlfunc_F_…`, `_inlfunc_F_token_4_…`: the numbers rise in the order of
    the calls. (The name of the call itself is lost.)
    """
    found: dict[str, list[tuple[int, str]]] = {}
    for name in nodes:
        match = re.match(r"_inlfunc_([A-Za-z0-9]+?)(?:_token_(\d+))?_", name)
        if match is not None and match[1] in calls:
            found.setdefault(match[1], []).append((int(match[2] or -1), name))
    return {
        name: layer
        for function, numbered in found.items()
        if len(numbered) == len(calls[function])
        for (_, name), layer in zip(sorted(numbered), calls[function], strict=True)
    }


def _written_as(node: Any, named: Mapping[str, Any], makers: Mapping[str, Any]) -> Any:
    """Return the heavy operator of the graph as written that became `node`, or None.

    A fused node keeps the operator's name, with a suffix where the runtime changed its layout, or else only what it
    makes: the result of the last operator that was fused in. From there it is one step back at a time.
    """
    name = re.sub(r"(_token_\d+|_nchwc)$", "", node.name)
    at = named.get(name) or makers.get(name) or makers.get(node.output[0])
    while at is not None and at.op_type not in HEAVY_OPS:
        at = makers.get(at.input[0]) if at.op_type in FUSED_BEHIND else None
    return at


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    rounds: int = 60,
    warmup: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    burst: int = 1,
    pause_s: float = 0.0,
) -> dict[str, Timing]:
    """Time several things fairly: `burst` runs of each per round, one after the other; the order turns.

    What else happens on the machine hits all of them alike; compare the results as ratios. Before each burst that counts there
    is a pause of `pause_s`.
    """
    names = list(runs)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for at in range(warmup + rounds):
        turn = at % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            if pause_s and at >= warmup:
                time.sleep(pause_s)
            for _ in range(burst):
                start = clock()
                runs[name]()
                if at >= warmup:
                    taken[name].append((clock() - start) * 1e3)
    return {name: _timing(sorted(values)) for name, values in taken.items()}


def _live_after(sessions: Sequence[Session | Passing], outputs: Sequence[str]) -> tuple[str, ...]:
    given: set[str] = set()
    wanted: dict[str, None] = {}
    for one in sessions:
        wanted.update((port.name, None) for port in one.inputs if port.name not in given)
        given.update(port.name for port in one.outputs)
    wanted.update((name, None) for name in outputs if name not in given)
    return tuple(wanted)


def _timing(values: list[float]) -> Timing:
    last = len(values) - 1
    return Timing(values[last // 2], values[round(last * 0.9)], values[0], len(values))


def _load(
    model: bytes | Path, threads: int, *, optimise: bool, save_to: Path | None, beside: Path | None = None, exact: bool = False
) -> Session:  # fmt: skip
    ort = runtime()
    if isinstance(model, Path) and not model.is_file():
        raise NotFound(f"there is no model file {model}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
    if beside is not None and isinstance(model, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(beside))
    if exact:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    start = time.perf_counter()
    try:
        source = str(model) if isinstance(model, Path) else model
        raw = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        name = model if isinstance(model, Path) else "the model"
        raise FormatError(f"onnxruntime cannot load {name}: {_one_line(error)}") from error
    load_ms = (time.perf_counter() - start) * 1e3
    return Session(raw, tuple(_ports(raw.get_inputs())), tuple(_ports(raw.get_outputs())), load_ms)


def _ports(nodes: Sequence[Any]) -> Iterator[Port]:
    for node in nodes:
        shape = tuple(size if isinstance(size, int) else -1 for size in node.shape or ())
        yield Port(node.name, DTYPES.get(node.type, node.type), shape)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    # "[ONNXRuntimeError] : 10 : INVALID_GRAPH : …" says nothing before the third colon.
    return text.split(" : ", 3)[-1][:400] if text.startswith("[ONNXRuntimeError]") else text[:400]


def _why_float(written: Any, source: Any) -> str:
    """Say what in the graph as written kept the runtime from its int8 kernel."""
    if source is None:
        return "it was made by the optimiser from other operators"
    graph = written.graph
    producer = {name: item for item in graph.node for name in item.output}
    weight = producer.get(source.input[1])
    if weight is None:
        return "its weights are stored as float"
    if weight.op_type == "Mul":
        return "it computes in float by choice: int8 was not faster here, or this operator has no int8 kernel"
    feed = producer.get(source.input[0])
    if feed is None or feed.op_type != "DequantizeLinear":
        return "its input is not quantized"
    if weight.op_type == "DequantizeLinear":
        packed = next((item for item in graph.initializer if item.name == weight.input[0]), None)
        if packed is not None and packed.data_type in (21, 22):
            return "its 4-bit weights reach DequantizeLinear without a Cast to int8"
    after = sorted({item.op_type for item in graph.node if source.output[0] in item.input})
    if after != ["QuantizeLinear"]:
        return f"its output goes to {', '.join(after) or 'the graph output'} and not to QuantizeLinear alone"
    return "the runtime has no int8 kernel for this combination of types"
