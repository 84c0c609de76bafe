"""The plan as a pure function: it always settles, in few steps, and never touches what serves before its successor is ready."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent import plan
from edge_agent.plan import Facts, Installed, Pointer, Refusal, Running
from skills.bundle import Bundle, Part
from skills.desired import ObjectRef, WantedSkill
from skills.manifest import Model, Skill, Stage, Tensor, Variant
from skills.report import SkillState
from skills.resolve import Capabilities

METADATA = ObjectRef("f" * 64, 10)
CAPABLE = Capabilities("x86_64", 64, 100, "0", runtimes={"onnxruntime": "1.31.1"})


def sha(text: str) -> str:
    return (text.encode().hex() + "0" * 64)[:64]


def part(path: str, content: str) -> Part:
    return Part(path, sha(content), 10, sha("wire" + content), 10, (sha("chunk" + content),))


def bundle(version: str, ram_mb: int = 8) -> Bundle:
    tensor = Tensor("x", "FP32", (-1, 4))
    variant = Variant("v", "onnxruntime", "m.onnx", ram_mb=ram_mb)
    skill = Skill("s", version, (tensor,), (tensor,), {"m": Model((variant,))}, (Stage("run", "m", "run.py"),))
    return Bundle(skill, (part("m.onnx", "m" + version), part("run.py", "same"), part("probe.npz", "p" + version)))


BUNDLES = {sha(v): bundle(v) for v in ("1.0.0", "2.0.0", "3.0.0")}


def wanted(version: str) -> WantedSkill:
    return WantedSkill("s", version, f"skills/s/{version}.json", ObjectRef(sha(version), 10))


def installed(version: str) -> Installed:
    return Installed(version, sha(version), f"skills/s/{version}.json", {"m": "v"})


class Device:
    """The smallest thing that does what the plan says; chosen faults happen."""

    def __init__(self, facts: Facts, faults: dict[str, set[str]]) -> None:
        self.facts, self.faults = facts, faults
        self.done: list[plan.Step] = []

    def step(self) -> plan.Step:
        step = plan.next_step(self.facts)
        before = self.facts.pointer.active
        self.apply(step)
        after = self.facts.pointer.active
        if isinstance(step, plan.Stop):
            assert before is None or step.digest != before.manifest, "the serving version was stopped"
        if before != after and not isinstance(step, plan.Activate | plan.Return | plan.Lose | plan.Remove):
            raise AssertionError(f"{step} moved the pointer")
        if isinstance(step, plan.Remove):
            assert self.facts.wanted is None
            assert self.facts.confirmed
        if isinstance(step, plan.Activate):
            assert self.facts.running[step.installed.manifest].probed
            assert self.facts.trusted == ""
        self.done.append(step)
        return step

    def change(self, **more: object) -> None:
        self.facts = dataclasses.replace(self.facts, **more)

    def apply(self, step: plan.Step) -> None:  # noqa: C901 - one case for each step
        facts, pointer = self.facts, self.facts.pointer
        match step:
            case plan.Start(_, version):
                self.change(running={**facts.running, version.manifest: Running()})
            case plan.Return(_, _, reason):
                self.change(pointer=plan.returned(pointer, reason), restarts=0)
            case plan.Lose():
                self.change(pointer=plan.lost(pointer))
            case plan.Settle():
                self.change(pointer=plan.settled(pointer))
            case plan.Stop(_, digest):
                self.change(running={k: v for k, v in facts.running.items() if k != digest})
            case plan.Remove():
                self.change(pointer=Pointer("s"))
            case plan.FetchWhole(_, refs):
                self.change(objects=facts.objects | {ref.sha256 for ref in refs})
            case plan.FetchParts(_, _, parts):
                self.change(objects=facts.objects | {parts[0].sha256})
            case plan.Verify(_, want, _):
                bad = want.manifest.sha256 in self.faults["trust"]
                self.change(trusted="not listed" if bad else "", bundle=BUNDLES.get(want.manifest.sha256))
            case plan.Refuse(_, digest, refusal):
                self.change(pointer=plan.refused(pointer, digest, refusal))
            case plan.Forget(_, digest, metadata):
                self.change(pointer=plan.forgotten(pointer, digest, metadata))
            case plan.Stage(_, digest, _):
                self.change(staged=facts.staged | {digest})
            case plan.Probe(_, digest, _):
                if digest in self.faults["probe"]:
                    self.change(pointer=plan.refused(pointer, digest, Refusal("failed", "off")))
                else:
                    self.change(running={**facts.running, digest: Running(probed=True)})
            case plan.Activate(_, version):
                self.change(pointer=plan.activated(pointer, version), healthy_s=0.0)
            case plan.Wait(_, after_s) if after_s is not None:
                self.change(healthy_s=facts.healthy_s + after_s, rested_s=facts.rested_s + after_s)


versions = st.sampled_from(["1.0.0", "2.0.0", "3.0.0"])
maybe = st.none() | versions
digests = st.frozensets(versions.map(sha))


@st.composite
def devices(draw: st.DrawFn) -> Device:
    active, previous, want = draw(maybe), draw(maybe), draw(maybe)
    if active is None or previous == active:
        previous = None
    rests_on = draw(st.sampled_from(["", METADATA.sha256, "e" * 64]))
    refused = {
        digest: Refusal("failed", "before", rests_on)
        for digest in draw(digests)
        if active is None or digest != sha(active)
    }
    pointer = Pointer(
        "s",
        installed(active) if active else None,
        installed(previous) if previous else None,
        trial=draw(st.booleans()) and active is not None,
        lives=draw(st.integers(0, 4)),
        refused=refused,
    )
    objects = draw(
        st.frozensets(st.sampled_from([p.sha256 for b in BUNDLES.values() for p in b.parts] + list(BUNDLES)))
    )
    trusted = draw(st.sampled_from([None, "", "not listed"]))
    facts = Facts(
        pointer=pointer,
        wanted=wanted(want) if want else None,
        capabilities=draw(st.sampled_from([CAPABLE, dataclasses.replace(CAPABLE, ram_mb=1)])),
        metadata=METADATA,
        fresh=draw(st.booleans()),
        confirmed=draw(st.booleans()),
        objects=objects,
        staged=draw(digests) | ({sha(active)} if active and draw(st.booleans()) else set()),
        bundle=BUNDLES[sha(want)] if want and trusted == "" else None,
        trusted=trusted if want else None,
        running={digest: Running(probed=draw(st.booleans())) for digest in draw(digests)},
        restarts=draw(st.integers(0, 12)),
        rested_s=draw(st.floats(0, 100)),
        healthy_s=draw(st.floats(0, 100)),
    )
    return Device(facts, {"trust": set(draw(digests)), "probe": set(draw(digests))})


@settings(max_examples=400, deadline=None)
@given(devices())
def test_the_plan_always_settles_and_never_removes_what_serves(device: Device) -> None:
    for _ in range(60):
        step = device.step()
        if isinstance(step, plan.Wait) and step.after_s is None:
            break
    else:
        raise AssertionError(f"not settled: {device.done[-6:]}")
    facts = device.facts
    if facts.pointer.active is not None:
        assert facts.pointer.active.manifest in facts.running
    allowed = {
        facts.pointer.active.manifest if facts.pointer.active else "",
        facts.wanted.manifest.sha256 if facts.wanted else "",
    }
    assert set(facts.running) <= allowed


@given(devices())
def test_every_state_can_be_told(device: Device) -> None:
    for _ in range(10):
        for state in plan.describe(device.facts):
            assert isinstance(state, SkillState)
            assert state.phase != "serving" or state.manifest_sha256 in device.facts.running
        device.step()


def test_a_new_version_is_activated_only_after_its_probe_and_the_old_one_stopped_only_after_that() -> None:
    facts = Facts(
        pointer=Pointer("s", installed("1.0.0")),
        wanted=wanted("2.0.0"),
        capabilities=CAPABLE,
        metadata=METADATA,
        fresh=True,
        staged=frozenset([sha("1.0.0")]),
        running={sha("1.0.0"): Running()},
    )
    device = Device(facts, {"trust": set(), "probe": set()})
    names = []
    while not isinstance(step := device.step(), plan.Wait):
        names.append(type(step).__name__)
    assert names == [
        "FetchWhole", "Verify", "FetchParts", "FetchParts", "FetchParts", "Stage", "Probe", "Activate", "Stop",
    ]  # fmt: skip


def test_a_version_on_trial_is_returned_to_only_when_there_is_none_before_it() -> None:
    pointer = plan.activated(plan.activated(Pointer("s"), installed("1.0.0")), installed("2.0.0"))
    assert pointer.previous == installed("1.0.0")
    pointer = plan.activated(pointer, installed("3.0.0"))
    assert pointer.previous == installed("1.0.0")
    assert plan.activated(pointer, installed("1.0.0")).previous is None


def test_what_serves_comes_before_what_is_wanted() -> None:
    facts = Facts(
        pointer=Pointer("s", installed("1.0.0")),
        wanted=wanted("2.0.0"),
        capabilities=CAPABLE,
        metadata=METADATA,
        staged=frozenset([sha("1.0.0")]),
    )
    assert isinstance(plan.next_step(facts), plan.Start)


def refused_facts(refusal: Refusal, **more: object) -> Facts:
    pointer = Pointer("s", refused={sha("2.0.0"): refusal})
    facts = Facts(pointer, wanted("2.0.0"), CAPABLE, METADATA, fresh=True)
    return dataclasses.replace(facts, **more)


def test_a_refusal_that_rests_on_metadata_is_forgotten_when_the_metadata_changes() -> None:
    facts = Facts(Pointer("s"), wanted("2.0.0"), CAPABLE, METADATA, objects=frozenset([METADATA.sha256, sha("2.0.0")]))
    step = plan.next_step(dataclasses.replace(facts, trusted="not listed"))
    assert step == plan.Refuse("s", sha("2.0.0"), Refusal("refused", "not listed", METADATA.sha256))
    facts = refused_facts(step.refusal)
    assert isinstance(plan.next_step(facts), plan.Wait)
    new = ObjectRef("e" * 64, 11)
    step = plan.next_step(dataclasses.replace(facts, metadata=new))
    assert step == plan.Forget("s", sha("2.0.0"), new.sha256)
    assert plan.forgotten(facts.pointer, step.digest, step.metadata) == Pointer("s")


def test_a_failed_probe_is_remembered_whatever_the_metadata() -> None:
    facts = refused_facts(Refusal("failed", "off by 3"), metadata=ObjectRef("e" * 64, 11))
    assert isinstance(plan.next_step(facts), plan.Wait)


def test_a_skill_is_removed_only_when_an_assignment_of_this_boot_was_confirmed() -> None:
    facts = Facts(
        Pointer("s", installed("1.0.0")), None, CAPABLE, METADATA,
        staged=frozenset([sha("1.0.0")]), running={sha("1.0.0"): Running()},
    )  # fmt: skip
    assert plan.next_step(facts) == plan.Wait(plan.UNCONFIRMED)
    assert plan.next_step(dataclasses.replace(facts, confirmed=True)) == plan.Remove("s")


def test_a_skill_larger_than_the_budget_is_refused_with_sizes_as_people_read_them() -> None:
    whole = BUNDLES[sha("1.0.0")]
    big = dataclasses.replace(whole, parts=tuple(dataclasses.replace(one, size=50_000_000) for one in whole.parts))
    facts = Facts(
        pointer=Pointer("s"), wanted=wanted("1.0.0"), capabilities=CAPABLE, metadata=METADATA,
        objects=frozenset([METADATA.sha256, sha("1.0.0")]), trusted="", bundle=big,
    )  # fmt: skip
    (state,) = plan.describe(facts)
    assert (state.phase, state.reason) == ("refused", "needs 150.0 MB of disk, 104.9 MB are offered (disk_mb)")


def test_a_shortage_names_what_is_needed_at_once_and_what_is_there() -> None:
    parts = (dataclasses.replace(part("a", "a"), size=5_000, wire_size=300), part("b", "b"))
    assert plan.shortage(parts, 5_310) == ""
    assert "needs 5.3 kB of free disk, 12 B are there" in plan.shortage(parts, 12)
    assert ", 0 B are there" in plan.shortage(parts, -7)
