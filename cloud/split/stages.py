"""Task split: which stages of a skill run on the device, and which in the cloud. A stage is a segment to the same planner.

Placements are contiguous: the first stages here, the rest there. What goes from one stage to the next is a message of
typed arrays; each is measured in every coding, and judged by what the whole skill answers, as the tensors of a cut are.
The table says what a placement would cost. A skill that names the plan as its `placement` is run by it: the tail has the
code, models and assets of its stages by their hashes in the plan, which the publisher signed with the rest of the release.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud.split.export import commented
from cloud.split.memory import measured_mb
from cloud.split.plan import asked_policy, check_limits
from cloud.split.profile import gated, measure, measure_coding, possible_codings, scorer
from cloud.split.verdict import LINKS, judge
from edge_agent.worker import CallableModel
from skills.bundle import read_text
from skills.codec import DTYPES
from skills.coding import Image, Live
from skills.errors import FormatError, NotFound, Refused, UsageError
from skills.files import sha256_file, write_atomic
from skills.manifest import Skill, Tensor, Variant, load_skill
from skills.network import ASSUMED, Link
from skills.split import Estimate, choose_cut
from skills.split_plan import Cut, Leak, Millis, Plan, Segment, StageAt, StagePart
from skills.stages import RUNTIME, StageChain, load_stage
from skills.timer import Dilated, Local, Timer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

MOST_SAMPLES = 64


def plan_stages(
    folder: Path,
    data: "Path | Arrays | None",
    *,
    slowdown: float = 10.0,
    links: Sequence[Link] = LINKS,
    network: Link = ASSUMED,
    private: bool = False,
    min_cut: str | None = None,
    max_drop: float = 1.0,
    objective: str = "latency",
    slo_ms: float | None = None,
    memory_mb: float | None = None,
    rounds: int = 20,
    out: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, of: None,
) -> Plan:
    """Return the plan of a skill's stages, its cuts between them; with `out` also write it there.

    `data` holds the skill's inputs by name; without it its probe's are taken. Nobody audits what a message gives away of the
    input, so with `private` none leaves, but those behind `min_cut` (c1: the first stage's): that is its writer's own word.
    `max_drop`, `objective` and `slo_ms` mean what they mean to `split`. The device keeps the models of all stages loaded,
    wherever a request goes: so `memory_mb` is held against all of them, and every cut weighs the same.

    Raises:
        NotFound, FormatError: the skill or the data is missing or not what it should be.
        UsageError: the skill has one stage only, a value is out of range, or there is no cut `min_cut`.
        Refused: the models of all stages need more than `memory_mb`, or that cannot be told.
    """
    check_limits(slowdown, max_drop, links)
    policy = asked_policy(objective, slo_ms)
    skill = load_skill(read_text(folder / "skill.yaml", "the skill"), str(folder / "skill.yaml"))
    if len(skill.stages) < 2:
        raise UsageError(f"{skill.name} has one stage: there is nothing to place; skerry split cuts its model")
    names = ["input", *(f"c{after}" for after in range(1, len(skill.stages)))]
    if min_cut is not None and (not private or min_cut not in names[1:]):
        raise UsageError(f"the minimum cut is {min_cut!r}: with --private, one of {', '.join(names[1:])}")
    unaudited = Leak("inconclusive", "explained variance", 0.0, flat=False) if private and min_cut is None else None
    samples = _samples(skill, folder, data)
    need_mb = 0.0 if memory_mb is None else _needed_mb(skill, folder, memory_mb)
    chain = StageChain(
        tuple(_stage(skill, folder, at) for at in range(len(skill.stages))), tuple(s.name for s in skill.stages)
    )
    device: Timer = Dilated(slowdown) if slowdown > 1 else Local()
    progress("timing stages", 0, 1)
    costs, _ = measure(chain, chain, range(len(skill.stages) + 1), samples, device, rounds)
    progress("timing stages", 1, 1)
    messages = [[chain.run(sample, 0, after) for sample in samples] for after in range(len(skill.stages) + 1)]
    live = [_described(one) for one in messages]
    truths = messages[-1]
    score = scorer(truths, [one.name for one in live[-1]], None)
    reference = [score.mark(truth, truth, None) for truth in truths]
    reply_bytes = sum(int(array.nbytes) for array in truths[0].values())
    cuts = []
    for after in range(len(skill.stages)):
        progress("measuring messages", after, len(skill.stages))
        judged = []
        for one in possible_codings(live[after], after == 0, messages[after]):
            coding, answers = measure_coding(one, live[after], messages[after], _rest(chain, after), device)
            marks = [score.mark(*pair, None) for pair in zip(answers, truths, strict=True)]
            judged.append(gated(coding, reference, marks, max_drop, reply_bytes))
        cuts.append(
            Cut(
                names[after], after, costs[after].device, costs[after].tail, live[after], tuple(judged), raw=after == 0,
                leak=unaudited if after else None, memory_mb=need_mb,
            )
        )  # fmt: skip
    last = len(skill.stages)
    cuts.append(Cut("local", last, costs[last].device, Millis(0.0, 0.0), memory_mb=need_mb))
    segments = tuple(
        Segment(
            stage.code, sha256_file(folder / stage.code), max((folder / stage.code).stat().st_size, 1),
            tuple(one.name for one in live[at]), tuple(one.name for one in live[at + 1]),
        )
        for at, stage in enumerate(skill.stages)
    )  # fmt: skip
    plan = Plan(
        sha256_file(folder / "skill.yaml"), live[0], live[-1], segments, tuple(cuts), network, float(slowdown), private,
        min_cut, float(max_drop), score.metric, len(samples),
        reply_bytes=reply_bytes, whole=1.0, policy=policy, memory_mb=memory_mb,
    )  # fmt: skip
    placed = choose_cut(plan, Estimate(network.mbit, network.rtt_ms)).cut
    plan = dataclasses.replace(
        plan,
        stages=tuple(
            StageAt(stage.name, "device" if at < placed.after else "cloud", live[at + 1], _file(skill, stage.model))
            for at, stage in enumerate(skill.stages)
        ),
        parts=tuple(
            StagePart(file, sha256_file(folder / file), (folder / file).stat().st_size)
            for file in sorted({*skill.assets, *(_file(skill, stage.model) for stage in skill.stages)})
        ),
        verdicts=tuple(judge(plan, link) for link in links),
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "split.yaml", commented(plan).encode())
    return plan


def _needed_mb(skill: Skill, folder: Path, memory_mb: float) -> float:
    files = dict.fromkeys(folder / _file(skill, stage.model) for stage in skill.stages)
    found = measured_mb(list(files))
    if not found:
        raise Refused(
            f"what the models of {skill.name} take of memory cannot be measured here: give a profile without memory_mb"
        )
    if found[-1] > memory_mb:
        raise Refused(
            f"the models of all stages take {found[-1]:.0f} MiB, and the device has {memory_mb:g}: it keeps them all "
            "loaded, to go on without the tail; a profile with more memory_mb or without it plans all the same"
        )
    return found[-1]


def _rest(chain: StageChain, after: int) -> "Callable[[Arrays], Arrays]":
    return lambda decoded: chain.run(decoded, after)


def _stage(skill: Skill, folder: Path, at: int) -> "Callable[[Arrays], Arrays]":
    stage = skill.stages[at]
    function = load_stage(folder, stage.code, stage.name)
    variant = _variant(skill, stage.model)
    model = CallableModel(variant, folder, Local(), None, 1.0)
    return lambda arrays: function(arrays, model)


def _variant(skill: Skill, model: str) -> Variant:
    for one in skill.models[model].variants:
        if one.runtime == RUNTIME and one.file is not None:
            return one
    raise FormatError(f"model '{model}' has no variant that is a file for {RUNTIME}, so it cannot be timed here")


def _file(skill: Skill, model: str) -> str:
    return str(_variant(skill, model).file)


def _samples(skill: Skill, folder: Path, data: "Path | Arrays | None") -> "list[Arrays]":
    import numpy as np

    source = folder / skill.probe.file if data is None else data
    if isinstance(source, Path):
        if not source.is_file():
            raise NotFound(f"there is no data file {source}")
        with np.load(source, allow_pickle=False) as pack:
            source = {name.removeprefix("in."): pack[name] for name in pack.files if not name.startswith("out.")}
    missing = [tensor.name for tensor in skill.inputs if tensor.name not in source]
    if missing:
        raise FormatError(f"the data has {', '.join(source) or 'nothing'}, {skill.name} needs {missing[0]!r}")
    feeds = {tensor.name: np.asarray(source[tensor.name]) for tensor in skill.inputs}
    for tensor in skill.inputs:
        _check(tensor, feeds[tensor.name])
    if not all(tensor.shape and tensor.shape[0] == -1 for tensor in skill.inputs):
        return [feeds]
    count = min(MOST_SAMPLES, *(len(array) for array in feeds.values()))
    return [{name: array[at : at + 1] for name, array in feeds.items()} for at in range(count)]


def _check(tensor: Tensor, array: "NDArray[Any]") -> None:
    fits = len(array.shape) == len(tensor.shape) and all(
        want in (-1, have) for want, have in zip(tensor.shape, array.shape, strict=True)
    )
    if not fits or DTYPES.get(tensor.dtype) != str(array.dtype) or 0 in array.shape:
        raise FormatError(
            f"the skill's input {tensor.name!r} takes {tensor.dtype} {list(tensor.shape)}, "
            f"the data's is {array.dtype} {list(array.shape)}"
        )


def _described(messages: "Sequence[Arrays]") -> tuple[Live, ...]:
    """Return the types of a message: what all samples have in common; a size that differs among them is free."""
    words = {numpy: word for word, numpy in DTYPES.items()}
    found = []
    for name, first in messages[0].items():
        arrays = [one.get(name) for one in messages]
        kinds = {(str(one.dtype), one.ndim) if one is not None else None for one in arrays}
        if len(kinds) != 1 or str(first.dtype) not in words:
            raise FormatError(
                f"the message part {name!r} is {first.dtype} here and something else there: it has no type"
            )
        sizes = zip(*(one.shape for one in arrays if one is not None), strict=True)
        shape = tuple(size[0] if len(set(size)) == 1 else -1 for size in sizes)
        picture = (
            first.dtype == "uint8" and first.ndim == 4 and first.shape[-1] in (1, 3) and min(first.shape[1:3]) >= 8
        )
        image = Image((0.0,) * first.shape[-1], (1.0,) * first.shape[-1], "NHWC") if picture else None
        found.append(Live(name, words[str(first.dtype)], shape, image))  # type: ignore[arg-type]
    return tuple(found)
