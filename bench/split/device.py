"""The device of the bench: the product's split model for its own options, and the same tail and timer for the others'."""

import dataclasses
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from arms import Arm
from nets import Array

from edge_agent.infer import SplitModel
from edge_agent.tail_client import LinkClient
from skills import codec, ort
from skills.coding import Coding
from skills.errors import Unreachable
from skills.split import Estimate
from skills.split_plan import Cut, plan_hash
from skills.timer import Dilated, Local

PATIENCE_S = 60.0  # while measuring, an answer is waited for: going on here would hide how slow the link is
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
MOST_BLOCK_BYTES = 1 << 17


@dataclasses.dataclass(frozen=True, slots=True)
class Ran:
    """One answer: how long it took, and the bytes of tensors that went over the link for it."""

    ms: float
    bytes: int


class Device:
    """A plan on a slow device, in front of a link."""

    def __init__(self, folder: Path, link: Path) -> None:
        self.model = SplitModel(folder, link=link, wait_s=PATIENCE_S)
        plan = self._plan = self.model.plan  # the model's own is another one while a cut is pinned
        self.model.timer = Dilated(plan.slowdown) if plan.slowdown > 1 else Local()
        self._hash = plan_hash(plan)
        self._chain = ort.chain([folder / one.file for one in plan.segments], [live.name for live in plan.outputs])
        if not isinstance(self.model.tail, LinkClient) or not self.model.tail.wait_up(30):
            raise Unreachable("the link process reached no tail within 30 s")
        self._tail = self.model.tail

    def close(self) -> None:
        """Let go of the link."""
        self.model.close()

    def estimate(self) -> Estimate:
        """Return what the device has learnt of its link by itself."""
        return self._tail.estimate()

    def run(self, arm: Arm, sample: Mapping[str, Array]) -> Ran:
        """Answer one input in the way of an arm.

        Raises:
            Unreachable: no answer came of the tail.
        """
        if arm.way != "ours":
            return self._foreign(arm, sample)
        coding = dataclasses.replace(arm.coding, admitted=True) if arm.coding else None
        self.model.use(arm.cut, coding)
        self.model.answer(sample)
        last = self.model.last
        if (last.where == "local") != (arm.coding is None) or last.where == "continued":
            raise Unreachable(f"{arm.name} was answered as {last.where}: {last.reason}")
        return Ran(last.ms, last.bytes)

    def _foreign(self, arm: Arm, sample: Mapping[str, Array]) -> Ran:
        start = time.perf_counter()
        cut = self._plan.cut(arm.cut)
        if arm.way == "float":
            values = self.model.timer.run(lambda: self._chain.run(sample, 0, cut.after)).value
            arrays = {live.name: values[live.name] for live in cut.tensors}
            size = sum(int(array.nbytes) for array in arrays.values())
            request = self._tail.send_plain(self._hash, cut.name, arrays, PATIENCE_S)
        else:
            coding = next(one for one in cut.codings if one.kind == "u4")
            work = self.model.timer.run(lambda: packed(coding, cut, self._chain.run(sample, 0, cut.after)))
            size = len(work.value)
            request = self._tail.send(self._hash, cut.name, coding.name, work.value, PATIENCE_S)
        reply = self._tail.wait(request, PATIENCE_S)
        if reply is None or reply.outputs is None:
            raise Unreachable(f"{arm.name} was not answered: {reply.error if reply else 'no reply'}")
        return Ran((time.perf_counter() - start) * 1e3, size)


def packed(coding: Coding, cut: Cut, values: Mapping[str, Any]) -> bytes:
    """Return a frame of 4-bit codes that nothing compresses: its zstd frames hold their content as it is (RFC 8878, 3.1.1.2)."""
    parts, bodies = [struct.pack(">2sBB", codec.MAGIC, codec.VERSION, len(cut.tensors))], []
    for at, live in enumerate(cut.tensors):
        scaled = values[live.name] * np.float32(1 / coding.scales[at]) + np.float32(coding.zeros[at])
        codes = np.clip(np.rint(scaled), 0, 15).astype(np.uint8).ravel()
        codes = np.append(codes, np.uint8(0)) if codes.size % 2 else codes
        body = stored((codes[0::2] | codes[1::2] << 4).tobytes())
        free = [size for size, said in zip(values[live.name].shape, live.shape, strict=True) if said == -1]
        parts.append(struct.pack(f">{len(free) + 1}I", *free, len(body)))
        bodies.append(body)
    return b"".join(parts + bodies)


def stored(content: bytes) -> bytes:
    """Return a zstd frame whose blocks hold `content` as it is."""
    blocks = [content[at : at + MOST_BLOCK_BYTES] for at in range(0, len(content), MOST_BLOCK_BYTES)] or [b""]
    header = ZSTD_MAGIC + b"\xa0" + struct.pack("<I", len(content))  # one segment, four bytes of size
    return header + b"".join(
        struct.pack("<I", len(block) << 3 | (at == len(blocks) - 1))[:3] + block for at, block in enumerate(blocks)
    )


def json_bytes(sample: Mapping[str, Array]) -> int:
    """Return the bytes of an input as JSON lists of floats, as Sedna's joint inference sends it (`data.tolist()`)."""
    import json

    return len(json.dumps({"data": next(iter(sample.values())).tolist()}))
