"""Workers that load nothing, the fake and the forked: they measure, keep the deadline, and are gone when stopped."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cloud.device_fake import made_up
from cloud.split.live import packed
from cloud.split.segment import Pieces
from edge_agent.workers import Load, Workers, ZygoteWorkers
from edge_agent.workers_fake import FakeWorkers
from skills import zstd
from skills.errors import DeadlineExceeded, FormatError, Refused, SkerryError, Unreachable
from skills.files import sha256_hex
from skills.measurement import MAX_FIGURES_BYTES, Figures, read_work
from skills.split_plan import load_plan
from skills.wire import decode_json, encode_json


@pytest.fixture(params=["fake", "forked"])
async def workers(request: pytest.FixtureRequest) -> AsyncIterator[Workers]:
    """Either kind; the fake makes its figures up."""
    pool: Workers = ZygoteWorkers(("onnxruntime",))
    if request.param == "fake":
        pool = FakeWorkers()
        pool.measure = lambda work: encode_json(made_up(sha256_hex(work), read_work(work)))
    yield pool
    await pool.stop()


def staged(planned: Any, folder: Path, rounds: int) -> tuple[Load, dict[str, object], bytes]:
    """Lay a work's parts out as a device does, and return what its worker is asked."""
    plan = load_plan((planned.folder / "split.yaml").read_text())
    cuts = sorted((cut for cut in plan.cuts if cut.name != "local"), key=lambda cut: cut.after)
    pieces = Pieces(plan.segments, plan.shared, tuple(cut.tensors for cut in cuts), plan.outputs)
    samples = [{"x": planned.x[at : at + 1]} for at in range(2)]
    work, objects = packed(planned.folder, pieces, samples, [cut.codings for cut in cuts], rounds)
    for part in work.parts:
        path = folder / part.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(zstd.decompress(objects[part.wire_sha256], part.size))
    data = encode_json(work)
    load = Load("measuring", "1", sha256_hex(data), folder, folder, {}, "local", 300)
    return load, {"op": "measure", "folder": str(folder), "timer": "local", "memory_mb": 256}, data


async def test_it_measures_what_it_is_given(workers: Workers, planned_net: Any, tmp_path: Path) -> None:
    load, header, work = staged(planned_net, tmp_path / "work", 2)
    worker = await workers.bare(load)
    _, answer = await worker.call(header, work, 60)
    figures = decode_json(Figures, answer, "the figures", MAX_FIGURES_BYTES)
    figures.check(sha256_hex(work), read_work(work))
    await worker.stop(0)
    with pytest.raises(Unreachable):
        await worker.call(header, work, 1)


async def test_one_that_is_too_slow_meets_the_deadline_and_is_gone_once_stopped(
    workers: Workers, planned_net: Any, tmp_path: Path
) -> None:
    load, header, work = staged(planned_net, tmp_path / "work", 1000)
    if isinstance(workers, FakeWorkers):
        workers.hold_bare = asyncio.Event()
    worker = await workers.bare(load)
    with pytest.raises(DeadlineExceeded):
        await worker.call(header, work, 0.01)
    assert worker.dead is None
    await worker.stop(0)
    assert worker.dead is not None


async def test_what_it_answers_as_its_error_is_raised_as_that_error(
    workers: Workers, planned_net: Any, tmp_path: Path
) -> None:
    load, header, work = staged(planned_net, tmp_path / "work", 2)
    if isinstance(workers, FakeWorkers):

        def broken(data: bytes) -> bytes:
            raise FormatError("the segment cannot be loaded")

        workers.measure = broken
    for segment in (tmp_path / "work").rglob("*.onnx"):
        segment.write_bytes(b"no model")
    worker = await workers.bare(load)
    with pytest.raises(SkerryError) as raised:
        await worker.call(header, work, 60)
    assert not isinstance(raised.value, Refused | Unreachable | DeadlineExceeded)
    assert worker.dead is None
    await worker.stop(0)
