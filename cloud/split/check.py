"""Is a split.yaml, edited by hand or not, sound? One sentence for each fault, the remaining ones found all the same."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud.split.verdict import judge
from skills import ort
from skills.coding import CODED_KINDS
from skills.errors import FormatError, NotFound, SkerryError
from skills.files import read_bytes, sha256_file
from skills.plain import uncoded
from skills.split import admitted, answerable, fits, keeps_private
from skills.split_plan import MAX_PLAN_BYTES, Cut, Plan, Segment, Small, Verdict, load_plan, plan_hash
from skills.stages import check_stages
from skills.units import readable_ms

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

# A fault in one of these, in a line of `policy` or in an unknown key does not hide the others: the rest is read without it.
PERSONAL = ("policy", "network", "min_cut", "memory_mb", "verdicts", "private", "slowdown", "max_drop", "device")
TOLERANCE = 1e-4
SIZES = tuple(2**step for step in range(10))  # of free axes but the batch, to try a model with
MAX_REPORT_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Checked:
    """What was found: faults make the plan useless as it stands, remarks are worth a look.

    `stale`: what lies beside split.yaml, or the model, is not what the plan was made of; editing lines does not cure that.
    """

    file: Path
    plan: Plan | None
    faults: tuple[str, ...]
    remarks: tuple[str, ...]
    stale: bool = False


def check_plan(where: Path, model: Path | None = None) -> Checked:
    """Check a plan's folder or its split.yaml; with `model` also that it is the one that was cut.

    Raises:
        NotFound: there is no split.yaml, or no such model file.
    """
    file = where / "split.yaml" if where.is_dir() else where
    text = read_bytes(file, "the split plan", MAX_PLAN_BYTES).decode("utf-8", "replace")
    if model is not None and not model.is_file():
        raise NotFound(f"there is no model file {model}")
    plan, faults = _read(text, file.name)
    if plan is None:
        return Checked(file, None, tuple(faults), ())
    served = uncoded(plan) if plan.policy.tail == "stock" else plan
    faults += _choices(served)
    faults += _flow(plan)
    stale = missing = list(_files(plan, file.parent))
    if plan.stages:
        try:
            check_stages(plan)
        except FormatError as error:
            faults.append(str(error))
    elif not missing:
        faults += _pieces(plan, file.parent)
    if model is not None:
        stale += _model(plan, file.parent, model, whole=not faults and not missing)
    faults += stale
    faults += _as_made(plan, file.parent / "report.json")
    return Checked(file, plan, tuple(faults), tuple(_remarks(served)) if not faults else (), bool(stale))


def _read(text: str, source: str) -> tuple[Plan | None, list[str]]:
    """Return the plan and what is wrong with it; faulty personal parts are left out of it, with every line in its place."""
    try:
        return load_plan(text, source), []
    except FormatError as error:
        first = str(error)
    spans = dict(_spans(text))
    known = {field.name for field in dataclasses.fields(Plan)}
    parts = [key for key in spans if key in PERSONAL or key.partition(".")[0] not in known or key.startswith("policy.")]
    lines = [key for key in parts if key != "policy" or not any(other.startswith("policy.") for other in parts)]
    bare = _without(text, spans, parts)
    try:
        plan = load_plan(bare, source)
    except FormatError as error:
        return None, [str(error)]
    faults, faulty = [], list[str]()
    for key in lines:
        alone = [other for other in parts if other != key and not key.startswith(f"{other}.")]
        try:
            load_plan(_without(text, spans, alone), source)
        except FormatError as error:
            faults.append(str(error))
            faulty.append(key)
    if "policy" not in lines and all(key in faulty for key in lines if key.startswith("policy.")):
        faulty.append("policy")  # none of its lines is left
    try:
        plan = load_plan(_without(text, spans, faulty), source)
    except FormatError as error:
        faults.append(str(error))
    return plan, faults or [first]


def _spans(text: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the lines, first and end, of every key at the top, and of every key in a `policy` written line by line."""
    import yaml

    node = yaml.compose(text, Loader=yaml.SafeLoader) if _is_yaml(text) else None
    if isinstance(node, yaml.MappingNode):
        keys = [key for key, _ in node.value]
        ends = [key.start_mark.line for key in keys[1:]] + [len(text.splitlines())]
        for key, end in zip(keys, ends, strict=True):
            yield str(key.value), (key.start_mark.line, end)
        for key, value in node.value:
            if key.value == "policy" and isinstance(value, yaml.MappingNode) and not value.flow_style:
                starts = [inner.start_mark.line for inner, _ in value.value]
                last = ends[[other for other, _ in node.value].index(key)]
                for (inner, _), first, end in zip(value.value, starts, [*starts[1:], last], strict=True):
                    yield f"policy.{inner.value}", (first, end)


def _is_yaml(text: str) -> bool:
    import yaml

    try:
        yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return False
    return True


def _without(text: str, spans: dict[str, tuple[int, int]], keys: Any) -> str:
    lines = text.splitlines()
    for key in keys:
        first, end = spans.get(key, (0, 0))
        lines[first:end] = [""] * (end - first)
    return "\n".join(lines) + "\n"


def _choices(plan: Plan) -> Iterator[str]:
    """What a person decided must be something that the device can do."""
    yield from _pinned(plan)
    if plan.policy.minimize == "bytes" and plan.policy.slo_ms is None:
        yield "policy.minimize is bytes without policy.slo_ms: staying local would always send the fewest"
    if plan.min_cut and not plan.private:
        yield f"min_cut is {plan.min_cut}, which counts only with private: true"
    for cut in plan.cuts:
        for coding in cut.codings:
            if coding.admitted and not coding.bytes_p50:
                yield f"cut {cut.name}: the coding {coding.name} was never measured (its bytes_p50 is 0)"
    for reply in plan.replies:
        if not reply.bytes_p50:
            yield f"the reply {reply.name} was never measured (its bytes_p50 is 0)"


def _pinned(plan: Plan) -> Iterator[str]:
    pin, least = plan.policy.pin, plan.cut(plan.min_cut).after if plan.min_cut else 0
    if pin not in (None, "local"):
        cut = plan.cut(str(pin))
        if plan.private and not keeps_private(cut, least):
            yield f"policy.pin is {pin}, but the plan is private and {_why_not_private(cut, least)}"
        elif plan.min_cut is None and not plan.stages and cut in _never_audited(plan):
            yield (
                f"policy.pin is {pin}, but the plan is private and {pin} was never audited: run skerry split --private, or "
                "declare by min_cut that what leaves there may be seen"
            )
        elif not fits(plan, cut):
            yield f"policy.pin is {pin}, which needs {cut.memory_mb:g} MiB, and the device has {plan.memory_mb:g}"
        elif cut.codings and not any(answerable(plan, coding) for coding in cut.codings):
            yield f"policy.pin is {pin}, but an answer of {plan.reply_bytes:,} bytes is larger than a message"
        elif not any(coding.admitted for coding in cut.codings):
            yield f"policy.pin is {pin}, but none of its codings is admitted, so the device would stay local"


def _never_audited(plan: Plan) -> list[Cut]:
    """Return the cuts that a private plan uses though no audit looked at them: `private` or `min_cut` came by hand."""
    used = {cut.name for cut, coding in admitted(plan) if coding is not None and cut.leak is None}
    return [cut for cut in plan.cuts if plan.private and cut.name in used]


def _why_not_private(cut: Cut, least: int) -> str:
    if cut.raw or cut.name == "input":
        return "the input itself leaves there"
    if cut.leak is not None and cut.leak.verdict != "private":
        return f"the audit calls it {cut.leak.verdict}"
    return f"it lies before the minimum cut (segment {least})"


def _flow(plan: Plan) -> Iterator[str]:
    """The tensors of every cut must be those that live on after its segments."""
    known = {tensor.name for tensor in plan.inputs}
    for after in range(len(plan.segments) + 1):
        wanted = {name for segment in plan.segments[after:] for name in segment.inputs}
        wanted |= {tensor.name for tensor in plan.outputs}
        later = {name for segment in plan.segments[after:] for name in segment.outputs}
        for cut in plan.cuts:
            if cut.after != after or cut.name == "local":
                continue
            named = {tensor.name for tensor in cut.tensors}
            for name in sorted(named - known):
                yield f"cut {cut.name} names the tensor {name!r}, which no segment before it gives"
            for name in sorted((wanted & known) - later - named):
                yield f"cut {cut.name} lacks the tensor {name!r}, which a segment behind it needs"
            for coding in cut.codings:
                if coding.kind in CODED_KINDS and len(coding.scales) != len(cut.tensors):
                    yield f"cut {cut.name}: the coding {coding.name} has {len(coding.scales)} scales for {len(named)} tensors"
        if after < len(plan.segments):
            known |= set(plan.segments[after].outputs)


def _files(plan: Plan, folder: Path) -> Iterator[str]:
    pieces = [(one.file, one.sha256) for one in plan.segments]
    pieces += [(one.file, one.sha256) for one in plan.parts]
    pieces += [(plan.shared.file, plan.shared.sha256)] if plan.shared else []
    pieces += [(plan.small.file, plan.small.sha256)] if plan.small else []
    for name, right in dict.fromkeys(pieces):
        if not (folder / name).is_file():
            yield f"{name} is missing from {folder}"
        elif (found := sha256_file(folder / name)) != right:
            yield f"{name} has sha256 {found[:12]}…, the plan says {right[:12]}…"


def _pieces(plan: Plan, folder: Path) -> Iterator[str]:
    """Every segment, and the small model, must load and have the ends that the plan names."""
    if plan.small is not None:
        for what, named, wanted in (
            ("inputs", plan.small.inputs, plan.inputs),
            ("outputs", plan.small.outputs, plan.outputs),
        ):
            if len(named) != len(wanted):
                yield f"small names {len(named)} {what}, the plan has {len(wanted)}"
    pieces: tuple[Segment | Small, ...] = plan.segments if plan.small is None else (*plan.segments, plan.small)
    for segment in pieces:
        try:
            session = ort.session(folder / segment.file)
        except SkerryError as error:
            yield f"{segment.file} does not load: {error}"
            continue
        for what, ports, named in (
            ("input", session.inputs, segment.inputs),
            ("output", session.outputs, segment.outputs),
        ):
            found = {port.name for port in ports}
            for name in sorted(set(named) - found):
                yield f"{segment.file} has no {what} {name!r}, it has {', '.join(sorted(found))}"


def _model(plan: Plan, folder: Path, model: Path, *, whole: bool) -> Iterator[str]:
    found = sha256_file(model)
    if found != plan.model_sha256:
        yield f"the plan was made from a model with sha256 {plan.model_sha256[:12]}…, {model.name} has {found[:12]}…"
        return
    if whole:
        yield from _answers(plan, folder, model)


def _answers(plan: Plan, folder: Path, model: Path) -> Iterator[str]:
    """The segments in a row must answer as the model does, on one random input."""
    import numpy as np

    from cloud.split.inputs import read_model

    try:
        feeds, right = _example(plan, ort.session(read_model(model)[0], beside=model.parent))
    except SkerryError as error:
        yield f"{model.name} does not run, so the segments' answers cannot be held against its own: {error}"
        return
    try:
        chain = ort.chain([folder / one.file for one in plan.segments], [live.name for live in plan.outputs])
        answers = chain.run(feeds)
    except SkerryError as error:
        yield f"the segments do not run: {error}"
        return
    for name, array in right.items():
        gap = float(np.abs(np.asarray(answers[name], np.float64) - np.asarray(array, np.float64)).max(initial=0.0))
        if not gap <= TOLERANCE * max(1.0, float(np.abs(array).max(initial=0.0))):
            yield f"the segments' output {name!r} differs from the model's by {gap:.2g}"


def _example(plan: Plan, whole: ort.Session) -> "tuple[Arrays, Arrays]":
    """Return a random input and the model's answer to it; where sizes are free, of the first of `SIZES` that it takes.

    Raises:
        FormatError: it takes none.
    """
    import numpy as np

    from skills.codec import DTYPES

    chance, refused = np.random.default_rng(0), FormatError("the model takes no size")
    for size in SIZES:
        feeds = {}
        for live in plan.inputs:
            shape = [(size if axis else 1) if said == -1 else said for axis, said in enumerate(live.shape)]
            kind = np.dtype(DTYPES[live.dtype])
            feeds[live.name] = (chance.random(shape) if kind.kind == "f" else chance.integers(0, 2, shape)).astype(kind)
        try:
            return feeds, whole.run(feeds)
        except FormatError as error:
            refused = error
    raise refused


def _as_made(plan: Plan, report: Path) -> Iterator[str]:
    """What the tail knows the plan by must be as it was measured; report.json remembers it."""
    try:
        made = json.loads(read_bytes(report, "the report", MAX_REPORT_BYTES)).get("plan")
    except (SkerryError, ValueError, AttributeError):
        return
    if made and made != plan_hash(plan):
        yield (
            f"a segment, tensor or coding was edited: the plan's hash is {plan_hash(plan)}, it was measured as {made}; "
            "tails that have the measured plan refuse this one"
        )


def unaudited(plan: Plan) -> Iterator[str]:
    """A missing audit says nothing about what can be rebuilt; only a person's own word then lets a cut be used."""
    kept = [cut.name for cut in plan.cuts if plan.stages and plan.private and cut.leak and not cut.leak.inputs]
    if kept:
        yield (
            f"messages between stages are never audited, so {', '.join(kept)} {'does' if len(kept) == 1 else 'do'} not count "
            "as private and all stages stay on the device: skerry split stages --private --min-cut CUT declares that what "
            "leaves from there on may be seen"
        )
    names = [cut.name for cut in _never_audited(plan)]
    if not names:
        return
    fact = f"{', '.join(names)} {'was' if len(names) == 1 else 'were'} never audited"
    if plan.stages:
        yield f"{fact}, and messages between stages never are: whether the input can be rebuilt from them is not known"
    elif plan.min_cut:
        yield f"{fact}: that the input cannot be rebuilt there is the word of min_cut alone; skerry split --private measures it"
    else:
        yield f"{fact}: run skerry split --private, which finds out whether the input can be rebuilt from what leaves there"


def _remarks(plan: Plan) -> Iterator[str]:
    yield from unaudited(plan)
    on_network, slo_ms = judge(plan, plan.network), plan.policy.slo_ms
    if slo_ms is not None and on_network.ms > slo_ms:
        what = (
            f"the pinned {plan.policy.pin}" if plan.policy.pin == on_network.cut else f"the fastest ({on_network.cut})"
        )
        yield (
            f"nothing keeps policy.slo_ms of {slo_ms:g} ms on {plan.network}: {what} takes {readable_ms(on_network.ms)}, "
            "and is used all the same"
        )
    for verdict in plan.verdicts:
        now = judge(plan, verdict.link)
        if (now.cut, now.coding) != (verdict.cut, verdict.coding):
            yield f"on {verdict.link} it is now {_short(now)}; the verdict in the file is {_short(verdict)}"
    for cut in plan.cuts:
        for coding in cut.codings:
            if coding.admitted and coding.drop > plan.max_drop:
                yield (
                    f"cut {cut.name}: the coding {coding.name} is admitted, though its drop of {coding.drop:g} points is over "
                    f"the budget of {plan.max_drop:g}"
                )
            if coding.admitted and not answerable(plan, coding):
                yield (
                    f"cut {cut.name}: the coding {coding.name} is never used, for an answer of {plan.reply_bytes:,} bytes is "
                    "larger than a message and it has no reply that is not"
                )
    if not fits(plan, plan.cut("local")):
        yield (
            f"all segments together need {plan.cut('local').memory_mb:g} MiB, the device has {plan.memory_mb:g}: "
            "while the tail is away it loads those behind the cut one after the other, which is slow"
        )


def _short(verdict: Verdict) -> str:
    return f"{verdict.cut}{f' ({verdict.coding})' if verdict.coding else ''}, {readable_ms(verdict.ms)}"
