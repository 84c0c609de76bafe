"""Make a split plan: cut, measure, gate, judge, and write it all to one folder that is never half-written."""

import dataclasses
import math
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud.split.export import commented
from cloud.split.graph import Flow, free_types, observed_types, read_flow
from cloud.split.images import recognise
from cloud.split.inputs import check_fit, read_data, read_model
from cloud.split.joint import FOLDER as SMALL_FOLDER
from cloud.split.live import LiveDevice, device_facts, measured_slowdown
from cloud.split.memory import measured_mb
from cloud.split.privacy import audited
from cloud.split.report import render_html, report_json
from cloud.split.segment import Pieces, write_segments
from cloud.split.shortlist import Candidate, candidate, shortlist
from cloud.split.task import Gate, Progress, Task, Timed
from cloud.split.verdict import LINKS, judge, options, worth_cutting
from skills import codec, ort
from skills.coding import Coding, Image
from skills.errors import FormatError, MissingExtra, UsageError
from skills.files import fsync_directory, sha256_file, sha256_hex, storage_errors, write_atomic
from skills.measurement import Figures
from skills.network import ASSUMED, Link
from skills.plain import raw_bytes
from skills.split_plan import Cut, Millis, Plan, Policy, Verdict, plan_hash
from skills.timer import Dilated, Local, Timer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

SHORT_ROUNDS = 8
PIECE = re.compile(r"\d+\.onnx|shared\.bin")  # in the folder `segments`
# All that `split` and `split joint` write to a plan's folder: one that holds anything else is nobody's to replace.
WRITTEN = frozenset(
    ("split.yaml", "segments", "report.json", "report.html", "head.onnx", "tail.onnx", "head_tail.bin", SMALL_FOLDER)
)


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
    objective: str = "latency",
    slo_ms: float | None = None,
    memory_mb: float | None = None,
    device: LiveDevice | None = None,
    head_tail: bool = False,
    audit: bool = False,
    out: Path,
    image: Image | None = None,
    most_cuts: int = 8,
    most_samples: int = 64,
    most_gate: int = 512,
    rounds: int = 30,
    network: Link = ASSUMED,
    progress: Progress = lambda stage, done, of: None,
) -> SplitReport:
    """Plan how `model` (.onnx) is split for a device `slowdown` times slower than this machine, and write `out`.

    `data` is an .npz or a mapping with `x` (or the model's input names) and, when there are labels, `y`; or a folder of
    pictures with a data.yaml, which says how they are normalised. Else an input that is a picture is recognised from the
    data unless `image` says how it is normalised. `min_cut` names a tensor, and takes
    `private`: no cut before it is used. `max_drop` is in percentage points, for every coding of every cut; it is
    judged on up to `most_gate` inputs, as many as fit in some seconds, while times and scales come of `most_samples`.
    A live `device` measures the heads and codings itself; then `slowdown` counts for nothing, and the plan has the measured one.
    `objective` is latency or bytes (within `slo_ms`); a cut whose segments need more than `memory_mb` on the device is not
    used. With `private` and `audit`, cuts from which a decoder could rebuild inputs, or about which that cannot be told, are not
    used either. `head_tail` also writes head.onnx and tail.onnx of the best true cut, for runtimes that know no segments.

    Raises:
        UsageError: `out` exists and is no split plan or holds other files too, which stay; a value is out of range; or
            `min_cut` is no tensor of a private plan's.
        NotFound, FormatError: the model or the data is missing or not what it should be.
        StorageError: the disk is full; `out` is as it was.
        Refused, Unreachable, DeadlineExceeded: a live device does not measure; `out` is as it was.
    """
    start = time.monotonic()
    check_limits(slowdown, max_drop, links)
    _check_replaceable(out)
    if min_cut is not None and not private:
        raise UsageError(f"the minimum cut {min_cut!r} counts only for a private plan: give --private as well")
    policy = asked_policy(objective, slo_ms)
    raw, graph = read_model(model)
    beside = model.parent if isinstance(model, Path) else None
    given = read_data(data, graph)
    feeds, labels = given.feeds, given.labels
    check_fit(given, ort.session(raw, beside=beside).inputs)
    count = min(len(next(iter(feeds.values()))), max(most_samples, most_gate))
    every = [{name: array[at : at + 1] for name, array in feeds.items()} for at in range(count)]
    samples, more = every[:most_samples], every[most_samples:]
    progress("reading the graph", 0, 1)
    seen = observed_types(graph, feeds, beside)
    types = free_types(graph, seen)
    flow = read_flow(graph, {name: seen[name] for name in types})  # what a cut weighs, it weighs on the data
    if image is None and len(flow.inputs) == 1:
        image = given.image or recognise(feeds[flow.inputs[0]])
    if min_cut is not None and min_cut not in flow.producer():
        raise UsageError(
            f"the model has no tensor {min_cut!r} for the minimum cut: it is named by a tensor, as a plan lists them under "
            "its cuts, for the cuts get their names (c1, …) only when the plan is made"
        )
    timer: Timer = Dilated(slowdown) if slowdown > 1 and device is None else Local()
    slowest = min(link.mbit for link in (*links, *LINKS, network))
    task = Task(raw, beside, graph, flow, types, samples, more, labels, image, timer, max_drop, slowest, progress)
    cuts = shortlist(flow, most_cuts, min_cut, deep=private and audit)
    progress("reading the graph", 1, 1)
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        first = task.time(cuts, work / "first", "timing all candidates", SHORT_ROUNDS, pause_s=0.0)  # only compared
        gate = task.code(cuts, first)
        codings = gate.codings
        figures = None
        if device is not None:
            first, codings, figures = task.there(device, first, codings, work / "first", SHORT_ROUNDS)
        made, leaks = _cuts(cuts, first, codings), dict[str, Any]()
        if memory_mb is not None:
            made = _weighed(made, first, work / "first", figures)
        if private and audit:
            made, leaks["privacy_audit"] = audited(task, made, first)
        # Every boundary costs a little speed, so only the cuts that some link could want are cut for good.
        wanted = worth_cutting(
            made, reply_bytes=gate.reply_bytes, replies=gate.replies, private=private, memory_mb=memory_mb,
            least=_least(cuts, flow, min_cut),
        )  # fmt: skip
        audits = {cut.tensors: cut.leak for cut in made}
        kept = tuple(cut for at, cut in enumerate(cuts, 1) if f"c{at}" in wanted)
        codings = [codings[0], *(one for at, one in enumerate(codings[1:], 1) if f"c{at}" in wanted)]
        timed = task.time(kept, work, "timing heads and tails", rounds)
        used = {coding.reply for one in codings for coding in one}
        replies = tuple(one for one in gate.replies if one.name in used)
        if device is not None:
            timed, codings, figures = task.there(device, timed, codings, work, rounds)
            slowdown = measured_slowdown(timed.costs, figures)
            replies = tuple(dataclasses.replace(one, decode_ms=round(one.decode_ms * slowdown, 3)) for one in replies)
        plan = Plan(
            sha256_hex(model) if isinstance(model, bytes) else sha256_file(model),
            timed.pieces.live[0], timed.pieces.outputs, timed.pieces.segments, _cuts(kept, timed, codings), network,
            float(slowdown), private, _least(kept, flow, min_cut), float(max_drop), gate.metric, gate.inputs,
            reply_bytes=gate.reply_bytes, replies=replies,
            whole=round(gate.whole, 6), shared=timed.pieces.shared, policy=policy, memory_mb=memory_mb,
            device=device.name if device is not None else "",
        )  # fmt: skip
        final = _weighed(plan.cuts, timed, work, figures)
        plan = dataclasses.replace(
            plan, cuts=tuple(dataclasses.replace(cut, leak=audits.get(cut.tensors)) for cut in final)
        )
        plan = dataclasses.replace(plan, verdicts=tuple(judge(plan, link) for link in links))
        details = (
            _details(timed, kept, gate, rounds)
            | leaks
            | {
                "seconds": round(time.monotonic() - start, 1),
                "model": model.name if isinstance(model, Path) else "",
                "considered": [
                    {"tensors": list(cut.tensors), "work_before": round(cut.share, 4), "kept": cut in kept}
                    | ({"leak": dataclasses.asdict(one.leak)} if one.leak else {})
                    for cut, one in zip(cuts, made[1:], strict=False)
                ],
            }
        )
        if device is not None and figures is not None:
            details |= {"live": device_facts(device.name, figures)}
        details |= {"segment_audit": segment_audit(task, timed.pieces, work)}
        shutil.rmtree(work / "first")
        best = default_cut(plan) if head_tail else None
        if best is not None:
            details |= {"head_tail": _head_tail(task, kept[best.after - 1], best.name, work)}
        write_atomic(work / "split.yaml", commented(plan).encode())
        write_atomic(work / "report.json", report_json(plan, details))
        write_atomic(work / "report.html", render_html(plan, details).encode())
        _publish(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return SplitReport(plan, plan_hash(plan), plan.verdicts, out, details)


def check_limits(slowdown: float, max_drop: float, links: Sequence[Link]) -> None:
    """Refuse figures that no plan can be made with.

    Raises:
        UsageError: one is out of range, or there is no link.
    """
    if not 1 <= slowdown <= 1000:
        raise UsageError(f"the slowdown is {slowdown:g}: it says how many times slower the device is, from 1 to 1000")
    if not 0 <= max_drop <= 100:
        raise UsageError(f"the largest drop is {max_drop:g}: it is in percentage points, from 0 to 100")
    if not links:
        raise UsageError("no link was given: name at least one, like 20mbit/30ms")


def _check_replaceable(out: Path) -> None:
    """Refuse a folder that is neither empty nor a split plan and nothing else: a new plan takes its place whole."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "split.yaml").is_file():
        raise UsageError(f"{out} exists and is no split plan: name a folder that does not exist yet")
    inside = (f"segments/{path.name}" for path in out.glob("segments/*") if not PIECE.fullmatch(path.name))
    if others := sorted((*inside, *(path.name for path in out.iterdir() if path.name not in WRITTEN))):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UsageError(
            f"{out} has a split plan and also {others[0]}{more}, which a new plan would remove: name another folder"
        )


def asked_policy(objective: str, slo_ms: float | None) -> Policy:
    """Return the policy of a new plan.

    Raises:
        UsageError: the objective is none, or `bytes` without a limit on time; or the limit is out of range.
    """
    if objective not in ("latency", "bytes"):
        raise UsageError(f"the objective is {objective!r}, expected latency or bytes")
    if slo_ms is not None and not 0.001 <= slo_ms <= 3.6e6:
        raise UsageError(f"the slowest answer allowed is {slo_ms:g} ms: give milliseconds above 0")
    if objective == "bytes" and slo_ms is None:
        raise UsageError(
            "the objective bytes needs a limit on time (--slo-ms): without one, staying local always sends the fewest"
        )
    return Policy(minimize="bytes" if objective == "bytes" else "latency", slo_ms=slo_ms)


def _weighed(cuts: tuple[Cut, ...], timed: Timed, folder: Path, figures: Figures | None) -> tuple[Cut, ...]:
    """Return the cuts with the memory that each takes on the device, as the device found or as it is found here."""
    files = [folder / one.file for one in timed.pieces.segments]
    weights = (0.0, *(measured_mb(files, timed.shapes) if figures is None else figures.memory_mb))
    return tuple(
        dataclasses.replace(cut, memory_mb=weights[cut.after]) if cut.after < len(weights) else cut for cut in cuts
    )


def default_cut(plan: Plan) -> Cut | None:
    """Return the best true cut on the assumed network, whether it beats the other options or not; None where there is none."""
    ranked = [*options(plan, plan.network), *options(plan, plan.network, every=True)]
    return next((one.cut for one in ranked if one.cut.name not in ("local", "input")), None)


def segment_audit(task: "Task", pieces: Pieces, folder: Path) -> dict[str, Any] | None:
    """Say of a quantized model how many heavy operators of each segment compute in int8, and how many did in the whole.

    None for a model that has none. A segment whose constants lie outside is not looked at.
    """
    if not any(op.kind in ("QuantizeLinear", "DequantizeLinear", "QLinearConv") for op in task.flow.ops):
        return None
    try:
        whole = ort.audit(task.raw if isinstance(task.raw, bytes) else task.raw.read_bytes(), task.beside)
        rows: list[dict[str, Any]] = []
        for one in pieces.segments:
            found = ort.audit((folder / one.file).read_bytes(), (folder / one.file).parent)
            rows.append({"file": one.file, "heavy": len(found.rows), "float": [row.node for row in found.stayed_float]})
    except (FormatError, MissingExtra):
        return None
    lost = {name for row in rows for name in row["float"]} - {row.node for row in whole.stayed_float}
    return {
        "whole_heavy": len(whole.rows),
        "whole_float": len(whole.stayed_float),
        "segments": rows,
        "lost": sorted(lost),
    }


def _head_tail(task: "Task", cut: Candidate, name: str, folder: Path) -> dict[str, object]:
    """Write head.onnx and tail.onnx, plain models that any runtime takes."""
    pieces = write_segments(
        task.graph, task.flow, [cut.prefix], folder, task.types, task.image, "", ("head.onnx", "tail.onnx"),
        "head_tail.bin", task.beside,
    )  # fmt: skip
    return {"cut": name, "tensors": list(cut.tensors), "files": [path.lstrip("/") for path in _written(pieces)]}


def _written(pieces: Pieces) -> list[str]:
    return [one.file for one in pieces.segments] + ([pieces.shared.file] if pieces.shared else [])


def _cuts(cuts: Sequence[Candidate], timed: Timed, codings: Sequence[tuple[Coding, ...]]) -> tuple[Cut, ...]:
    made = []
    for after, tensors in enumerate(timed.pieces.live):
        costs, name = timed.costs[after], f"c{after}" if after else "input"
        raw = after == 0 or cuts[after - 1].raw
        weight = sum(math.prod(timed.shapes[live.name]) * codec.itemsize(live) for live in tensors)
        cut = Cut(name, after, costs.device, costs.tail, tensors, codings[after], raw)
        made.append(cut if weight == raw_bytes(cut) else dataclasses.replace(cut, raw_bytes=weight))
    local = timed.costs[len(made)]
    return (*made, Cut("local", len(made), local.device, Millis(0.0, 0.0)))  # nothing is left for a tail


def _details(timed: Timed, kept: Sequence[Candidate], gate: Gate, rounds: int) -> dict[str, Any]:
    return {
        "metric_whole": gate.whole,
        "reply": {"raw_bytes": gate.reply_bytes, "codings": [dataclasses.asdict(one) for one in gate.replies]},
        "whole_ms_here": dataclasses.asdict(timed.whole),
        "chain_ms_here": dataclasses.asdict(timed.costs[0].tail),
        "max_abs_difference": timed.gap,
        "versions": ort.versions(),
        "rounds": rounds,
        "shares": {f"c{at}": round(cut.share, 4) for at, cut in enumerate(kept, 1)},
    }


def _least(cuts: Sequence[Candidate], flow: Flow, min_cut: str | None) -> str | None:
    if min_cut is None:
        return None
    wanted = candidate(flow, flow.ancestors(min_cut)).prefix
    return next((f"c{at}" for at, cut in enumerate(cuts, 1) if wanted <= cut.prefix), "local")


def _publish(work: Path, out: Path) -> None:
    """Move the finished folder to its name. A crash leaves the old plan, no plan beside a hidden one, or the new plan.

    Raises:
        UsageError: it holds now what is not of a plan.
    """
    _check_replaceable(out)  # the plan took minutes: something may have been put there meanwhile
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
