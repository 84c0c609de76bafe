"""Requests after a silence: through our link process, which keeps the connection warm, and through plain grpcio, side by side."""

import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import wire

from cloud.split.plan import split
from cloud.tail.store import install
from edge_agent.tail_client import LinkClient
from skills.errors import Unreachable
from skills.network import Link

SIZES = (16_384, 32_768, 65_536)
LINKS = (Link(20, 50), Link(100, 50))
# Without traffic TCP halves its window every retransmission timeout (RFC 2861), here a quarter of a second: so long until
# it is back at the initial one, wherever it stood.
SILENCE_S = 1.5
PATIENCE_S = 60.0


def measure(on: wire.Wire, link: Link, control: str, runs: int, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Return the milliseconds of each size and side; between two requests of a side nothing is asked for `SILENCE_S`."""
    on.change(link)
    on.control(control)
    ms: dict[str, list[float]] = {f"{side} {size}": [] for side in ("ours", "plain") for size in sizes}
    with tempfile.TemporaryDirectory(prefix="skbench-") as temporary:
        folder = Path(temporary)
        plans = {size: install(_tiny(folder, size), folder / "tails") for size in sizes}
        with (
            wire.running_tail(on, folder / "tails", folder) as port,
            on.reach(port) as target,
            wire.running_link(on, folder / "l", target),
            wire.Script(on.device(), "plain_grpc.py", target) as plain,
        ):
            tail = LinkClient(folder / "l")
            tail.prepare(plans[sizes[0]])
            if not tail.wait_up(30):
                raise Unreachable("the link process reached no tail within 30 s")
            turn = random.Random(str(link))  # noqa: S311  an order, no secret
            for at in range(runs + 1):
                for size in turn.sample(sizes, len(sizes)):
                    for side in ("ours", "plain") if at % 2 else ("plain", "ours"):
                        time.sleep(SILENCE_S)
                        took = _ours(tail, plans[size], size) if side == "ours" else _plain(plain, plans[size], size)
                        if at:  # the first round opens connections
                            ms[f"{side} {size}"].append(round(took, 2))
            tail.close()
    on.control("cubic")
    return {"ms": ms, "link": str(link), "control": control, "sizes": list(sizes)}


def ratios(found: Mapping[str, Any]) -> list[float]:
    """Return, by size, how many times slower plain grpcio is."""
    return [
        statistics.median(found["ms"][f"plain {size}"]) / statistics.median(found["ms"][f"ours {size}"])
        for size in found["sizes"]
    ]


def _ours(tail: LinkClient, plan: str, size: int) -> float:
    array = np.zeros((1, 1, size // 4), np.float32)
    start = time.perf_counter()
    reply = tail.wait(tail.send_plain(plan, "input", {"x": array}, PATIENCE_S), PATIENCE_S)
    if reply is None or reply.outputs is None:
        raise Unreachable(f"a request of {size} bytes was not answered: {reply.error if reply else 'no reply'}")
    return (time.perf_counter() - start) * 1e3


def _plain(script: wire.Script, plan: str, size: int) -> float:
    return float(script.ask(f"{plan} {size}")["ms"])


def _tiny(folder: Path, size: int) -> Path:
    """Plan a net that takes so many bytes and costs nothing: what is measured is the way there and back."""
    from onnx import TensorProto, helper

    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, count])
        for name, count in (("x", size // 4), ("y", 1))
    ]
    nodes = [helper.make_node("ReduceMean", ["x"], ["m"], axes=[2]), helper.make_node("Relu", ["m"], ["y"])]
    graph = helper.make_graph(nodes, "tiny", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    x = np.random.default_rng(0).standard_normal((24, 1, size // 4)).astype(np.float32)
    out = folder / f"tiny{size}"
    split(model.SerializeToString(), {"x": x}, slowdown=1, out=out, rounds=5, most_samples=4)
    return out
