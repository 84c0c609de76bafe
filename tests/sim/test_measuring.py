"""A device that measures for somebody: one work at a time, for as long as anybody asks, and nothing of it stays."""

import asyncio
import itertools

from skills import zstd
from skills.bundle import Part, chunk_hashes
from skills.desired import ObjectRef
from skills.errors import Refused
from skills.files import sha256_hex
from skills.measurement import Figures, Order, Work, seal_order
from skills.split_plan import Millis
from skills.wire import decode_json, encode_json

NUMBERS = itertools.count()


def lend(controller, name="work-00001"):
    """Give the controller a work with its parts, and return the sealed order and the work's hash."""
    parts = []
    for path in ("0.onnx", "samples.npz"):
        content = path.encode() * 40_000
        wire = zstd.compress(content, 1)
        controller.objects[sha256_hex(wire)] = wire
        parts.append(Part(path, sha256_hex(content), len(content), sha256_hex(wire), len(wire), chunk_hashes(wire)))
    data = encode_json(Work(name, tuple(parts), ("0.onnx",), ("x",), ("y",), "samples.npz", (), 3))
    controller.objects[sha256_hex(data)] = data
    return seal_order(Order("board-1", ObjectRef(sha256_hex(data), len(data))), controller.director), sha256_hex(data)


def figures(sha256):
    heads = (Millis(0.0, 0.0), Millis(4.0, 5.0))
    return encode_json(Figures(sha256, heads, (), (1.0,), 3, 0.0, 4, "a board", "x86_64", "onnxruntime 1", "1"))


async def asked(world, order):
    number = f"measure-{next(NUMBERS)}"
    world.controller.command(number, order, op="measure", deadline_ms=30_000)
    await world.until(lambda: number in world.controller.results)
    return world.controller.results[number]


def folder(world):
    return world.data / "measure"


def test_the_figures_come_once_they_are_there_and_until_then_how_far_it_is(scene):
    async def story(world):
        await world.boot()
        order, sha256 = lend(world.controller)
        go_on = asyncio.Event()
        world.workers.hold_bare = go_on
        world.workers.measure = lambda work: figures(sha256_hex(work))
        header, _ = await asked(world, order)
        assert (header["ok"], header["state"]) == (True, "measuring")
        assert folder(world).is_dir()
        go_on.set()
        header, body = await asked(world, order)
        assert (header["ok"], header["state"]) == (True, "done")
        assert decode_json(Figures, body, "the figures").work == sha256
        assert world.workers.alive == []
        assert not folder(world).exists()
        assert (await asked(world, order))[1] == body  # an answer that was lost on the way is given again

    scene(story)


def test_another_work_waits_for_its_turn(scene):
    async def story(world):
        await world.boot()
        order, _ = lend(world.controller)
        other, _ = lend(world.controller, "work-00002")
        world.workers.hold_bare = asyncio.Event()
        await asked(world, order)
        header, _ = await asked(world, other)
        assert (header["ok"], header["code"]) == (False, Refused.exit_code)
        assert "board-1 is measuring something else" in header["error"]

    scene(story)


def test_what_nobody_asks_about_ends_and_another_work_may_begin(scene):
    async def story(world):
        await world.boot()
        order, _ = lend(world.controller)
        world.workers.hold_bare = asyncio.Event()
        await asked(world, order)
        await asyncio.sleep(200)
        assert not folder(world).exists()
        assert world.workers.alive == []
        header, _ = await asked(world, order)
        assert header["code"] == Refused.exit_code
        assert "begin anew" in header["error"]
        world.workers.hold_bare = None
        world.workers.measure = lambda work: figures(sha256_hex(work))
        other, _ = lend(world.controller, "work-00002")
        assert (await asked(world, other))[0]["state"] == "done"

    scene(story)


def test_a_model_that_is_too_slow_ends_with_a_sentence(scene):
    async def story(world):
        await world.boot()
        order, _ = lend(world.controller)
        world.workers.hold_bare = asyncio.Event()
        header, _ = await asked(world, order)
        while header.get("state") == "measuring":
            header, _ = await asked(world, order)
        assert header["code"] == Refused.exit_code
        assert header["error"] == ("board-1 did not measure the segments within 600 s: the model is too slow for it")
        assert not folder(world).exists()

    scene(story)


def test_a_worker_that_dies_over_it_is_a_reason_and_the_skills_go_on(scene):
    async def story(world):
        await world.boot()
        digest = world.controller.release()
        world.controller.assign(("digits", "1.0.0"))
        await world.serving(digest)
        order, _ = lend(world.controller)
        world.workers.hold_bare = asyncio.Event()
        await asked(world, order)
        worker = next(one for one in world.workers.alive if one.load.skill == "measuring")
        worker.die("killed by SIGKILL", "last line")
        worker.hold.set()
        header, _ = await asked(world, order)
        assert header["code"] == Refused.exit_code
        assert header["error"] == ("board-1 could not measure: its worker was killed by SIGKILL; last words: last line")
        assert (await world.serving(digest)).phase == "serving"

    scene(story)


def test_a_stop_ends_the_measuring_and_a_start_clears_what_a_power_cut_left(scene):
    async def story(world):
        await world.boot()
        order, _ = lend(world.controller)
        world.workers.hold_bare = asyncio.Event()
        await asked(world, order)
        await world.agent.stop()
        assert not folder(world).exists()
        folder(world).mkdir()
        (folder(world) / "left").write_text("behind")
        await world.boot()
        assert not folder(world).exists()

    scene(story)
