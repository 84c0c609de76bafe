"""What a switch costs the device itself: the first request in another way, beside the ones behind it.

The device is as fast as this machine and the tail is at the other end of loopback, so that nothing hides a millisecond.
Counted is what the device does: until its request leaves, or until the answer where all is computed here.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import wire
from figures import share_at
from nets import Planned

from cloud.tail.store import install
from edge_agent.infer import SplitModel
from edge_agent.tail_client import LinkClient
from skills.errors import Unreachable
from skills.split import admitted

BEHIND = 4  # requests in the same way, with the same input, behind the first
WAIT_S = 10.0


class Sending(LinkClient):
    """The product's way to the tail, which also says when a request left."""

    sent_s = 0.0

    def send(self, *given: Any, **more: Any) -> int:
        self.sent_s = time.monotonic()
        return super().send(*given, **more)


def measure(planned: Planned, switches: int) -> dict[str, Any]:
    """Return what the device did in ms, [switch][request], going from one way of answering to another so many times."""
    ways, rows, order = list(admitted(planned.plan)), list[list[float]](), np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="skbench-")))
        install(planned.folder, folder / "tails")
        loopback = wire.Proxied(planned.plan.network)  # only its ends: no link is in between
        port = stack.enter_context(wire.running_tail(loopback, folder / "tails", folder))
        stack.enter_context(wire.running_link(loopback, folder / "link", f"127.0.0.1:{port}"))
        tail = Sending(folder / "link")
        model = SplitModel(planned.folder, link=tail, wait_s=WAIT_S)
        stack.callback(model.close)
        if not tail.wait_up(30):
            raise Unreachable("the link process reached no tail within 30 s")
        before = ways[0]
        for at in range(switches + len(ways)):
            others = [one for one in ways if one is not before]
            way = before = others[order.integers(len(others))]
            sample, took = planned.samples[at % len(planned.samples)], list[float]()
            model.use(way[0].name, way[1])
            for _ in range(1 + BEHIND):
                start = time.monotonic()
                model.answer(sample)
                if model.last.cut != way[0].name or model.last.where == "continued":
                    raise Unreachable(f"{way[0].name} was answered as {model.last.where}: {model.last.reason}")
                took.append(model.last.ms if way[1] is None else (tail.sent_s - start) * 1e3)
            if at >= len(ways):  # what the first ones take is a start, not a switch
                rows.append(took)
    return {"rows": rows, "ways": len(ways), "net": planned.net.name}


def judge(found: Mapping[str, Any]) -> dict[str, float]:
    """Return what the first request of a switch took beyond the ones behind it, and the second beyond those behind it."""
    rows: Sequence[Sequence[float]] = found["rows"]
    first = [row[0] - statistics.median(row[1:]) for row in rows]
    second = [row[1] - statistics.median(row[2:]) for row in rows]
    return {
        "switches": len(rows), "p50_ms": share_at(first, 0.5), "p99_ms": share_at(first, 0.99),
        "usual_p50_ms": share_at(second, 0.5), "usual_p99_ms": share_at(second, 0.99),
    }  # fmt: skip
