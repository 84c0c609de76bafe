"""A tail in memory with a clock of its own: answers as the real one, late, never, or with a refusal, as the script says."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_agent.tail_client import Reply
from skills import codec, ort
from skills.errors import SkerryError
from skills.split import Estimate
from skills.split_plan import load_plan, plan_hash
from skills.stages import StageChain
from skills.timer import Halt

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclasses.dataclass(slots=True)
class FakeClock:
    """Seconds that pass only when somebody says so."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds


class FakeTail:
    """Keeps to the contract of `edge_agent.tail_client.Tail`; `link`, `delay_s`, `silent` and `refuse` script it.

    With `stages` it runs those for a plan of stages. `replies` is what was asked of the answers' coding, `waits` for how long.
    """

    def __init__(
        self, plan_folder: Path, clock: FakeClock, delay_s: float = 0.02, stages: StageChain | None = None
    ) -> None:
        plan = load_plan((plan_folder / "split.yaml").read_text())
        self._plans = {plan_hash(plan): plan}
        files = [plan_folder / one.file for one in plan.segments]
        self._chain: ort.Chain | StageChain = stages or ort.chain(files, [live.name for live in plan.outputs])
        self._clock = clock
        self._due: dict[int, tuple[float, Reply]] = {}
        self._next = 0
        self.link = Estimate(20.0, 10.0)
        self.delay_s = delay_s
        self.silent = False
        self.refuse: Reply | None = None
        self.prepared = ""
        self.cancelled: list[tuple[int, bool]] = []
        self.replies: list[str] = []
        self.waits: list[float] = []

    def prepare(self, plan: str) -> None:
        self.prepared = plan

    def estimate(self) -> Estimate:
        return self.link

    def send(self, plan: str, cut: str, codec: str, frame: bytes, deadline_s: float, reply: str = "") -> int:
        self._next += 1
        self.replies.append(reply)
        if not self.silent:
            answer = self.refuse or self._answer(plan, cut, codec, frame, reply)
            self._due[self._next] = (self._clock() + self.delay_s, answer)
        return self._next

    def send_plain(
        self, plan: str, cut: str, arrays: "Mapping[str, NDArray[Any]]", deadline_s: float, tail_ms: float = 0.0
    ) -> int:
        self._next += 1
        if not self.silent:
            reply = self.refuse or self._answer_plain(plan, cut, arrays)
            self._due[self._next] = (self._clock() + self.delay_s, reply)
        return self._next

    def wait(self, request: int, timeout_s: float) -> Reply | None:
        self.waits.append(timeout_s)
        due, reply = self._due.get(request, (float("inf"), Reply(None)))
        if due > self._clock() + timeout_s:
            self._clock.advance(timeout_s)
            return None
        self._clock.advance(max(0.0, due - self._clock()))
        del self._due[request]
        return reply

    @contextlib.contextmanager
    def watch(self, request: int, halt: Halt) -> Iterator[Callable[[], bool]]:
        yield lambda: self._due.get(request, (float("inf"), Reply(None)))[0] <= self._clock()

    def cancel(self, request: int, *, late: bool) -> None:
        self._due.pop(request, None)
        self.cancelled.append((request, late))

    def close(self) -> None:
        self._due.clear()

    def _answer(self, name: str, cut_name: str, coding_name: str, frame: bytes, wanted: str) -> Reply:
        plan = self._plans.get(name)
        if plan is None:
            return Reply(None, "invalid", f"no plan {name!r} lies here")
        try:
            cut = plan.cut(cut_name)
            coding = next(one for one in cut.codings if one.name == coding_name)
            outputs = self._chain.run(codec.decode(coding, cut.tensors, frame), cut.after)
            coded = codec.encode_reply(plan.replies, plan.outputs, wanted, outputs)
            return Reply(outputs) if coded is None else Reply({"frame": np.frombuffer(coded, np.uint8)}, coding=wanted)
        except (SkerryError, StopIteration) as error:
            return Reply(None, "invalid", str(error) or f"cut {cut_name} has no coding {coding_name}")

    def _answer_plain(self, name: str, cut_name: str, arrays: "Mapping[str, NDArray[Any]]") -> Reply:
        plan = self._plans.get(name)
        if plan is None:
            return Reply(None, "invalid", f"no plan {name!r} lies here")
        try:
            cut = plan.cut(cut_name)
            values = codec.whole(cut.tensors if cut.after else plan.inputs, arrays)
            return Reply(self._chain.run(values, cut.after))
        except SkerryError as error:
            return Reply(None, "invalid", str(error))
