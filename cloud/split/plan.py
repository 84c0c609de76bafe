"""Make a split plan: cut, measure, gate, judge, and write it all to one folder that is never half-written."""

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud.split.graph import Flow, observed_types, read_flow
from cloud.split.images import recognise
from cloud.split.profile import Score, measure, measure_coding, possible_codings, scorer
from cloud.split.report import render_html, report_json
from cloud.split.segment import write_segments
from cloud.split.shortlist import Candidate, candidate, shortlist
from cloud.split.verdict import LINKS, judge
from skills import ort
from skills.errors import FormatError, MissingExtra, NotFound, UsageError
from skills.files import fsync_directory, sha256_hex, storage_errors, write_atomic
from skills.split import Coding, Cut, Image, Link, Live, Plan, Policy, Verdict, plan_hash
from skills.timer import Dilated, Local
from skills.wire import encode_yaml

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

Progress = Callable[[str, int, int], None]

HEADER = """A split plan: how this model is cut between a device and its tail in the cloud. docs/splitting.md explains every field.
You may edit `policy` (pin a cut, change the hysteresis), `private`, `min_cut`, `network` and the measured times.
Segments, tensors, codings and their scales are fixed: the tail knows the plan by a hash over them."""
MOST_MODEL_BYTES = 2 << 30
TOLERANCE = 1e-4  # relative; segments are optimised apart, so sums may round differently in the last places


@dataclasses.dataclass(frozen=True, slots=True)
class SplitReport:
    """A finished plan: what was decided, why, and where it lies (`out`/split.yaml, segments/, report.json, report.html)."""

    plan: Plan
    plan_hash: str
    verdicts: tuple[Verdict, ...]
    out: Path
    details: Mapping[str, Any]


def split(
    model: Path | bytes,
    data: "Path | Arrays",
    *,
    slowdown: float = 10.0,
    links: Sequence[Link] = LINKS,
    private: bool = False,
    min_cut: str | None = None,
    max_drop: float = 1.0,
    out: Path,
    image: Image | None = None,
    most_cuts: int = 8,
    most_samples: int = 64,
    rounds: int = 30,
    network: Link | None = None,
    progress: Progress = lambda stage, done, of: None,
) -> SplitReport:
    """Plan how `model` (.onnx) is split for a device `slowdown` times slower than this machine, and write `out`.

    `data` is an .npz or a mapping with `x` (or the model's input names) and, when there are labels, `y`. An input that is
    a picture is recognised from the data unless `image` says how it is normalised. `min_cut` names a tensor: with
    `private` no cut before it is used. `max_drop` is in percentage points, for every coding of every cut.

    Raises:
        UsageError: `out` exists and is no split plan, or a value is out of range.
        NotFound, FormatError: the model or the data is missing or not what it should be.
        StorageError: the disk is full; `out` is as it was.
    """
    start = time.monotonic()
    _check(out, slowdown, max_drop, links)
    raw, graph = read_model(model)
    feeds, labels = read_data(data, graph)
    feeds = {name: array[:most_samples] for name, array in feeds.items()}
    labels = None if labels is None else labels[:most_samples]
    progress("reading the graph", 0, 1)
    types = observed_types(graph, feeds)
    flow = read_flow(graph, types)
    if image is None and len(flow.inputs) == 1:
        image = recognise(feeds[flow.inputs[0]])
    if min_cut is not None and min_cut not in flow.producer():
        raise UsageError(f"the model has no tensor {min_cut!r} for the minimum cut")
    cuts = shortlist(flow, most_cuts, min_cut)
    progress("reading the graph", 1, 1)
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        with storage_errors(out):
            (work / "segments").mkdir()
        pieces = write_segments(graph, flow, [cut.prefix for cut in cuts], work / "segments", types, image)
        plan, details = _measured(
            raw,
            flow,
            cuts,
            pieces,
            work,
            feeds,
            labels,
            slowdown,
            max_drop,
            private,
            min_cut,
            rounds,
            network,
            progress,
        )
        plan = dataclasses.replace(plan, verdicts=tuple(judge(plan, link) for link in links))
        details |= {
            "seconds": round(time.monotonic() - start, 1),
            "model": str(model) if isinstance(model, Path) else "bytes",
        }
        whole_report = report_json(plan, details)
        write_atomic(work / "split.yaml", encode_yaml(plan, HEADER).encode())
        write_atomic(work / "report.json", whole_report)
        write_atomic(work / "report.html", render_html(plan, details).encode())
        _publish(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return SplitReport(plan, plan_hash(plan), plan.verdicts, out, details)


def read_model(model: Path | bytes) -> tuple[bytes | Path, Any]:
    """Return the model for the runtime, and its graph.

    Raises:
        NotFound: there is no such file.
        FormatError: not ONNX, or a file whose weights lie outside and are missing.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise MissingExtra("splitting a model needs onnx: pip install 'skerry[cloud]'") from None
    try:
        if isinstance(model, bytes):
            return model, onnx.load_model_from_string(model)
        if not model.is_file():
            raise NotFound(f"there is no model file {model}")
        return model, onnx.load(model)
    except (DecodeError, ValueError, OSError, onnx.checker.ValidationError) as error:
        name = model if isinstance(model, Path) else "the model"
        raise FormatError(f"{name} is no ONNX model that can be read: {error}") from None


def read_data(data: "Path | Arrays", graph: Any) -> "tuple[dict[str, NDArray[Any]], NDArray[Any] | None]":
    """Return the inputs by name, and the labels if there are any.

    Raises:
        NotFound: there is no such file.
        FormatError: arrays that do not fit the model's inputs, or none at all.
    """
    import numpy as np

    if isinstance(data, Path):
        if not data.is_file():
            raise NotFound(f"there is no data file {data}")
        try:
            with np.load(data, allow_pickle=False) as pack:
                data = {name: pack[name] for name in pack.files}
        except (ValueError, OSError, EOFError) as error:
            raise FormatError(f"{data} is no .npz with arrays: {error}") from None
    constants = {item.name for item in graph.graph.initializer}
    inputs = [item.name for item in graph.graph.input if item.name not in constants]
    arrays = dict(data)
    if len(inputs) == 1 and inputs[0] not in arrays and "x" in arrays:
        arrays[inputs[0]] = arrays["x"]
    missing = [name for name in inputs if name not in arrays]
    if missing:
        raise FormatError(
            f"the data has {', '.join(data) or 'nothing'}, the model needs {missing[0]!r}"
            + (" (or x)" if len(inputs) == 1 else "")
        )
    counts = {len(arrays[name]) for name in inputs}
    labels = arrays.get("y")
    if len(counts) != 1 or 0 in counts or (labels is not None and len(labels) not in counts):
        raise FormatError(
            f"the data's arrays have {sorted(counts)} samples, expected the same number, at least one, in each"
        )
    return {name: arrays[name] for name in inputs}, labels


def _check(out: Path, slowdown: float, max_drop: float, links: Sequence[Link]) -> None:
    if not 1 <= slowdown <= 1000:
        raise UsageError(f"the slowdown is {slowdown:g}: it says how many times slower the device is, from 1 to 1000")
    if not 0 <= max_drop <= 100:
        raise UsageError(f"the largest drop is {max_drop:g}: it is in percentage points, from 0 to 100")
    if not links:
        raise UsageError("no link was given: name at least one, like 20mbit/30ms")
    if out.exists() and not (out / "split.yaml").is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists and is no split plan: name a folder that does not exist yet")


def _measured(
    raw: bytes | Path,
    flow: Flow,
    cuts: Sequence[Candidate],
    pieces: Any,
    work: Path,
    feeds: "Arrays",
    labels: "NDArray[Any] | None",
    slowdown: float,
    max_drop: float,
    private: bool,
    min_cut: str | None,
    rounds: int,
    network: Link | None,
    progress: Progress,
) -> tuple[Plan, dict[str, Any]]:
    whole, device = ort.session(raw), Dilated(slowdown) if slowdown > 1 else Local()
    chain = ort.chain([work / segment.file for segment in pieces.segments], flow.outputs)
    count = len(next(iter(feeds.values())))
    samples = [{name: array[at : at + 1] for name, array in feeds.items()} for at in range(count)]
    afters = range(len(cuts) + 2)
    costs, whole_ms = measure(
        chain, whole, afters, samples, device, rounds, _ticker(progress, "timing heads and tails", rounds)
    )
    truths = [whole.run(sample) for sample in samples]
    score = scorer(truths, flow.outputs, labels)
    reference = score(truths)
    parity = _parity(chain, samples, truths)
    lives: list[tuple[Live, ...]] = [*pieces.live]
    done, made = 0, []
    for after, tensors in enumerate(lives):
        values = [chain.run(sample, 0, after) for sample in samples]
        codings = []
        for coding in possible_codings(tensors, after == 0, values):
            codings.append(
                measure_coding(
                    coding, tensors, values, _finish(chain, after), score, reference.values, device, max_drop
                )
            )
            done += 1
            progress("measuring codings", done, len(lives) * 2 + 2)
        made.append(_cut(after, costs[after], tensors, codings, after == 0 or cuts[after - 1].raw))
    local = costs[len(cuts) + 1]
    made.append(Cut("local", len(cuts) + 1, local.device, local.tail))
    plan = Plan(
        model_sha256=sha256_hex(raw) if isinstance(raw, bytes) else _sha256(raw),
        inputs=pieces.live[0] if set(flow.inputs) == {live.name for live in pieces.live[0]} else _all_inputs(flow, pieces),
        outputs=pieces.outputs, segments=pieces.segments, cuts=tuple(made), shared=pieces.shared,
        network=network or Plan.__dataclass_fields__["network"].default,
        slowdown=float(slowdown), private=private, min_cut=_least(cuts, flow, min_cut), max_drop=float(max_drop),
        metric=reference.metric, samples=count, policy=Policy(),
    )  # fmt: skip
    details = {
        "metric_name": reference.metric, "metric_whole": float(reference.values.mean()), "whole_ms_here": dataclasses.asdict(whole_ms),
        "chain_ms_here": dataclasses.asdict(costs[0].tail), "max_abs_difference": parity, "versions": ort.versions(), "rounds": rounds,
        "shares": {f"c{at}": round(cut.share, 4) for at, cut in enumerate(cuts, 1)},
    }  # fmt: skip
    return plan, details


def _cut(after: int, costs: Any, tensors: tuple[Live, ...], codings: Sequence[Coding], raw: bool) -> Cut:
    return Cut("input" if after == 0 else f"c{after}", after, costs.device, costs.tail, tensors, tuple(codings), raw)


def _finish(chain: ort.Chain, after: int) -> Callable[["Arrays"], "Arrays"]:
    return lambda values: chain.run(values, after)


def _least(cuts: Sequence[Candidate], flow: Flow, min_cut: str | None) -> str | None:
    if min_cut is None:
        return None
    wanted = candidate(flow, flow.ancestors(min_cut)).prefix
    return next((f"c{at}" for at, cut in enumerate(cuts, 1) if wanted <= cut.prefix), "local")


def _parity(chain: ort.Chain, samples: Sequence["Arrays"], truths: Sequence["Arrays"]) -> float:
    """Return the largest difference between the chain of segments and the whole model.

    Raises:
        FormatError: it is more than rounding, so the model cannot be cut this way.
    """
    import numpy as np

    worst = 0.0
    for sample, truth in zip(samples[:8], truths, strict=False):
        for name, found in chain.run(sample).items():
            right = np.asarray(truth[name], np.float64)
            gap = float(np.abs(np.asarray(found, np.float64) - right).max(initial=0.0))
            if gap > TOLERANCE * max(1.0, float(np.abs(right).max(initial=0.0))):
                raise FormatError(
                    f"the segments' output {name!r} differs from the whole model's by {gap:.2g}: it cannot be split"
                )
            worst = max(worst, gap)
    return worst


def _all_inputs(flow: Flow, pieces: Any) -> tuple[Live, ...]:
    missing = set(flow.inputs) - {live.name for live in pieces.live[0]}
    raise FormatError(
        f"the model's input {sorted(missing)[0]!r} is used by nothing: remove it from the graph, then split"
    )


def _sha256(path: Path) -> str:
    from skills.files import sha256_file

    return sha256_file(path)


def _ticker(progress: Progress, stage: str, rounds: int) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(stage, min(done, rounds), rounds)

    return tick


def _publish(work: Path, out: Path) -> None:
    """Move the finished folder to its name; a crash leaves the old plan, the new one, or a hidden .tmp folder."""
    with storage_errors(out):
        fsync_directory(work)
        work.chmod(0o755)
        old = out.with_name(f".{out.name}.old.tmp")
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        work.rename(out)  # commit point
        fsync_directory(out.parent)
        shutil.rmtree(old, ignore_errors=True)


__all__ = ["Score", "SplitReport", "split"]
