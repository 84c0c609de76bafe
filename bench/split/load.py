"""Clients of a tail, each with a channel of its own and its next request as soon as it has an answer.

    python -P load.py HOST:PORT PLAN CUT CODEC FRAME

Reads lines `CLIENTS SECONDS` and prints requests per second, p50 and p99 of the answers, and where the tail says its time went.
"""

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from skills import oip

DEADLINE_S = 30


def request(plan: str, cut: str, codec: str, frame: bytes) -> Any:
    """Return one request in compact mode."""
    made = oip.messages().ModelInferRequest(model_name=plan)
    made.inputs.add(name="frame", datatype="UINT8", shape=[len(frame)])
    made.raw_input_contents.append(frame)
    for key, value in (("plan", plan), ("cut", cut), ("codec", codec)):
        made.parameters[f"split.{key}"].string_param = value
    made.parameters["split.deadline_us"].int64_param = DEADLINE_S * 1_000_000
    return made


async def load(target: str, made: Any, clients: int, seconds: float) -> dict[str, float]:
    """Ask for so long and return what came of it; the first answer of each client does not count."""
    import grpc

    options = (("grpc.use_local_subchannel_pool", 1),)
    channels = [grpc.aio.insecure_channel(target, options=options) for _ in range(clients)]
    times: list[float] = []
    parts: dict[str, float] = {}
    begin = 0.0

    async def one(stub: Any) -> None:
        while (start := time.perf_counter()) < begin + seconds:
            call = stub.ModelInfer(made, timeout=DEADLINE_S)
            await call
            times.append(time.perf_counter() - start)
            for key, value in await call.trailing_metadata():
                if key.startswith("split-"):
                    parts[key] = parts.get(key, 0.0) + float(value) / 1e3

    stubs = [oip.service().GRPCInferenceServiceStub(channel) for channel in channels]
    await asyncio.gather(*(stub.ModelInfer(made, timeout=DEADLINE_S) for stub in stubs))
    begin = time.perf_counter()
    await asyncio.gather(*(one(stub) for stub in stubs))
    took = time.perf_counter() - begin
    for channel in channels:
        await channel.close()
    ordered = sorted(times)
    said = {key.removeprefix("split-").replace("-us", "_ms"): value / len(times) for key, value in parts.items()}
    at = {"p50_ms": ordered[len(ordered) // 2] * 1e3, "p99_ms": ordered[int(len(ordered) * 0.99)] * 1e3}
    return {"per_s": len(times) / took, "requests": len(times)} | at | said


def main() -> None:
    target, plan, cut, codec, file = sys.argv[1:]
    made = request(plan, cut, codec, Path(file).read_bytes())
    for line in sys.stdin:
        clients, seconds = line.split()
        print(json.dumps(asyncio.run(load(target, made, int(clients), float(seconds)))), flush=True)


if __name__ == "__main__":
    main()
