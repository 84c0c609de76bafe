"""What serves goes on serving: boots, deaths, trials, swaps, damaged files, no network, an older disk."""

import asyncio
import dataclasses
import json

from edge_agent.config import AgentConfig
from edge_agent.plan import LIVES_ON_TRIAL
from skills.errors import Unreachable
from skills.report import SkillState

DIGITS1, DIGITS2 = ("digits", "1.0.0"), ("digits", "2.0.0")


async def installed(world, *releases):
    """Boot and bring one version after another to serve, past its trial."""
    digests = []
    await world.boot()
    for name, version in releases:
        digests.append(world.controller.release(name, version, weights=(name + version).encode() * 20_000))
        world.controller.assign((name, version))
        await world.serving(digests[-1], name)
        await world.until(lambda name=name: not world.agent.reconciler.pointers()[name].trial)
    return digests


async def ask(world, skill="digits"):
    _, answer = await world.agent.service.infer(skill, None, b"{}", 2, 60)
    return json.loads(answer)["version"]


def test_a_device_boots_offline_and_serves_what_served_before(scene):
    async def story(world):
        await installed(world, DIGITS1)
        await world.power_cut()
        start = asyncio.get_running_loop().time()
        await world.boot(network=False)
        assert await ask(world) == "1.0.0"
        assert asyncio.get_running_loop().time() - start < 2

    scene(story)


def test_a_device_whose_assignment_is_damaged_serves_by_its_pointers(scene):
    async def story(world):
        await installed(world, DIGITS1)
        await world.power_cut()
        (world.data / "assignment.json").write_bytes(b"\x00" * 100)
        await world.boot(network=False)
        assert await ask(world) == "1.0.0"

    scene(story)


def test_a_damaged_pointer_of_one_skill_leaves_the_others_serving_and_heals(scene):
    async def story(world):
        digits, photos = await installed(world, DIGITS1, ("photos", "1.0.0"))
        world.controller.assign(DIGITS1, ("photos", "1.0.0"))
        await world.serving(digits)
        await world.power_cut()
        (world.data / "active/photos.json").write_bytes(b"{")
        await world.boot(network=False)
        assert await ask(world) == "1.0.0"
        world.broker.mend(world.agent._mqtt)
        await world.serving(photos, "photos")

    scene(story)


def test_a_version_whose_files_were_damaged_is_fetched_again(scene):
    async def story(world):
        (digest,) = await installed(world, DIGITS1)
        await world.power_cut()
        victim = world.data / "versions" / digest / "models/net.onnx"
        sound = victim.read_bytes()
        victim.chmod(0o644)
        victim.write_bytes(b"x" * len(sound))
        world.controller.needs.clear()
        await world.boot()
        await world.serving(digest)
        assert victim.read_bytes() == sound
        models = [part.wire_sha256 for part in world.controller.bundles[DIGITS1].bundle.parts if "models" in part.path]
        assert {need.sha256 for need in world.controller.needs} <= {*models, world.controller.metadata.sha256}

    scene(story)


def test_a_damaged_new_version_gives_way_to_the_one_before(scene):
    async def story(world):
        _, second = await installed(world, DIGITS1, DIGITS2)
        await world.power_cut()
        (world.data / "versions" / second / "models/net.onnx").chmod(0o644)
        (world.data / "versions" / second / "models/net.onnx").write_bytes(b"rotten")
        await world.boot(network=False)
        assert await ask(world) == "1.0.0"

    scene(story)


def test_a_worker_that_dies_is_started_again_and_no_request_is_lost(scene):
    async def story(world):
        (digest,) = await installed(world, DIGITS1)
        world.workers.of(digest).die()
        assert await ask(world) == "1.0.0"
        for _ in range(20):
            world.workers.of(digest).die()
            assert await ask(world) == "1.0.0"
        assert world.agent.reconciler.pointers()["digits"].active.version == "1.0.0"

    scene(story)


def test_a_version_that_keeps_dying_within_its_trial_returns_to_the_previous_one_with_its_last_words(scene):
    async def story(world):
        (first,) = await installed(world, DIGITS1)
        second = world.controller.release(version="2.0.0")
        world.controller.assign(DIGITS2)
        await world.serving(second)
        for _ in range(LIVES_ON_TRIAL):
            await world.until(lambda: any(w.load.digest == second for w in world.workers.alive))
            world.workers.of(second).die(words="assertion failed: kernel.c 12")
            await asyncio.sleep(5)
        state = await world.settled(second)
        assert state.phase == "failed"
        assert "died 3 times" in state.reason
        assert "kernel.c 12" in state.reason
        assert await ask(world) == "1.0.0"
        await world.until(lambda: world.state("digits", first).phase == "serving")
        started = len(world.workers.started)
        await asyncio.sleep(3600)
        assert len(world.workers.started) == started

    scene(story)


def test_a_first_version_that_keeps_dying_leaves_nothing_to_return_to_and_says_so(scene):
    async def story(world):
        digest = world.controller.release()
        await world.boot()
        world.controller.assign(DIGITS1)
        await world.serving(digest)
        for _ in range(LIVES_ON_TRIAL):
            await world.until(lambda: any(w.load.digest == digest for w in world.workers.alive))
            world.workers.of(digest).die()
            await asyncio.sleep(5)
        assert (await world.settled(digest)).phase == "failed"
        assert not world.agent.service.skills()

    scene(story)


def test_a_version_that_takes_the_device_down_returns_to_the_previous_one_after_three_boots(scene):
    async def story(world):
        await installed(world, DIGITS1)
        second = world.controller.release(version="2.0.0")
        world.controller.assign(DIGITS2)
        await world.serving(second)
        for _ in range(LIVES_ON_TRIAL - 1):
            await world.power_cut()
            await world.boot(network=False)
            assert await ask(world) == "2.0.0"
        await world.power_cut()
        await world.boot(network=False)
        assert await ask(world) == "1.0.0"

    scene(story)


def test_clean_restarts_do_not_count_against_a_version_on_trial(scene):
    async def story(world):
        await installed(world, DIGITS1)
        second = world.controller.release(version="2.0.0")
        world.controller.assign(DIGITS2)
        await world.serving(second)
        for _ in range(6):
            await world.agent.stop()
            await world.boot(network=False)
            assert await ask(world) == "2.0.0"

    scene(story)


def test_after_its_trial_a_version_that_dies_is_started_for_ever_with_growing_pauses(scene):
    async def story(world):
        (digest,) = await installed(world, DIGITS1)
        pauses = []
        for _ in range(10):
            start = asyncio.get_running_loop().time()
            world.workers.of(digest).die()
            await world.until(lambda: any(w.load.digest == digest for w in world.workers.alive))
            pauses.append(asyncio.get_running_loop().time() - start)
        assert pauses[0] < 1
        assert 20 < pauses[-1] <= 31

    scene(story)


def test_a_rollback_moves_one_pointer_and_fetches_nothing_but_metadata(scene):
    async def story(world):
        first, _ = await installed(world, DIGITS1, DIGITS2)
        world.controller.needs.clear()
        world.controller.assign(DIGITS1)
        await world.serving(first)
        assert await ask(world) == "1.0.0"
        assert {need.sha256 for need in world.controller.needs} <= {world.controller.metadata.sha256}

    scene(story)


def test_a_newer_assignment_supersedes_a_fetch_that_hangs(scene):
    async def story(world):
        world.controller.release(weights=b"1" * 100_000)
        await world.boot()
        give = world.controller.give
        parts = {part.wire_sha256 for part in world.controller.bundles[DIGITS1].bundle.parts}
        world.controller.give = lambda need: None if need.sha256 in parts else give(need)
        world.controller.assign(DIGITS1)
        await asyncio.sleep(5)
        second = world.controller.release(version="2.0.0", weights=b"2" * 100_000)
        parts -= {part.wire_sha256 for part in world.controller.bundles[DIGITS2].bundle.parts}
        start = asyncio.get_running_loop().time()
        world.controller.assign(DIGITS2)
        await world.serving(second)
        assert asyncio.get_running_loop().time() - start < 15

    scene(story)


def test_requests_in_line_go_on_with_the_new_version_and_none_is_dropped(scene):
    async def story(world):
        (first,) = await installed(world, DIGITS1)
        slow = world.workers.of(first).hold = asyncio.Event()
        line = [asyncio.create_task(ask(world)) for _ in range(5)]
        await asyncio.sleep(0)
        second = world.controller.release(version="2.0.0")
        world.controller.assign(DIGITS2)
        await world.serving(second)
        slow.set()
        assert await asyncio.gather(*line) == ["1.0.0", "2.0.0", "2.0.0", "2.0.0", "2.0.0"]

    scene(story)


def test_more_requests_than_may_wait_are_refused_at_once(scene):
    async def story(world):
        (first,) = await installed(world, DIGITS1)
        world.workers.of(first).hold = asyncio.Event()
        line = [asyncio.create_task(ask(world)) for _ in range(4)]
        await asyncio.sleep(0.01)
        done = await asyncio.gather(ask(world), return_exceptions=True)
        assert isinstance(done[0], Unreachable)
        assert "4 requests wait" in str(done[0])
        for task in line:
            task.cancel()
        await asyncio.gather(*line, return_exceptions=True)

    scene(story, config=AgentConfig(listen="127.0.0.1:0", max_waiting=4))


def test_a_lost_broker_changes_nothing_for_those_who_ask_here_and_the_state_is_told_again(scene):
    async def story(world):
        (digest,) = await installed(world, DIGITS1)
        world.broker.cut("board-1")
        world.workers.of(digest).die()
        assert await ask(world) == "1.0.0"
        world.controller.reports.clear()
        world.broker.mend(world.agent._mqtt)
        await world.until(lambda: world.controller.reports)
        state = world.controller.reports[-1].of("digits", digest)
        assert dataclasses.replace(state, received_bytes=0) == SkillState(
            "digits",
            "1.0.0",
            digest,
            "serving",
            variants={"net": "int8"},
            progress=1.0,
            reused_bytes=state.reused_bytes,
        )
        assert len({hello.nonce for hello in world.controller.hellos}) == 2

    scene(story)


def test_a_device_that_is_stopped_says_that_it_goes(scene):
    async def story(world):
        await installed(world, DIGITS1)
        await world.agent.stop()
        assert [m for m in world.broker.log if m.topic.endswith("/up/state")][-1].payload == b""
        assert (await world.boot(network=False)).status()["connected"] is False
        await world.agent.stop()  # without a broker there is nobody to tell, and nothing to wait for

    scene(story)


def test_every_answer_leaves_one_usage_record(scene):
    async def story(world):
        (digest,) = await installed(world, DIGITS1)
        for _ in range(3):
            await ask(world)
        lines = (world.data / "usage/usage.jsonl").read_text().splitlines()
        record = json.loads(lines[-1])
        assert len(lines) == 3
        assert record["release"] == digest
        assert (record["where"], record["cut"], record["variants"]) == ("local", "local", {"net": "int8"})
        assert record["ms"] >= 0

    scene(story)


def test_a_tail_that_goes_and_comes_back_is_told_once_each_and_the_status_shows_it(scene, caplog):
    async def story(world):
        (digest,) = await installed(world, DIGITS1)
        worker = world.workers.of(digest)
        for tail in ("", "the tail does not answer", "the tail does not answer", "", ""):
            worker.ran = {"where": "local" if tail else "split", "cut": "local" if tail else "c2", "tail": tail}
            await ask(world)
            shown = world.agent.status()["split"]["digits"]
            assert (shown["where"], shown["tail"]) == (worker.ran["where"], tail)
        told = [record.message for record in caplog.records if "tail." in record.message]
        assert [line.split()[0] for line in told] == ["tail.away", "tail.back"]
        assert "skill=digits reason='the tail does not answer'" in told[0]

    with caplog.at_level("INFO"):
        scene(story)


def test_a_quiet_device_gives_a_sign_of_life_every_minute(scene):
    async def story(world):
        await installed(world, DIGITS1)
        await asyncio.sleep(5)
        world.controller.reports.clear()
        await asyncio.sleep(600)
        assert 9 <= len(world.controller.reports) <= 11

    scene(story)


def test_asked_for_a_sign_of_life_a_device_introduces_itself_again(scene):
    """A controller that came back after its broker never heard the first words."""

    async def story(world):
        await world.boot()
        await world.until(lambda: world.controller.hellos)
        (first,) = world.controller.hellos
        world.controller.command("q", op="hello")
        await world.until(lambda: len(world.controller.hellos) == 2)
        assert world.controller.hellos[1].nonce != first.nonce

    scene(story)
