"""Which cut a request takes. Pure: facts in, decisions out. docs/splitting.md explains the cost model."""

import dataclasses
import math
from collections.abc import Iterator

from skills.coding import Coding
from skills.network import slow_start_ms
from skills.oip import MAX_MESSAGE_BYTES
from skills.split_plan import Cut, Plan

CALL_BYTES = 600  # headers and parameters of one call and its answer, on the wire
CODED_REPLY_BYTES = 42  # what names a reply's coding, in the call and in its answer


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """What the device knows of its link now."""

    mbit: float
    rtt_ms: float
    up: bool = True
    cold: bool = False  # nothing was sent for a while: TCP starts slowly again
    queue_ms: float = 0.0  # waiting time at the tail


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """A cut, the coding that goes over the wire (None: nothing does), the predicted milliseconds to the answer.

    `reply` is the coding that the answer comes back in; None: raw.
    """

    cut: Cut
    coding: Coding | None
    ms: float
    reply: Coding | None = None


def reply_ms(raw_bytes: int, reply: Coding | None, mbit: float, alpha: float = 1.0) -> float:
    """Return what an answer of `raw_bytes` costs on its way back, raw (None) or in a coding, on a link of `mbit`.

    Without its share of the round trip; `alpha` is how much slower the device decodes now than when it was measured.
    """
    if reply is None:
        return raw_bytes * 8 / (mbit * 1000)
    return (reply.bytes_p50 + CODED_REPLY_BYTES) * 8 / (mbit * 1000) + reply.encode_ms + reply.decode_ms * alpha


def fits_message(answer_bytes: int) -> bool:
    """Return whether a message holds an answer of so many bytes; a larger one never arrives."""
    return answer_bytes + CALL_BYTES <= MAX_MESSAGE_BYTES


def answerable(plan: Plan, coding: Coding) -> bool:
    """Return whether a message holds the answer: raw, or in the reply that was judged together with `coding`."""
    replies = (one.bytes_p95 for one in plan.replies if one.name == coding.reply)
    return fits_message(min((plan.reply_bytes, *replies)))


def predict(plan: Plan, cut: Cut, coding: Coding | None, estimate: Estimate, alpha: float = 1.0) -> Choice:
    """Return an option with its milliseconds from input to answer, and the reply that is best for it.

    T = H + E + RTT + 8(S+600)/B + slow start + queue + G + K + reply + overhead, where the reply costs 8R/B raw or
    8(R+42)/B + encoding + decoding; one that no message holds raw is coded, where it can be. `alpha` is how much slower the
    device runs now than when it was measured.
    """
    head = cut.device_ms.p50 * alpha
    if coding is None:
        return Choice(cut, None, head)
    back, reply = reply_ms(plan.reply_bytes, None, estimate.mbit), None
    for named in plan.replies if coding.reply else ():
        if named.name == coding.reply:
            coded = reply_ms(plan.reply_bytes, named, estimate.mbit, alpha)
            fewer = plan.policy.minimize == "bytes" and named.bytes_p50 + CODED_REPLY_BYTES < plan.reply_bytes
            if coded < back or fewer or not fits_message(plan.reply_bytes):
                back, reply = coded, named
    transfer = (coding.bytes_p50 + CALL_BYTES) * 8 / (estimate.mbit * 1000)
    cold = slow_start_ms(coding.bytes_p50, estimate.mbit, estimate.rtt_ms) if estimate.cold else 0.0
    tail = coding.decode_ms + cut.tail_ms.p50 + estimate.queue_ms
    there = head + coding.encode_ms * alpha + estimate.rtt_ms + transfer + cold + tail
    return Choice(cut, coding, there + back + plan.policy.overhead_ms, reply)


def predict_ms(plan: Plan, cut: Cut, coding: Coding | None, estimate: Estimate, alpha: float = 1.0) -> float:
    """Return the milliseconds that `predict` foresees."""
    return predict(plan, cut, coding, estimate, alpha).ms


def moved_bytes(plan: Plan, choice: Choice) -> int:
    """Return the bytes of tensors that an option moves over the link, there and back (median)."""
    if choice.coding is None:
        return 0
    return choice.coding.bytes_p50 + (choice.reply.bytes_p50 if choice.reply else plan.reply_bytes)


def admitted(plan: Plan, private: bool | None = None) -> Iterator[tuple[Cut, Coding | None]]:
    """Yield every (cut, coding) that accuracy and privacy allow and whose answer a message holds; `local` comes first."""
    private = plan.private if private is None else private or plan.private
    yield plan.cut("local"), None
    least = plan.cut(plan.min_cut).after if private and plan.min_cut else 0
    for cut in plan.cuts:
        if cut.name == "local" or not fits(plan, cut) or (private and not keeps_private(cut, least)):
            continue
        for coding in cut.codings:
            if coding.admitted and answerable(plan, coding):
                yield cut, coding


def keeps_private(cut: Cut, least: int = 0) -> bool:
    """Return whether a cut may be used where the input must not leave: an audit that is there must have said `private`."""
    audited = cut.leak is None or cut.leak.verdict == "private"
    return audited and not cut.raw and cut.name != "input" and cut.after >= least


def fits(plan: Plan, cut: Cut) -> bool:
    """Return whether the device has the memory for its side of a cut."""
    return plan.memory_mb is None or cut.memory_mb <= plan.memory_mb


def resident(plan: Plan) -> int:
    """Return how many segments the device keeps loaded: all, or where they do not fit, what the largest cut that does needs."""
    if fits(plan, plan.cut("local")):
        return len(plan.segments)
    return max((cut.after for cut in plan.cuts if cut.name != "local" and fits(plan, cut)), default=0)


def choose_cut(plan: Plan, estimate: Estimate, *, alpha: float = 1.0, private: bool | None = None) -> Choice:
    """Return the best allowed cut for one request; the first one wins a tie, and a link that is down means `local`.

    With `minimize: bytes` the fewest bytes within `slo_ms` win, and the fastest answer where none is.
    """
    choices = [
        predict(plan, cut, coding, estimate, alpha)
        for cut, coding in admitted(plan, private)
        if coding is None or estimate.up
    ]
    if len(choices) > 1 and not fits(plan, choices[0].cut):
        del choices[0]  # staying local would need more memory than there is
    if plan.policy.pin is not None:
        choices = [choice for choice in choices if choice.cut.name == plan.policy.pin] or choices[:1]
    slo_ms = plan.policy.slo_ms
    if plan.policy.minimize == "bytes" and slo_ms is not None:
        in_time = [choice for choice in choices if choice.ms <= slo_ms]
        if in_time:
            return min(in_time, key=lambda choice: (moved_bytes(plan, choice), choice.ms))
    return min(choices, key=lambda choice: choice.ms)


def _gain(plan: Plan, best: Choice, current: Choice) -> float:
    """Return the share by which `best` is better than `current` in what the plan minimizes; infinity: `current` is too late."""
    slo_ms, moved = plan.policy.slo_ms, moved_bytes(plan, current)
    if plan.policy.minimize == "bytes" and slo_ms is not None and best.ms <= slo_ms:
        if current.ms > slo_ms:
            return math.inf
        if moved != moved_bytes(plan, best):
            return 1 - moved_bytes(plan, best) / moved if moved else 0.0
    return 1 - best.ms / current.ms if current.ms > 0 else 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """The choice in use, since when, and how often in a row another one looked better."""

    choice: Choice
    since_s: float
    better: int = 0


def settle(plan: Plan, held: Held | None, best: Choice, estimate: Estimate, now_s: float, alpha: float = 1.0) -> Held:
    """Hold on to a choice unless the gain is clear: hysteresis and dwell against flapping. A link that is down counts at once."""
    if held is None or plan.policy.pin is not None or (best.coding is None and not estimate.up):
        same = held is not None and held.choice.coding is None
        return Held(best, held.since_s if held is not None and same else now_s)
    current = predict(plan, held.choice.cut, held.choice.coding, estimate, alpha)
    if (best.cut.name, best.coding) == (current.cut.name, current.coding):
        return Held(current, held.since_s)
    gain = _gain(plan, best, current)
    better = held.better + 1 if gain > plan.policy.gain else 0
    clear = gain > plan.policy.gain_at_once or better >= plan.policy.streak
    if clear and now_s - held.since_s >= plan.policy.dwell_s:
        return Held(best, now_s)
    return Held(current, held.since_s, better)
