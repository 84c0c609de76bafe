"""The verdict for one link, in words. Pure: a plan in, sentences out."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from skills.split import Choice, Coding, Cut, Estimate, Link, Plan, Verdict, admitted, predict_ms

LINKS = (Link(1, 30), Link(5, 30), Link(20, 30), Link(100, 30))
TIE = 1.03  # below three percent two options are the same


def ever_best(cuts: Sequence[Cut], keep: AbstractSet[str] = frozenset()) -> frozenset[str]:
    """Return the true cuts that are the best split on some link, on a device at half to twice the measured speed."""
    splits = [
        (cut, coding) for cut in cuts if cut.name not in ("local", "input") for coding in cut.codings if coding.admitted
    ]
    found = set(keep)
    for step in range(-14, 31):
        for alpha in (0.5, 1.0, 2.0):
            mbit = 2 ** (step / 3)

            def cost(pair: tuple[Cut, Coding], alpha: float = alpha, mbit: float = mbit) -> float:
                cut, coding = pair
                there = coding.bytes_p50 / mbit / 125 + coding.decode_ms + cut.tail_ms.p50
                return (cut.device_ms.p50 + coding.encode_ms) * alpha + there

            if splits:
                found.add(min(splits, key=cost)[0].name)
    return frozenset(found)


def options(plan: Plan, link: Link, *, every: bool = False) -> tuple[Choice, ...]:
    """Return the options of a link, fastest first; `every` adds those that accuracy or privacy refuses."""
    estimate = Estimate(link.mbit, link.rtt_ms)
    pairs = list(admitted(plan))
    if every:
        pairs = [(cut, coding) for cut in plan.cuts for coding in (cut.codings or (None,))]
    return tuple(
        sorted(
            (Choice(cut, coding, predict_ms(plan, cut, coding, estimate)) for cut, coding in pairs),
            key=lambda one: one.ms,
        )
    )


def judge(plan: Plan, link: Link) -> Verdict:
    """Say what to do on `link`, with its rivals: staying local, the compressed input, the best true split."""
    ranked = options(plan, link)
    best = ranked[0]
    rivals = [
        one
        for one in (_first(ranked, "local"), _first(ranked, "input"), _first(ranked, "split"))
        if one is not None and one != best
    ]
    said = [
        f"{describe(one)} {_needs(one)} {one.ms:.0f} ms" + (" (a tie)" if one.ms < best.ms * TIE else "")
        for one in rivals
    ]
    if plan.private:
        refused = [
            one
            for one in options(plan, link, every=True)
            if one.cut.name == "input" and one.coding and one.coding.admitted
        ]
        if refused and refused[0].ms < best.ms:
            said.append(f"the compressed input would take {refused[0].ms:.0f} ms but may not leave")
    if _first(ranked, "split") is None:
        said.append("no split keeps within the budget")
    text = f"{_order(best)}: {best.ms:.0f} ms" + (f"; {', '.join(said)}" if said else "")
    return Verdict(link, best.cut.name, best.coding.name if best.coding else "", float(f"{best.ms:.4g}"), text)


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


def _needs(choice: Choice) -> str:
    return "takes" if choice.coding is None or choice.cut.name == "input" else "needs"


def _input_word(coding: Coding) -> str:
    return {"jpeg": f"JPEG (q{coding.quality})", "png": "PNG", "pixels": "raw pixels"}.get(
        coding.kind, f"input ({coding.name})"
    )


def _first(ranked: tuple[Choice, ...], kind: str) -> Choice | None:
    for one in ranked:
        if (one.cut.name if one.cut.name in ("local", "input") else "split") == kind:
            return one
    return None
