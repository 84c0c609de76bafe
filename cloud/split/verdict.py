"""The verdict for one link, in words. Pure: a plan in, sentences out."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from skills.coding import Coding
from skills.network import Link
from skills.split import (
    Choice,
    Estimate,
    admitted,
    answerable,
    choose_cut,
    fits,
    keeps_private,
    moved_bytes,
    predict,
    reply_ms,
)
from skills.split_plan import Cut, Plan, Verdict
from skills.units import readable_ms

FEW = 20  # fewer inputs say next to nothing about a share
LINKS = (Link(1, 30), Link(5, 30), Link(20, 30), Link(100, 30))
TIE = 1.03  # below three percent two options are the same


def ever_best(
    cuts: Sequence[Cut], keep: AbstractSet[str] = frozenset(), reply_bytes: int = 0, replies: Sequence[Coding] = ()
) -> frozenset[str]:
    """Return the true cuts that are the best split on some link, on a device at half to twice the measured speed.

    A cut that leaves the device no less to do than staying local (if `local` is among the cuts) is the best on none. An answer
    has `reply_bytes` raw; `replies` are the codings of it that the cuts' codings name.
    """
    splits = [
        (cut, coding)
        for cut in cuts
        if cut.name not in ("local", "input") and not slower_than_local(cut, cuts)
        for coding in cut.codings
        if coding.admitted
    ]
    found = set(keep)
    for step in range(-14, 31):
        for alpha in (0.5, 1.0, 2.0):
            mbit = 2 ** (step / 3)

            def cost(pair: tuple[Cut, Coding], alpha: float = alpha, mbit: float = mbit) -> float:
                cut, coding = pair
                there = coding.bytes_p50 / mbit / 125 + coding.decode_ms + cut.tail_ms.p50
                ways = (None, *(one for one in replies if one.name == coding.reply))
                back = min(reply_ms(reply_bytes, way, mbit, alpha) for way in ways)
                return (cut.device_ms.p50 + coding.encode_ms) * alpha + there + back

            if splits:
                found.add(min(splits, key=cost)[0].name)
    return frozenset(found)


def slower_than_local(cut: Cut, cuts: Sequence[Cut]) -> bool:
    """Return whether the device is busy with its side of a cut for as long as with the whole model: no link makes up for it.

    `cuts` are those that the device has the memory for; where `local` is not among them, nothing is slower than it.
    """
    return any(cut.device_ms.p50 >= other.device_ms.p50 for other in cuts if other.name == "local")


def worth_cutting(
    cuts: Sequence[Cut],
    *,
    reply_bytes: int = 0,
    replies: Sequence[Coding] = (),
    private: bool = False,
    memory_mb: float | None = None,
    least: str | None = None,
) -> frozenset[str]:
    """Return the true cuts that a plan is to have: the best ones of those that the device may use, and `least`.

    Where it may use none, the best of all: they show what is refused, and why. Where staying local is sooner than every one,
    the best are there all the same: the plan may be pinned to them.
    """
    after = next((cut.after for cut in cuts if cut.name == least), 0)
    usable = [
        cut
        for cut in cuts
        if (memory_mb is None or cut.memory_mb <= memory_mb) and (not private or keeps_private(cut, after))
    ]
    keep = frozenset({least} if least is not None and least != "local" else ())
    for among in (usable, _true(usable), _true(cuts)):
        if found := ever_best(among, frozenset(), reply_bytes, replies):
            return found | keep
    return keep


def _true(cuts: Sequence[Cut]) -> list[Cut]:
    return [cut for cut in cuts if cut.name not in ("local", "input")]


def options(plan: Plan, link: Link, *, every: bool = False) -> tuple[Choice, ...]:
    """Return the options of a link, fastest first; `every` adds those that accuracy or privacy refuses."""
    estimate = Estimate(link.mbit, link.rtt_ms)
    pairs = list(admitted(plan))
    if every:
        pairs = [(cut, coding) for cut in plan.cuts for coding in (cut.codings or (None,))]
    return tuple(
        sorted(
            (predict(plan, cut, coding, estimate) for cut, coding in pairs),
            key=lambda one: one.ms,
        )
    )


def judge(plan: Plan, link: Link) -> Verdict:
    """Say what to do on `link`, with its rivals: staying local, the compressed input, the best true split."""
    ranked = options(plan, link)
    best, slo_ms = choose_cut(plan, Estimate(link.mbit, link.rtt_ms)), plan.policy.slo_ms
    roomy = [cut for cut in plan.cuts if fits(plan, cut)]
    sooner = tuple(one for one in ranked if not slower_than_local(one.cut, roomy))
    rivals = [
        one
        for one in (_first(ranked, "local"), _first(ranked, "input"), _first(sooner, "split"))
        if one is not None and one != best
    ]
    said = [f"{describe(one)} {_needs(one)} {readable_ms(one.ms)}{_against(one.ms, best.ms)}" for one in rivals]
    if plan.private:
        refused = [
            one
            for one in options(plan, link, every=True)
            if one.cut.name == "input" and one.coding and one.coding.admitted
        ]
        if refused and refused[0].ms < best.ms:
            said.append(f"the compressed input would take {readable_ms(refused[0].ms)} but may not leave")
    if _first(ranked, "split") is None:
        said.append(_no_split(plan))
    elif _first(sooner, "split") is None:
        said.append("every split takes the device as long as staying local")
    if slo_ms is not None and best.ms > slo_ms:
        said.append(f"nothing keeps the limit of {slo_ms:g} ms")
    size = f", {moved_bytes(plan, best):,} bytes" if plan.policy.minimize == "bytes" else ""
    pinned = " (pinned)" if best.cut.name == plan.policy.pin else ""
    reply = best.reply.name if best.reply else ""
    back = f", the answer comes back as {reply}" if reply else ""
    text = f"{_order(best)}{pinned}{back}: {readable_ms(best.ms)}{size}" + (f"; {', '.join(said)}" if said else "")
    return Verdict(link, best.cut.name, best.coding.name if best.coding else "", float(f"{best.ms:.4g}"), text, reply)


def proof(plan: Plan) -> str:
    """Say on how many inputs the budget was judged, and plainly what that leaves unproven."""
    step, budget = points(float(f"{100 / max(plan.samples, 1):.2g}")), points(plan.max_drop)
    said = f"{plan.metric} on {plan.samples} inputs"
    used = [coding for _, coding in admitted(plan) if coding is not None]
    open_ = [one for one in used if one.drop_ci95 is None or one.drop_ci95[1] > plan.max_drop]
    if not open_:
        return said + (f"; the budget of {budget} is proven on them" if used else "")
    which = "all codings" if len(open_) == len(used) else f"{len(open_)} of {len(used)} codings"
    return f"{said}; for {which} the budget of {budget} is unproven on {plan.samples} inputs (one input is {step})"


def points(count: float) -> str:
    """Return percentage points as a sentence says them."""
    return f"{count:g} point" + ("" if count == 1 else "s")


def refusal(plan: Plan, cut: Cut, coding: Coding | None = None) -> str | None:
    """Say in a word or two why a plan does not use a cut, or not in this coding; None: it may be used."""
    least = plan.cut(plan.min_cut).after if plan.min_cut else 0
    if plan.private and cut.name != "local" and not keeps_private(cut, least):
        if cut.raw or cut.name == "input":
            return "may not leave"
        return "before min_cut" if cut.after < least or cut.leak is None else cut.leak.verdict
    if not fits(plan, cut):
        return f"needs {cut.memory_mb:.0f} MiB"
    ways = cut.codings if coding is None else (coding,)
    if ways and not any(answerable(plan, one) for one in ways):
        return "answer too large"
    return "over the budget" if coding is not None and not coding.admitted else None


def answers(plan: Plan) -> str:
    """Say what an answer weighs on its way back, raw and in the codings that are worth it."""
    ways = [f"{plan.reply_bytes:,} bytes raw", *(f"{one.bytes_p50:,} as {one.name}" for one in plan.replies)]
    return f"an answer comes back in {' or '.join(ways)}" + (", whichever is sooner" if plan.replies else "")


def warning(plan: Plan) -> str | None:
    """Return the sentence that a plan judged on very few inputs needs, else None."""
    if plan.samples >= FEW:
        return None
    return f"only {plan.samples} inputs: too few to judge what a coding loses; give at least {FEW}, better 500"


def unsized(plan: Plan) -> str | None:
    """Return the sentence that a plan of a model needs whose inputs have a free size besides the batch, else None."""
    names = [repr(live.name) for live in plan.inputs if -1 in live.shape[1:]]
    if plan.stages or not names:
        return None
    figures = "times, bytes, scales, drops and the audit" if plan.private else "times, bytes, scales and drops"
    return (
        f"the model leaves sizes of {', '.join(names)} free: the plan answers every size that it takes, but its {figures} are "
        "those of the sizes in the data"
    )


def describe(choice: Choice) -> str:
    """Name an option as a person would."""
    if choice.coding is None:
        return "staying local"
    if choice.cut.name == "input":
        return f"sending the {_input_word(choice.coding)}"
    return f"the best split ({choice.cut.name}, {choice.coding.name})"


def _order(choice: Choice) -> str:
    if choice.coding is None:
        return "stay local"
    if choice.cut.name == "input":
        return f"send the {_input_word(choice.coding)}"
    return (
        f"split at {choice.cut.name} ({', '.join(tensor.name for tensor in choice.cut.tensors)}; {choice.coding.name})"
    )


def _against(ms: float, best_ms: float) -> str:
    """Say that two options are the same, or that the rival is sooner: a pin, or fewer bytes, stands above its time."""
    if max(ms, best_ms) < min(ms, best_ms) * TIE:
        return " (a tie)"
    return f" ({readable_ms(best_ms - ms)} sooner)" if ms < best_ms else ""


def _needs(choice: Choice) -> str:
    return "takes" if choice.coding is None or choice.cut.name == "input" else "needs"


def _input_word(coding: Coding) -> str:
    return {"jpeg": f"JPEG (q{coding.quality})", "png": "PNG", "pixels": "raw pixels"}.get(
        coding.kind, f"input ({coding.name})"
    )


def _no_split(plan: Plan) -> str:
    """Say why no true cut is among the options."""
    true = [cut for cut in plan.cuts if cut.name not in ("local", "input")]
    every = [coding for cut in true for coding in cut.codings]
    accurate = [cut for cut in true if any(coding.admitted for coding in cut.codings)]
    if accurate and plan.private and all(cut.leak is not None and cut.leak.verdict != "private" for cut in accurate):
        return "no split was shown to keep the input private"
    if accurate and not any(fits(plan, cut) for cut in accurate):
        return f"no split fits into {plan.memory_mb:g} MiB"
    if every and not any(answerable(plan, coding) for coding in every):
        return f"an answer of {plan.reply_bytes:,} bytes is larger than a message"
    return "no split keeps within the budget" if true else "the model has no place to cut it"


def _first(ranked: tuple[Choice, ...], kind: str) -> Choice | None:
    for one in ranked:
        if (one.cut.name if one.cut.name in ("local", "input") else "split") == kind:
            return one
    return None
