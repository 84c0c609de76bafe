"""Has enrolled devices measure segments: lends them the objects of a work, and asks until the figures are there."""

import asyncio
import dataclasses
from typing import Any

from cloud.delivery import Delivery
from cloud.fleet import Fleet
from cloud.registry import Registry
from skills.desired import ObjectRef
from skills.errors import DeadlineExceeded, FormatError, NotFound, Refused, SkerryError, Unreachable, UsageError
from skills.measurement import MAX_FIGURES_BYTES, MAX_WORK_BYTES, Figures, Order, read_work, seal_order
from skills.wire import decode_json, to_plain

LOAN_S = 120.0  # from one question to the next


@dataclasses.dataclass(frozen=True, slots=True)
class Measuring:
    """Keeps nothing of its own: each question lends the objects anew, so a device that is not asked about gets no more."""

    fleet: Fleet
    registry: Registry
    delivery: Delivery

    async def ask(self, device: str, sha256: str, deadline_s: float) -> dict[str, Any]:
        """Have a device begin a work that was lent, or say how far it is: `state`, `share` of it, and at the end `figures`.

        Raises:
            NotFound: no such device, or the work or one of its parts was not uploaded.
            Unreachable, DeadlineExceeded: the device is away, or gives no answer within `deadline_s`; what it was lent it keeps
                until the loan is over.
            Refused: it has no room or runtime, measures something else, or its agent cannot measure.
            SkerryError: what else it answered.
        """
        data = self.registry.lent_object(sha256, MAX_WORK_BYTES)
        work = read_work(data)
        objects = work.objects | {sha256}
        if (lacking := self.registry.lacks(objects)) is not None:
            raise NotFound(f"the object {lacking[:12]}… of the work was not uploaded")
        loans, now = self.delivery.loans, asyncio.get_running_loop().time()
        if objects - loans.objects(now):
            self.fleet.record("device.measuring", self.fleet.device(device).id, work=sha256[:12])
        loans.lend(device, sha256, objects, now + LOAN_S)
        order = seal_order(Order(device, ObjectRef(sha256, len(data))), self.registry.keys.director)
        try:
            header, body = await self.delivery.relay(device, "measure", {}, order, deadline_s)
        except UsageError:
            self._end(device, sha256, objects)
            raise Refused(f"the agent on {device} is too old to measure: update it") from None
        except (Unreachable, DeadlineExceeded):
            raise  # a question that went astray: the device goes on with its work, and whoever asks will ask again
        except SkerryError:
            self._end(device, sha256, objects)
            raise
        state, share = header.get("state"), header.get("share")
        if state not in ("fetching", "measuring", "done") or not isinstance(share, int | float):
            raise FormatError(f"the device {device} gave no answer that this controller knows")
        if state != "done":
            return {"state": state, "share": float(share), "figures": None}
        self._end(device, sha256, objects)
        figures = decode_json(Figures, body, f"the figures of {device}", MAX_FIGURES_BYTES)
        figures.check(sha256, work)
        return {"state": "done", "share": 1.0, "figures": to_plain(figures)}

    def _end(self, device: str, work: str, objects: frozenset[str]) -> None:
        loans = self.delivery.loans
        loans.end(device, work)
        self.registry.take_back(objects - loans.objects(asyncio.get_running_loop().time()))
