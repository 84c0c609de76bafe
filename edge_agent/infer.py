"""A split model on the device: head here, tail in the cloud, and on here when the cloud is late.

While a request is away the device still holds the tensors that it sent. If no reply has come when the time left is just
what the remaining segments need, they run here; the first to finish wins. So an outage costs time, never an answer.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edge_agent.tail_client import LinkClient, Reply, Tail
from skills import codec, ort
from skills.coding import Coding, Live
from skills.confidence import confidence
from skills.errors import FormatError, NotFound
from skills.files import read_bytes
from skills.plain import uncoded
from skills.split import Choice, Estimate, Held, choose_cut, resident, settle
from skills.split_plan import MAX_PLAN_BYTES, Plan, load_plan, plan_hash
from skills.stages import StageChain, check_stages, fitted
from skills.timer import Halt, Halted, Local, Timed, Timer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

WAIT_S = 0.25  # how long an answer may stay away before the device goes on by itself
MARGIN_S = 0.005
MARGIN_SHARE = 0.15  # of the rest's time: what has not run for a while is slower at first
MAX_REASON = 200  # characters of a sentence that names what a tail sent
REFUSED_S = 60.0  # a tail that does not know the plan is not asked again for this long
LOADING_S = 1.0  # and one that loads it, for this long
LEAST_PART = 0.2  # of the whole model's time that a part must take to say how fast the device is
PATIENCE = 1.5  # without a deadline that staying local could meet: how much longer than predicted to wait


@dataclasses.dataclass(frozen=True, slots=True)
class Ran:
    """Where the last answer came from: all here, head here and tail there, all there, or begun there and finished here."""

    where: Literal["local", "split", "cloud", "continued"]
    cut: str
    coding: str
    ms: float
    bytes: int
    predicted_ms: float
    reason: str = ""


class SplitModel:
    """Callable as `model(x=array) -> outputs by name`; `last` says where it ran. One request at a time.

    `plan_folder` holds split.yaml and its segments; with `stages` it is a plan of these stages of a skill. Without a link
    it runs everything here. `wait_s` caps how long an
    answer from the tail is waited for; `deadline_s` (of every request: without it the plan's `slo_ms`; or per call) makes
    the device go on earlier, as soon as waiting longer would make it late.

    Raises (on construction):
        NotFound, FormatError: the plan or a segment is missing or damaged.
    """

    def __init__(
        self,
        plan_folder: Path,
        *,
        timer: Timer | None = None,
        link: Path | Tail | None = None,
        deadline_s: float | None = None,
        wait_s: float = WAIT_S,
        private: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        stages: StageChain | None = None,
    ) -> None:
        plan = _read_plan(plan_folder)
        if stages is not None:
            check_stages(plan)
            if stages.names != tuple(stage.name for stage in plan.stages):
                raise FormatError(f"split.yaml places other stages than {', '.join(stages.names)}")
        elif plan.stages:
            raise FormatError("split.yaml is a plan of a skill's stages: name it as the skill's placement")
        self._hash, self._stock = plan_hash(plan), plan.policy.tail == "stock"
        self.plan = self._planned = uncoded(plan) if self._stock else plan
        self._staged, self._resident = stages is not None, resident(plan)
        self._chain: ort.Chain | StageChain = stages or ort.chain(
            [plan_folder / one.file for one in plan.segments],
            [live.name for live in plan.outputs],
            resident=self._resident,
        )
        self._small = None if self.plan.small is None else ort.session(plan_folder / self.plan.small.file)
        self.sure = 1.0  # how sure the last answer of a small model was; 1 where none was asked
        self.timer: Timer = timer or Local()
        self.tail: Tail | None = LinkClient(link) if isinstance(link, Path) else link
        slo_s = None if plan.policy.slo_ms is None else plan.policy.slo_ms / 1e3
        self._deadline_s = slo_s if deadline_s is None else deadline_s
        self._wait_s, self._private, self._clock = wait_s, private, clock
        self._held: Held | None = None
        self._alpha, self._learnt = 1.0, 0
        self._refused_until_s, self._refusal = float("-inf"), ""
        self.last, self._away = Ran("local", "local", "", 0.0, 0, 0.0), ""
        self._warm()
        if self.tail is not None:
            self.tail.prepare(self._hash)

    def __call__(self, **inputs: "NDArray[Any]") -> "Arrays":
        """Answer one request; see `answer`."""
        return self.answer(inputs)

    def answer(self, inputs: "Arrays", deadline_s: float | None = None) -> "Arrays":
        """Answer one request; of `deadline_s` and the model's the sooner counts.

        Raises:
            FormatError: an input is missing or does not fit the model.
        """
        start = self._clock()
        deadline_s = min((one for one in (deadline_s, self._deadline_s) if one is not None), default=None)
        choice, reason = self._choose(start)
        self._away = reason
        if self._small is not None and self.plan.small is not None:
            return self._joint(start, choice, reason, inputs, deadline_s)
        if choice.coding is None or self.tail is None:
            return self._done(start, choice, "local", 0, self._local(inputs, choice), reason)
        return self._remote(start, choice, inputs, deadline_s)

    def use(self, cut: str | None, coding: Coding | None = None) -> None:
        """Pin a cut (and one of its codings) while the tail answers, or choose freely again with None; for measuring."""
        plan = self._planned
        if cut is not None:
            pinned = plan.cut(cut)
            pinned = dataclasses.replace(pinned, codings=(coding,)) if coding is not None else pinned
            cuts = tuple(pinned if one.name == cut else one for one in plan.cuts)
            plan = dataclasses.replace(plan, cuts=cuts, policy=dataclasses.replace(plan.policy, pin=cut))
        self.plan, self._held = plan, None

    @property
    def away(self) -> str | None:
        """Why the last request could not ask the tail, "" when it could; None where that is open: no link, no reply in time."""
        return None if self.tail is None or self.last.where == "continued" else self._away

    def close(self) -> None:
        """Let go of the link."""
        if self.tail is not None:
            self.tail.close()

    def _warm(self) -> None:
        """Run every segment and every coding once on noughts: the first real request must not pay for lazy set-up."""
        feeds = _noughts(self.plan.inputs)
        with contextlib.suppress(FormatError):  # a free size that may not be one: then the first request warms
            for cut in self.plan.cuts:
                if cut.after > self._resident:
                    continue
                values = _noughts(cut.tensors)  # of stages, whose code may refuse them: the probe warms it
                if not self._staged:
                    values = self._chain.run(feeds, 0, cut.after) if cut.after else feeds
                for coding in cut.codings:
                    codec.encode(coding, cut.tensors, values)
                for reply in self.plan.replies if cut.name == "local" else ():
                    codec.decode(reply, self.plan.outputs, codec.encode(reply, self.plan.outputs, values))

    def _choose(self, now_s: float) -> tuple[Choice, str]:
        estimate, reason = self._estimate(now_s)
        best = choose_cut(self.plan, estimate, alpha=self._alpha, private=self._private)
        self._held = settle(self.plan, self._held, best, estimate, now_s, self._alpha)
        return self._held.choice, reason

    def _estimate(self, now_s: float) -> tuple[Estimate, str]:
        assumed = self.plan.network
        if self.tail is None:
            return Estimate(assumed.mbit, assumed.rtt_ms, up=False), "no link"
        found = self.tail.estimate()
        refused = now_s < self._refused_until_s
        reason = self._refusal if refused else "" if found.up else "the tail does not answer"
        # Unmeasured is not slow: until the first transfer the plan's assumption stands.
        return dataclasses.replace(
            found,
            mbit=found.mbit or assumed.mbit,
            rtt_ms=found.rtt_ms if found.mbit or found.rtt_ms else assumed.rtt_ms,
            up=found.up and not refused,
        ), reason

    def _remote(
        self, start: float, choice: Choice, inputs: "Arrays", deadline_s: float | None, mine: "Arrays | None" = None
    ) -> "Arrays":
        tail, cut, coding = self.tail, choice.cut, choice.coding
        if tail is None or coding is None:
            raise FormatError("a remote request needs a tail and a coding")
        head = self.timer.run(lambda: self._head(inputs, choice))
        values, frame, why = head.value
        self._learn(head.ms, cut.device_ms.p50 + coding.encode_ms)
        if frame is None:
            return self._go_on(start, choice, values, 0, why, None, mine)
        sent = self._clock()
        patience = self._patience_s(start, sent, choice, deadline_s, mine is not None)
        until_s = patience + self._rest_s(choice) + 0.05
        if self._stock:
            arrays = {live.name: values[live.name] for live in cut.tensors}
            size = sum(array.nbytes for array in arrays.values())
            request = tail.send_plain(self._hash, cut.name, arrays, until_s, cut.tail_ms.p50)
        else:
            size = len(frame)
            said = choice.reply.name if choice.reply else ""
            request = tail.send(self._hash, cut.name, coding.name, frame, until_s, said)
        reply = self._look(request, patience, choice)
        if reply is None:
            return self._go_on(start, choice, values, size, f"no answer within {patience * 1e3:.0f} ms", request, mine)
        if reply.outputs is not None:
            return self._done(start, choice, "cloud" if cut.name == "input" else "split", size, reply.outputs, "")
        return self._go_on(start, choice, values, size, reply.error, None, mine)

    def _joint(self, start: float, choice: Choice, reason: str, inputs: "Arrays", deadline_s: float | None) -> "Arrays":
        """Ask the small model; where it is not sure, the big one, with the small one's answer in hand.

        While the tail is away, or where the big model would be late here, the small model's answer counts, with `sure`
        beside it: it may be all that the device is fast enough for.
        """
        small, session = self.plan.small, self._small
        if small is None or session is None:
            raise FormatError("the plan has no small model")
        pairs = zip(self.plan.inputs, small.inputs, strict=True)
        renamed = {name: codec.fitting(live, inputs) for live, name in pairs}
        found = self.timer.run(lambda: session.run(renamed)).value
        mine = {live.name: found[name] for live, name in zip(self.plan.outputs, small.outputs, strict=True)}
        scores = found[small.outputs[0]]
        rows = scores if small.scores == "classes" and scores.ndim > 1 else scores[None]
        self.sure = min((confidence(row, small.scores, small.temperature) for row in rows), default=0.0)
        if self.sure >= small.threshold:
            return self._done(start, dataclasses.replace(choice, cut=self.plan.cut("local"), coding=None), "local", 0, mine,
                              f"the small model is {self.sure:.0%} sure")  # fmt: skip
        if choice.coding is None or self.tail is None:
            if not reason and self._resident < len(self.plan.segments):
                reason = "the big one does not fit into this device's memory"
            if not reason and deadline_s is not None and start + deadline_s - self._clock() < choice.ms / 1e3:
                reason = f"the big one takes {choice.ms:.0f} ms here"
            if not reason:  # the tail is there, but the device is the better place: so the big model runs here
                return self._done(start, choice, "local", 0, self._local(inputs, choice), "")
            said = f"the small model is only {self.sure:.0%} sure, and {reason}"
            return self._done(start, choice, "local", 0, mine, said)
        return self._remote(start, choice, inputs, deadline_s, mine)

    def _head(self, inputs: "Arrays", choice: Choice) -> tuple["Arrays", bytes | None, str]:
        values = self._chain.run(inputs, 0, choice.cut.after) if choice.cut.after else dict(inputs)
        if choice.coding is None:
            return values, None, ""
        try:
            if self._staged:
                values = fitted(choice.cut.tensors, values, "the message")
            if self._stock:
                return {**values, **codec.whole(choice.cut.tensors, values)}, b"", ""
            return values, codec.encode(choice.coding, choice.cut.tensors, values), ""
        except FormatError as error:
            return values, None, str(error)  # what runs here may take it, or says what is wrong

    def _go_on(
        self,
        start: float,
        choice: Choice,
        values: "Arrays",
        size: int,
        reason: str,
        request: int | None,
        mine: "Arrays | None" = None,
    ) -> "Arrays":
        """Run the remaining segments here, until the reply comes after all: the first to finish wins.

        Where a small model's answer (`mine`) is in hand, that is the answer.
        """
        if mine is not None:
            if request is not None and self.tail is not None:
                self.tail.cancel(request, late=True)
            return self._done(
                start, choice, "continued", size, mine, f"{reason}; the small model is {self.sure:.0%} sure"
            )
        at, last, took_ms = choice.cut.after, len(self.plan.segments), 0.0
        if request is not None and self.tail is not None:
            halt = Halt()
            with self.tail.watch(request, halt) as arrived, contextlib.suppress(Halted):
                while at < last and not arrived():
                    timed = self._run(values, at, at + 1, halt)
                    values, took_ms, at = timed.value, took_ms + timed.ms, at + 1
            reply = self._look(request, 0, choice)
            if reply is not None and reply.outputs is not None and at < last:
                where = "cloud" if choice.cut.name == "input" else "split"
                return self._done(start, choice, where, size, reply.outputs, f"late: {reason}")
            if reply is None:
                self.tail.cancel(request, late=True)
        if at < last:  # the answer came and was none
            timed = self._run(values, at, last)
            values, took_ms = timed.value, took_ms + timed.ms
        if self._resident == last:
            self._learn(took_ms, self.plan.cut("local").device_ms.p50 - choice.cut.device_ms.p50)
        return self._done(start, choice, "continued", size, values, reason)

    def _run(self, values: "Arrays", first: int, stop: int, halt: Halt | None = None) -> "Timed[Arrays]":
        return self.timer.run(lambda: self._chain.run(values, first, stop, halt=halt), halt)

    def _local(self, inputs: "Arrays", choice: Choice) -> "Arrays":
        """Run the whole model here."""
        timed = self._run(inputs, 0, len(self.plan.segments))
        if self._resident == len(self.plan.segments):  # loading says nothing of how fast the device computes
            self._learn(timed.ms, choice.cut.device_ms.p50)
        return timed.value

    def _learn(self, ms: float, expected_ms: float) -> None:
        """Follow how much slower the device runs than when it was measured (heat, other work), ever more slowly.

        What takes no time, or is a small part of the whole, says more of caches than of the device.
        """
        if expected_ms > max(1.0, LEAST_PART * self.plan.cut("local").device_ms.p50):
            self._learnt += 1
            share = max(0.1, 1 / self._learnt)  # the first times are worth more than what a plan says of its making
            self._alpha += (min(max(ms / expected_ms, 0.5 * self._alpha), 2.0 * self._alpha) - self._alpha) * share
            self._alpha = min(max(self._alpha, 0.1), 10.0)

    def _rest_s(self, choice: Choice, *, usual: bool = False) -> float:
        """Return how long the segments behind the cut take here, nine times out of ten or as a rule."""
        whole = self.plan.cut("local").device_ms
        return max(0.0, (whole.p50 if usual else whole.p90) - choice.cut.device_ms.p50) * self._alpha / 1e3

    def _patience_s(
        self, start: float, sent: float, choice: Choice, deadline_s: float | None, answered: bool = False
    ) -> float:
        if deadline_s is None:
            return self._wait_s
        reading_s = choice.reply.decode_ms * self._alpha / 1e3 if choice.reply else 0.0
        spare = start + deadline_s - sent - reading_s - MARGIN_S
        if answered:  # the small model's answer is there: nothing needs to run here after the wait
            return max(0.0, min(self._wait_s, spare))
        if self._rest_s(choice, usual=True) <= deadline_s:
            return max(0.0, min(self._wait_s, spare - self._rest_s(choice) * (1 + MARGIN_SHARE)))
        predicted_s = max(0.0, choice.ms - choice.cut.device_ms.p50 * self._alpha) / 1e3
        return max(0.0, min(self._wait_s, deadline_s, PATIENCE * predicted_s))

    def _look(self, request: int, timeout_s: float, choice: Choice) -> Reply | None:
        """Return the reply as `_read` does, None where none came yet; one that refuses the plan, whenever it comes, rests it."""
        reply = self.tail.wait(request, timeout_s) if self.tail is not None else None
        reply = self._read(reply, choice) if reply is not None else None
        if reply is not None and reply.kind == "invalid":
            self._refused_until_s, self._refusal = self._clock() + REFUSED_S, "the tail refuses this plan"
        elif reply is not None and reply.kind == "loading":
            self._refused_until_s, self._refusal = self._clock() + LOADING_S, "the tail is loading this plan"
        return reply

    def _read(self, reply: Reply, choice: Choice) -> Reply:
        """Return a reply with its outputs decoded and held against the plan, or as invalid; one without outputs as it is."""
        if reply.outputs is None:
            return reply
        outputs, coding = reply.outputs, choice.reply
        if reply.coding:
            if coding is None or coding.name != reply.coding:
                return Reply(
                    None, "invalid", f"the tail's answer is in a coding {reply.coding[:16]!r} that nobody asked for"
                )
            try:
                outputs = self.timer.run(
                    lambda: codec.decode_reply(coding, self.plan.outputs, reply.outputs or {})
                ).value
            except FormatError as error:
                return Reply(None, "invalid", f"the tail's answer: {error}"[:MAX_REASON])
        try:
            if self._staged:
                return Reply(fitted(self.plan.outputs, outputs, "the tail's answer"))
            return Reply({live.name: codec.fitting(live, outputs) for live in self.plan.outputs})
        except FormatError as error:
            return Reply(None, "invalid", (str(error) if self._staged else f"the tail's answer: {error}")[:MAX_REASON])

    def _done(self, start: float, choice: Choice, where: Any, size: int, outputs: "Arrays", reason: str) -> "Arrays":
        coding = choice.coding.name if choice.coding else ""
        self.last = Ran(where, choice.cut.name, coding, (self._clock() - start) * 1e3, size, choice.ms, reason)
        return outputs if self._staged else {live.name: outputs[live.name] for live in self.plan.outputs}


def _noughts(tensors: Sequence[Live]) -> "Arrays":
    import numpy as np

    shapes = {live.name: [1 if size == -1 else size for size in live.shape] for live in tensors}
    return {live.name: np.zeros(shapes[live.name], codec.DTYPES[live.dtype]) for live in tensors}


def _read_plan(folder: Path) -> Plan:
    plan = load_plan(
        read_bytes(folder / "split.yaml", "the split plan", MAX_PLAN_BYTES).decode("utf-8", "replace"),
        str(folder / "split.yaml"),
    )
    parts = {part.file for part in plan.parts}  # the tail's: here the models of the chosen variants serve
    for path in plan.files():
        if path not in parts and not (folder / path).is_file():
            raise NotFound(f"the split plan names {path}, which is not in {folder}")
    return plan
