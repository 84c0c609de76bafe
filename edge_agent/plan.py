"""What a device does next. Pure: facts in, one step out; whoever does the step looks again and asks again.

For one skill the road is: fetch metadata and manifest → verify → fetch parts → stage → probe → activate. Nothing on it
touches the version that serves before the last step, which moves one pointer. A version that failed is remembered with
its reason and not tried again while the assignment names it; a reason that rests on metadata holds until the metadata changes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from skills.bundle import Bundle, Part, fit, parts_for
from skills.desired import ObjectRef, WantedSkill
from skills.manifest import Name, Version
from skills.report import Phase, Sha256, SkillState
from skills.resolve import Capabilities, Choice, Misfit
from skills.units import readable
from skills.wire import Limits

LIVES_ON_TRIAL = 3
FIRST_RESTART_S = 0.5
LONGEST_RESTART_S = 30.0
UNCONFIRMED = "waits for the controller to confirm that the assignment is current"
MAX_REASON = 2000  # characters of a reason in a report


@dataclasses.dataclass(frozen=True, slots=True)
class Installed:
    """One version on the device, complete and verified."""

    version: Version
    manifest: Sha256
    target: str
    variants: Mapping[str, str] = dataclasses.field(default_factory=dict)
    received_bytes: int = 0
    reused_bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """Why a version will not run here: `refused` = not trusted or not what it claims, `failed` = it did not work.

    `metadata`: SHA-256 of the metadata set that the reason rests on, "" when it rests on the version itself.
    """

    phase: Literal["refused", "failed"]
    reason: str
    metadata: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Pointer:
    """What a skill is on this device (`active/<skill>.json`): the version that serves and the one to return to.

    `lives` counts the starts of a version on trial that did not end in a clean stop. It reaches the disk before each
    start, so that a version that takes the whole device down is counted too.
    """

    skill: Name
    active: Installed | None = None
    previous: Installed | None = None
    trial: bool = False
    lives: Annotated[int, Limits(min=0)] = 0
    refused: Mapping[str, Refusal] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Running:
    """A live worker of one version."""

    probed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """All that is known about one skill at one moment.

    `trusted`: None = not judged yet, "" = both lists name it, else why not. `fresh`: the assignment answers this
    connection's nonce; `confirmed`: one since this boot answered a nonce, and none older is accepted after it. `objects`,
    `staged`: SHA-256 of the verified contents and of the complete versions on the device. `running`: live workers by manifest
    digest. `restarts`: deaths of the serving version's worker since it was last healthy; `rested_s`: seconds since the latest.
    `last_words`: the end of what it wrote. `stalled`: why nothing comes in.
    """

    pointer: Pointer
    wanted: WantedSkill | None
    capabilities: Capabilities
    metadata: ObjectRef | None = None
    fresh: bool = False
    confirmed: bool = False
    objects: frozenset[str] = frozenset()
    staged: frozenset[str] = frozenset()
    bundle: Bundle | None = None
    trusted: str | None = None
    running: Mapping[str, Running] = dataclasses.field(default_factory=dict)
    rested_s: float = 1e9
    healthy_s: float = 0.0
    trial_s: float = 60.0
    restarts: int = 0
    stalled: str = ""
    progress: float = 0.0
    received_bytes: int = 0
    received_part_bytes: int = 0
    last_words: str = ""


# --- steps ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    """Bring the serving version's worker up (after a boot or a death)."""

    skill: str
    installed: Installed


@dataclasses.dataclass(frozen=True, slots=True)
class Return:
    """Give up the version on trial: the previous one serves again."""

    skill: str
    digest: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Lose:
    """The serving version's files are damaged: the previous one serves, and what is wanted is installed again."""

    skill: str


@dataclasses.dataclass(frozen=True, slots=True)
class Settle:
    """The trial is over: the version stays."""

    skill: str


@dataclasses.dataclass(frozen=True, slots=True)
class Stop:
    """End a worker that neither serves nor is on its way to."""

    skill: str
    digest: str


@dataclasses.dataclass(frozen=True, slots=True)
class Remove:
    """The controller no longer wants the skill here."""

    skill: str


@dataclasses.dataclass(frozen=True, slots=True)
class FetchWhole:
    """Get an object of which only hash and size are known: metadata, manifest."""

    skill: str
    refs: tuple[ObjectRef, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class FetchParts:
    """Get the parts that are not on the device yet."""

    skill: str
    digest: str
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Verify:
    """Ask the trust process whether the repository lists the release."""

    skill: str
    wanted: WantedSkill
    metadata: ObjectRef


@dataclasses.dataclass(frozen=True, slots=True)
class Refuse:
    """Remember that this version will not run here, and why."""

    skill: str
    digest: str
    refusal: Refusal


@dataclasses.dataclass(frozen=True, slots=True)
class Forget:
    """The assignment names another version or metadata: drop what was remembered and rests on the old ones."""

    skill: str
    digest: str
    metadata: str


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """Lay the version's folder out from the verified objects."""

    skill: str
    digest: str
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """Start a worker for the staged version and hold its answers against the golden ones."""

    skill: str
    digest: str
    choice: Choice


@dataclasses.dataclass(frozen=True, slots=True)
class Activate:
    """Move the pointer: from here on the version serves."""

    skill: str
    installed: Installed


@dataclasses.dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do before something changes, or before `after_s` seconds have passed."""

    why: str = ""
    after_s: float | None = None


Keep = Start | Return | Lose | Settle | Stop
Install = FetchWhole | FetchParts | Verify | Refuse | Forget | Stage | Probe | Activate
Step = Keep | Install | Remove | Wait


def next_step(facts: Facts) -> Step:
    """Return the one step that brings the skill nearer to what is wanted; what serves comes first."""
    serving = _keep_serving(facts)
    if not isinstance(serving, Wait):
        return serving
    advance = _advance(facts)
    if isinstance(advance, Wait) and serving.after_s is not None:
        return serving  # it has the shorter breath: _advance only ever waits for events
    return advance


def _keep_serving(facts: Facts) -> Step:
    """What the serving version needs, whatever else is wanted."""
    pointer, active = facts.pointer, facts.pointer.active
    for digest in sorted(facts.running):
        wanted = facts.wanted is not None and facts.wanted.manifest.sha256 == digest and digest not in pointer.refused
        if not wanted and (active is None or active.manifest != digest):
            return Stop(pointer.skill, digest)
    if active is None:
        return Wait()
    if active.manifest not in facts.running:
        if active.manifest not in facts.staged:
            return Lose(pointer.skill)
        if pointer.trial and pointer.lives >= LIVES_ON_TRIAL:
            words = f"; its last words: {facts.last_words}" if facts.last_words else ""
            return Return(pointer.skill, active.manifest, f"it died {pointer.lives} times within its trial{words}")
        rest = 0.0 if facts.restarts == 0 else min(FIRST_RESTART_S * 2 ** (facts.restarts - 1), LONGEST_RESTART_S)
        if facts.rested_s < rest:
            return Wait(f"starts again in {rest - facts.rested_s:.1f} s", rest - facts.rested_s)
        return Start(pointer.skill, active)
    if pointer.trial:
        if facts.healthy_s >= facts.trial_s:
            return Settle(pointer.skill)
        return Wait("on trial", facts.trial_s - facts.healthy_s)
    return Wait()


def _advance(facts: Facts) -> Step:
    pointer, wanted = facts.pointer, facts.wanted
    if facts.metadata is None:
        return Wait("no assignment yet")
    if wanted is None:
        if pointer == Pointer(pointer.skill):
            return Wait()
        # An older assignment, replayed to a device that has lost its last one, must not take a skill away.
        return Remove(pointer.skill) if facts.confirmed else Wait(UNCONFIRMED)
    digest = wanted.manifest.sha256
    forget = Forget(pointer.skill, digest, facts.metadata.sha256)
    if forgotten(pointer, forget.digest, forget.metadata) != pointer:
        return forget
    if (pointer.active is not None and pointer.active.manifest == digest) or digest in pointer.refused:
        return Wait()
    refs = tuple(ref for ref in (facts.metadata, wanted.manifest) if ref.sha256 not in facts.objects)
    if refs:
        return FetchWhole(pointer.skill, refs)
    if facts.trusted is None:
        if not facts.fresh:
            return Wait(UNCONFIRMED)
        return Verify(pointer.skill, wanted, facts.metadata)
    if facts.trusted:
        return Refuse(pointer.skill, digest, Refusal("refused", facts.trusted, facts.metadata.sha256))
    return _install(facts, wanted)


def _install(facts: Facts, wanted: WantedSkill) -> Step:
    """The second half of the road: the release is trusted, its manifest is here."""
    pointer, bundle, digest = facts.pointer, facts.bundle, wanted.manifest.sha256
    if bundle is None:
        return Refuse(pointer.skill, digest, Refusal("refused", "its manifest is not a bundle's"))
    if (bundle.skill.name, bundle.skill.version) != (wanted.skill, wanted.version):
        found, said = f"{bundle.skill.name} {bundle.skill.version}", f"{wanted.skill} {wanted.version}"
        reason = f"the manifest is that of {found}, the assignment says {said}"
        return Refuse(pointer.skill, digest, Refusal("refused", reason))
    choice = fit(bundle, facts.capabilities)
    if isinstance(choice, Misfit):
        return Wait(str(choice))  # looked at again whenever the device's capabilities change; reported as refused
    parts = parts_for(bundle, choice)
    if digest not in facts.staged:
        missing = tuple(part for part in parts if part.sha256 not in facts.objects)
        if missing:
            return FetchParts(pointer.skill, digest, missing)
        return Stage(pointer.skill, digest, parts)
    worker = facts.running.get(digest)
    if worker is None or not worker.probed:
        return Probe(pointer.skill, digest, choice)
    installed = Installed(
        version=wanted.version,
        manifest=digest,
        target=wanted.target,
        variants={name: variant.name for name, variant in choice.variants.items()},
        received_bytes=facts.received_bytes,
        reused_bytes=max(sum(part.wire_size for part in parts) - facts.received_part_bytes, 0),
    )
    return Activate(pointer.skill, installed)


def shortage(missing: tuple[Part, ...], room: int) -> str:
    """Return why parts cannot be fetched into `room` bytes of free disk, "" when they fit."""
    # The wire form of one part at a time lies beside its content, and goes when the content is whole.
    need = sum(part.size for part in missing) + max((part.wire_size for part in missing), default=0)
    if need <= room:
        return ""
    return f"needs {readable(need)} of free disk, {readable(max(room, 0))} are there: tried again until there is room"


# --- what is told about it ------------------------------------------------------------------------


def describe(facts: Facts) -> tuple[SkillState, ...]:
    """Return what the device reports of a skill: the version that serves and the one that is wanted."""
    pointer, wanted, active = facts.pointer, facts.wanted, facts.pointer.active
    states = []
    if active is not None:
        up = active.manifest in facts.running
        words = f": {facts.last_words}" if facts.last_words else ""
        states.append(
            SkillState(
                skill=pointer.skill,
                version=active.version,
                manifest_sha256=active.manifest,
                phase="serving" if up else "staging",
                reason=f"its worker died and is started again{words}"[:MAX_REASON] if not up and facts.restarts else "",
                variants=active.variants,
                received_bytes=active.received_bytes,
                reused_bytes=active.reused_bytes,
                progress=1.0,
            )
        )
    if wanted is not None and (active is None or wanted.manifest.sha256 != active.manifest):
        phase, reason = _phase(facts, wanted.manifest.sha256)
        states.append(
            SkillState(
                skill=pointer.skill,
                version=wanted.version,
                manifest_sha256=wanted.manifest.sha256,
                phase=phase,
                reason=reason[:MAX_REASON],
                received_bytes=facts.received_bytes,
                progress=round(facts.progress, 3),
            )
        )
    return tuple(states)


def _phase(facts: Facts, digest: str) -> tuple[Phase, str]:
    refusal = facts.pointer.refused.get(digest)
    if refusal is not None:
        return refusal.phase, refusal.reason
    if facts.stalled:
        return "stalled", facts.stalled
    match _advance(facts):
        case Wait(why):
            return ("refused" if facts.trusted == "" else "fetching"), why
        case Stage():
            return "staging", ""
        case Probe() | Activate():
            return "probing", ""
        case _:
            return "fetching", ""


# --- what the steps leave behind ------------------------------------------------------------------


def activated(pointer: Pointer, installed: Installed) -> Pointer:
    """The version serves, on trial; the one before it stays to return to."""
    # A version on trial is worth less than the one before it, and more than nothing.
    before = pointer.previous if pointer.trial and pointer.previous is not None else pointer.active
    if before is not None and before.manifest == installed.manifest:
        before = None
    return dataclasses.replace(pointer, active=installed, previous=before, trial=True, lives=1)


def returned(pointer: Pointer, reason: str) -> Pointer:
    """The version on trial is given up and remembered with the reason."""
    refused = dict(pointer.refused)
    if pointer.active is not None:
        refused[pointer.active.manifest] = Refusal("failed", reason)
    return dataclasses.replace(pointer, active=pointer.previous, previous=None, trial=False, lives=0, refused=refused)


def lost(pointer: Pointer) -> Pointer:
    """The serving version is gone from the disk: nothing is held against it."""
    return dataclasses.replace(pointer, active=pointer.previous, previous=None, trial=False, lives=0)


def settled(pointer: Pointer) -> Pointer:
    """The trial went well."""
    return dataclasses.replace(pointer, trial=False, lives=0)


def refused(pointer: Pointer, digest: str, refusal: Refusal) -> Pointer:
    """The version is remembered as one that will not run here."""
    return dataclasses.replace(pointer, refused={digest: refusal})


def forgotten(pointer: Pointer, wanted: str, metadata: str) -> Pointer:
    """Only what still holds of the version that is wanted now remains; what rested on other metadata does not."""
    kept = {k: v for k, v in pointer.refused.items() if k == wanted and v.metadata in ("", metadata)}
    return dataclasses.replace(pointer, refused=kept)
