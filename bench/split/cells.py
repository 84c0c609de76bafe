"""The grid: every arm of a (net, link, device) cell in three blocks, interleaved in an order that chance turns."""

import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nets
import numpy as np
import wire
from arms import AGAIN, OUR_CHOICE, Arm, arms, chosen
from device import Device, json_bytes
from nets import Planned
from store import Store

from cloud.tail.store import install
from skills.coding import Coding
from skills.network import Link
from skills.split import Estimate
from skills.split_plan import plan_hash

BLOCKS = 3  # in each, the input is sent as JSON lists once
RUNS = 10
BBR_ARMS = 4


def grid(
    planned: Planned,
    slowdowns: Sequence[float],
    links: Sequence[Link],
    runs: int,
    on: wire.Wire,
    store: Store,
    control: str,
    json_mbit: float,
) -> list[dict[str, Any]]:
    """Return every cell of a net, measured now or earlier; a block of a cell is measured anew as a whole or not at all.

    On links of `json_mbit` and more the input is also sent as JSON lists; on slower ones that takes half a minute.
    """
    facts = {
        "plan": plan_hash(planned.plan),
        "costs": _costs(planned),
        "wire": on.kind,
        "control": control,
        "runs": runs,
        "json": json_mbit,
    }
    found: dict[tuple[float, str], dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        bench: _Bench | None = None
        for block in range(BLOCKS):
            turns = range(block * runs // BLOCKS, (block + 1) * runs // BLOCKS)
            for slowdown in slowdowns:
                device = nets.for_device(planned, slowdown)
                for link in links:
                    cell = found.setdefault((slowdown, str(link)), _cell(device, link, control))
                    named = f"{planned.net.name}-{link}-x{slowdown:g}-{control}-{block}".replace("/", "-")

                    def measure(device: Planned = device, link: Link = link, turns: range = turns) -> dict[str, Any]:
                        nonlocal bench
                        if bench is None:
                            bench = stack.enter_context(_bench(planned, on, store.folder))
                        return bench.block(device, link, turns, cell, with_json=link.mbit >= json_mbit)  # noqa: B023  called at once

                    one = store.get(named, facts | {"link": str(link), "x": slowdown, "block": block}, measure)
                    for name, values in one["ms"].items():
                        cell["ms"].setdefault(name, []).extend(values)
                    cell["bytes"] |= one["bytes"]
                    cell["learnt"].append(one["learnt"])
                    cell["json_ms"].extend(one["json_ms"])
    return list(found.values())


def _cell(device: Planned, link: Link, control: str) -> dict[str, Any]:
    measured, takes = arms(device.plan, link)
    if control != "cubic":  # a column beside the table: what our planner takes, its rivals, and staying local
        wanted = [takes[OUR_CHOICE], "input jpeg q90", "local", *takes.values()]
        measured = {name: measured[name] for name in list(dict.fromkeys(wanted))[:BBR_ARMS] if name in measured}
    return {
        "net": device.net.name, "mbit": link.mbit, "rtt_ms": link.rtt_ms, "slowdown": device.plan.slowdown, "control": control,
        "takes": takes, "allowed": [name for name, arm in measured.items() if arm.way == "ours" and arm.allowed],
        "json_bytes": json_bytes(device.samples[0]), "json_ms": [], "ms": {}, "bytes": {}, "learnt": [], "_arms": measured,
    }  # fmt: skip


class _Bench:
    """A tail and a link process for one net; the devices of all speeds stand in front of them, one at a time."""

    def __init__(self, on: wire.Wire, socket: Path, lists: wire.Script) -> None:
        self._on, self._socket, self._lists, self._device = on, socket, lists, dict[Path, Device]()

    def block(
        self, device: Planned, link: Link, turns: range, cell: Mapping[str, Any], *, with_json: bool
    ) -> dict[str, Any]:
        """Run every arm once for each of `turns`, which name its inputs, after one run that is not counted."""
        self._on.change(link)
        one = self._device_of(device.folder)
        measured: Mapping[str, Arm] = cell["_arms"]
        names = list(measured)
        turn = random.Random(f"{link}{turns}{len(names)}")  # noqa: S311  an order, no secret
        ms: dict[str, list[float]] = {name: [] for name in [*names, AGAIN]}
        sizes: dict[str, int] = {}
        ours = cell["takes"][OUR_CHOICE]
        time.sleep(wire.SETTLE_S)
        for name in names:
            sizes[name] = one.run(measured[name], device.samples[0]).bytes
        for at in turns:
            order = [*names, *([AGAIN] if ours in measured else [])]
            turn.shuffle(order)
            for name in order:
                sample = device.samples[at % len(device.samples)]
                ms[name].append(round(one.run(measured[ours if name == AGAIN else name], sample).ms, 3))
        estimate = one.estimate()
        alpha = statistics.median(ms["local"]) / device.plan.cut("local").device_ms.p50
        learnt = chosen(device.plan, Estimate(max(estimate.mbit, 0.01), estimate.rtt_ms), alpha)
        told = {"mbit": estimate.mbit, "rtt_ms": estimate.rtt_ms, "alpha": alpha, "takes": learnt}
        lists = [self._lists.ask(f"{device.plan.slowdown:g} 0")["ms"]] if with_json else []
        return {"ms": ms, "bytes": sizes, "learnt": told, "json_ms": lists}

    def _device_of(self, folder: Path) -> Device:
        if folder not in self._device:
            for path in list(self._device):
                self._device.pop(path).close()
            self._device[folder] = Device(folder, self._socket)
        return self._device[folder]

    def close(self) -> None:
        """Let go of the device."""
        for one in self._device.values():
            one.close()


@contextlib.contextmanager
def _bench(planned: Planned, on: wire.Wire, near: Path) -> Any:
    on.change(Link(100, 5))
    with tempfile.TemporaryDirectory(prefix="skbench-", dir="/tmp" if len(str(near)) > 60 else None) as temporary:  # noqa: S108
        folder = Path(temporary)
        install(planned.folder, folder / "tails")
        np.save(folder / "samples.npy", np.stack([next(iter(one.values())) for one in planned.samples]))
        with (
            wire.running_tail(on, folder / "tails", folder) as port,
            on.reach(port) as target,
            wire.running_link(on, folder / "l", target),
            wire.Script(on.tail(), "json_http.py", "serve", on.listen(), str(planned.folder), core=1) as parsing,
            on.reach(int(parsing.read()["port"])) as parser,
            wire.Script(on.device(), "json_http.py", "ask", parser, str(folder / "samples.npy")) as lists,
        ):
            bench = _Bench(on, folder / "l", lists)
            try:
                yield bench
            finally:
                bench.close()


def _costs(planned: Planned) -> list[object]:
    """Return what a cell depends on beyond the plan's hash: with other costs other arms would be measured."""
    costs: list[object] = [
        [cut.name, cut.device_ms.p50, cut.tail_ms.p50, [_cost(one) for one in cut.codings]] for cut in planned.plan.cuts
    ]
    return [*costs, *([one.name, one.bytes_p50, one.encode_ms, one.decode_ms] for one in planned.plan.replies)]


def _cost(coding: Coding) -> tuple[object, ...]:
    said = (coding.name, coding.bytes_p50, coding.encode_ms, coding.decode_ms, coding.admitted)
    return (*said, coding.reply) if coding.reply else said
