"""How much of bare onnxruntime's throughput a tail gives to its clients, in turns on the same machine."""

import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wire
from nets import Planned

from cloud.tail.store import install
from skills import codec, ort
from skills.split_plan import plan_hash

CLIENTS = (1, 20)


def measure(planned: Planned, model: Path, kinds: tuple[str, ...], seconds: float, rounds: int) -> dict[str, Any]:
    """Return requests per second of bare onnxruntime and of the tail over loopback, with one client and with twenty."""
    whole, sample = ort.session(model), planned.samples[0]
    cut = planned.plan.cut("input")
    found: dict[str, Any] = {"bare": [], "net": planned.net.name}
    with tempfile.TemporaryDirectory(prefix="skbench-") as temporary:
        folder = Path(temporary)
        install(planned.folder, folder / "tails")
        loopback = wire.Proxied(planned.plan.network)  # its ends are this machine's loopback; no link is in between
        with wire.running_tail(loopback, folder / "tails", folder, core=None) as port:
            for kind in kinds:
                coding = next(one for one in cut.codings if one.name == kind)
                (folder / kind).write_bytes(codec.encode(coding, cut.tensors, sample))
            arguments = {
                kind: (f"127.0.0.1:{port}", plan_hash(planned.plan), "input", kind, str(folder / kind))
                for kind in kinds
            }
            for _ in range(rounds):
                found["bare"].append(_bare(whole, sample, seconds))
                for kind in kinds:
                    for clients in CLIENTS:
                        with wire.Script([], "load.py", *arguments[kind], core=None) as load:
                            found.setdefault(f"{kind} {clients}", []).append(load.ask(f"{clients} {seconds:g}"))
    return found


def share(found: Mapping[str, Any], key: str) -> float:
    """Return the tail's share of bare onnxruntime's throughput: the median over the turns."""
    return float(statistics.median(one["per_s"] / bare for one, bare in zip(found[key], found["bare"], strict=True)))


def _bare(whole: ort.Session, sample: Any, seconds: float) -> float:
    with wire.on_core(None):
        whole.run(sample)
        start, count = time.perf_counter(), 0
        while time.perf_counter() < start + seconds:
            whole.run(sample)
            count += 1
        return count / (time.perf_counter() - start)
