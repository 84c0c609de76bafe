"""From an assignment to a serving skill, and everything that may go wrong between, on a clock that jumps."""

import asyncio
import dataclasses
import datetime as dt
import errno
import json
import os

import pytest

from edge_agent.agent import FOREIGN
from edge_agent.standing import unknown
from skills import signing, topics
from skills.desired import seal
from skills.errors import FormatError, StorageError
from skills.files import sha256_hex
from skills.messaging import Disconnected
from skills.report import CHUNK_BYTES, decode_chunk

NOW = dt.datetime(2026, 11, 21, tzinfo=dt.UTC)
DIGITS1, DIGITS2 = ("digits", "1.0.0"), ("digits", "2.0.0")


def test_an_assigned_skill_is_fetched_verified_staged_probed_and_served(scene):
    async def story(world):
        digest = world.controller.release()
        await world.boot()
        world.controller.assign(DIGITS1)
        state = await world.serving(digest)
        assert state.variants == {"net": "int8"}
        assert state.received_bytes > 0
        assert state.progress == 1.0
        assert world.agent.service.find("digits").installed.version == "1.0.0"
        assert (world.data / "versions" / digest / "models/net.onnx").read_bytes() == b"w" * 200_000

    scene(story)


def test_a_question_over_mqtt_is_answered_by_the_version_that_serves(scene):
    async def story(world):
        digest = world.controller.release()
        await world.boot()
        world.controller.assign(DIGITS1)
        await world.serving(digest)
        world.controller.command("q1", b"{}", op="infer", skill="digits", deadline_ms=500)
        await world.until(lambda: "q1" in world.controller.results)
        header, body = world.controller.results["q1"]
        assert header["ok"] is True
        assert json.loads(body) == {"version": "1.0.0"}
        world.controller.command("q2", b"{}", op="infer", skill="nobody", deadline_ms=500)
        world.controller.command("q3", op="dance")
        world.controller.command("q4", op="logs", lines=5)
        await world.until(lambda: {"q2", "q3", "q4"} <= set(world.controller.results))
        assert world.controller.results["q2"][0]["code"] == 66
        assert world.controller.results["q3"][0]["code"] == 2
        assert world.controller.results["q4"][0]["ok"] is True

    scene(story)


def test_parts_that_are_on_the_device_do_not_travel_again(scene):
    async def story(world):
        world.controller.release()
        await world.boot()
        world.controller.assign(DIGITS1)
        first = await world.serving(world.controller.releases[DIGITS1].manifest.sha256)
        sent = world.controller.sent_bytes
        digest = world.controller.release(version="2.0.0")  # the same model, code and probe
        world.controller.assign(DIGITS2)
        second = await world.serving(digest)
        assert first.reused_bytes == 0
        assert second.reused_bytes > 0
        metadata, manifest = world.controller.metadata.size, world.controller.releases[DIGITS2].manifest.size
        assert world.controller.sent_bytes - sent == second.received_bytes == metadata + manifest

    scene(story)


def test_a_version_that_fails_its_probe_never_serves_and_is_not_tried_again(scene):
    async def story(world):
        good, bad = world.controller.release(), world.controller.release(version="2.0.0")
        world.workers.probe[bad] = "output 'y' is off by 3"
        await world.boot()
        world.controller.assign(DIGITS1)
        await world.serving(good)
        world.controller.assign(DIGITS2)
        state = await world.settled(bad)
        assert state.phase == "failed"
        assert "off by 3" in state.reason
        assert world.state("digits", good).phase == "serving"
        world.controller.assign(DIGITS2)  # told again, with a new counter
        await world.until(lambda: world.controller.reports[-1].counter == world.controller.counter)
        assert [load.digest for load in world.workers.started] == [good, bad]
        assert world.agent.service.find("digits").installed.version == "1.0.0"

    scene(story)


def test_a_refused_version_is_tried_again_after_another_was_assigned(scene):
    async def story(world):
        good, bad = world.controller.release(), world.controller.release(version="2.0.0")
        world.workers.probe[bad] = "off"
        await world.boot()
        world.controller.assign(DIGITS2)
        assert (await world.settled(bad)).phase == "failed"
        world.controller.assign(DIGITS1)
        await world.serving(good)
        del world.workers.probe[bad]
        world.controller.assign(DIGITS2)
        await world.serving(bad)

    scene(story)


def test_a_device_that_no_variant_fits_refuses_with_the_reason_and_fetches_no_part(scene):
    async def story(world):
        digest = world.controller.release(ram_mb=512)
        await world.boot()
        world.controller.assign(DIGITS1)
        state = await world.settled(digest)
        assert state.phase == "refused"
        assert "needs 512 MiB of memory, 64 MiB are offered" in state.reason
        assert {need.sha256 for need in world.controller.needs} <= {digest, world.controller.metadata.sha256}

    scene(story)


def test_a_bundle_signed_by_a_key_that_the_repository_does_not_list_is_refused(scene):
    async def story(world):
        good = world.controller.release()
        await world.boot()
        world.controller.assign(DIGITS1)
        await world.serving(good)
        world.controller.online, keep = world.controller.online, world.controller.targets
        bad = world.controller.release(version="2.0.0", key=signing.new_key())
        world.controller.assign(DIGITS2)
        state = await world.settled(bad)
        assert state.phase == "refused"
        assert "not trusted" in state.reason
        assert world.state("digits", good).phase == "serving"
        world.controller.targets = keep
        better = world.controller.release(version="3.0.0")
        world.controller.assign(("digits", "3.0.0"))
        await world.serving(better)

    scene(story)


def test_metadata_that_was_damaged_on_the_disk_is_fetched_again_and_refuses_nothing(scene):
    async def story(world):
        first, second = world.controller.release(), world.controller.release(version="2.0.0")
        await world.boot()
        world.controller.assign(DIGITS1)
        await world.serving(first)
        damaged = world.data / "objects" / world.controller.metadata.sha256
        damaged.chmod(0o644)
        damaged.write_bytes(damaged.read_bytes().replace(b"targets", b"tergets"))
        world.controller.assign(DIGITS2)
        await world.serving(second)

    scene(story)


def test_a_release_that_only_the_assignment_names_is_refused(scene):
    async def story(world):
        digest = world.controller.release()
        world.controller.targets = signing.new_targets(world.controller.publisher, dt.datetime.now(dt.UTC))
        world.controller.refresh()
        await world.boot()
        world.controller.assign(DIGITS1)
        state = await world.settled(digest)
        assert state.phase == "refused"
        assert "does not list skills/digits/1.0.0.json" in state.reason

    scene(story)


def test_a_refusal_for_want_of_a_listing_ends_when_the_listing_comes(scene):
    async def story(world):
        listed = world.controller.targets
        digest = world.controller.release()
        listed, world.controller.targets = world.controller.targets, listed
        world.controller.refresh()
        await world.boot()
        world.controller.assign(DIGITS1)
        assert (await world.settled(digest)).phase == "refused"
        await world.power_cut()
        await world.boot()
        assert (await world.settled(digest)).phase == "refused"
        world.controller.targets = listed
        world.controller.refresh()
        world.controller.tell()  # the same releases, the same counter, other metadata
        await world.serving(digest)

    scene(story)


def test_metadata_that_the_controller_lost_holds_nothing_against_the_release(scene):
    async def story(world):
        digest = world.controller.release()
        del world.controller.objects[world.controller.metadata.sha256]
        await world.boot()
        world.controller.assign(DIGITS1)
        state = await world.settled(digest)
        assert (state.phase, "no such object" in state.reason) == ("failed", True)
        world.controller.refresh()
        world.controller.tell()
        await world.serving(digest)

    scene(story)


def test_a_failed_probe_is_not_held_against_the_version_that_is_wanted_meanwhile(scene):
    async def story(world):
        bad, good = world.controller.release(), world.controller.release(version="2.0.0")
        world.workers.probe[bad] = "off"
        world.workers.probe_hold = asyncio.Event()
        await world.boot()
        world.controller.assign(DIGITS1)
        await world.until(lambda: world.workers.alive)
        world.controller.assign(DIGITS2)
        await world.until(lambda: world.agent.reconciler.assignment.counter == world.controller.counter)
        world.workers.probe_hold.set()
        await world.serving(good)

    scene(story)


def test_a_byte_flipped_in_the_controllers_store_is_refused_with_the_part_named(scene):
    async def story(world):
        good = world.controller.release()
        await world.boot()
        world.controller.assign(DIGITS1)
        await world.serving(good)
        bad = world.controller.release(version="2.0.0", weights=os.urandom(300_000))
        wire = next(
            p.wire_sha256 for p in world.controller.bundles[DIGITS2].bundle.parts if p.path.startswith("models")
        )
        content = bytearray(world.controller.objects[wire])
        content[100_000] ^= 1
        world.controller.objects[wire] = bytes(content)
        world.controller.assign(DIGITS2)
        state = await world.settled(bad)
        assert state.phase == "refused"
        assert "part models/net.onnx: chunk 1 arrived with another hash" in state.reason
        assert world.state("digits", good).phase == "serving"

    scene(story)


def test_an_object_that_the_controller_lost_fails_the_version_with_the_controllers_words(scene):
    async def story(world):
        digest = world.controller.release()
        wire = world.controller.bundles[DIGITS1].bundle.parts[0].wire_sha256
        del world.controller.objects[wire]
        await world.boot()
        world.controller.assign(DIGITS1)
        state = await world.settled(digest)
        assert state.phase == "failed"
        assert "no such object" in state.reason

    scene(story)


def test_lost_chunks_are_asked_for_again_and_no_verified_chunk_twice(scene):
    async def story(world):
        digest = world.controller.release(weights=os.urandom(1_000_000))
        dropped: set[tuple[int, int]] = set()

        def lose_each_third_once(client: str, message: object) -> bool:
            if client != "board-1" or not message.topic.endswith("/blk"):
                return False
            chunk = decode_chunk(message.payload)
            key = (chunk.transfer, chunk.index)
            if chunk.index % 3 == 0 and key not in dropped:
                dropped.add(key)
                return True
            return False

        world.broker.lose = lose_each_third_once
        await world.boot()
        world.controller.assign(DIGITS1)
        state = await world.serving(digest)
        assert dropped
        lost = sum(1 for _ in dropped) * CHUNK_BYTES
        assert world.controller.sent_bytes <= state.received_bytes + lost

    scene(story)


def test_a_resume_after_a_power_cut_fetches_only_what_is_missing(scene):
    async def story(world):
        digest = world.controller.release(weights=os.urandom(2_000_000))
        part = next(p for p in world.controller.bundles[DIGITS1].bundle.parts if p.path == "models/net.onnx")
        await world.boot()
        give, allowed = world.controller.give, 10

        def give_ten(need):
            nonlocal allowed
            if need.sha256 != part.wire_sha256:
                return give(need)
            chunks = [i for a, b in need.ranges for i in range(a, b)][:allowed]
            allowed -= len(chunks)
            return give(dataclasses.replace(need, ranges=tuple((i, i + 1) for i in chunks))) if chunks else None

        world.controller.give = give_ten
        world.controller.assign(DIGITS1)
        await world.until(lambda: allowed == 0 and not world.agent._intake._inbox)
        await world.power_cut()
        world.controller.give = give
        world.controller.needs.clear()
        await world.boot()
        await world.serving(digest)
        asked = [
            i for n in world.controller.needs if n.sha256 == part.wire_sha256 for a, b in n.ranges for i in range(a, b)
        ]
        assert sorted(asked) == list(range(10, len(part.chunks)))

    scene(story)


def test_a_silent_controller_is_reported_as_stalled_and_tried_again(scene):
    async def story(world):
        digest = world.controller.release()
        give, world.controller.give = world.controller.give, world.controller.needs.append
        await world.boot()
        world.controller.assign(DIGITS1)
        await world.until(lambda: (s := world.state("digits", digest)) is not None and s.phase == "stalled")
        assert "in 5 rounds" in world.state("digits", digest).reason
        world.controller.give = give
        await world.serving(digest)

    scene(story)


def test_a_device_without_room_is_stalled_and_serves_when_there_is_some(scene, monkeypatch):
    async def story(world):
        digest = world.controller.release()
        with monkeypatch.context() as full:
            full.setattr("edge_agent.store.Store.room", lambda _: 1000)
            await world.boot()
            world.controller.assign(DIGITS1)
            await world.until(lambda: (s := world.state("digits", digest)) is not None and s.phase == "stalled")
            await asyncio.sleep(600)
            state = world.state("digits", digest)
            assert state.phase == "stalled"
            assert "kB of free disk, 1.0 kB are there" in state.reason
        await world.serving(digest)

    scene(story)


def test_an_assignment_that_answers_no_nonce_of_this_connection_installs_nothing(scene):
    async def story(world):
        digest = world.controller.release()
        world.controller.answers_nonce = False
        await world.boot()
        world.controller.assign(DIGITS1)
        await world.until(lambda: (s := world.state("digits", digest)) is not None and "is current" in s.reason)
        assert not world.workers.started
        world.controller.answers_nonce = True
        world.controller.tell()
        await world.serving(digest)

    scene(story)


@pytest.mark.parametrize("what", ["unsigned", "foreign", "older", "other key"])
def test_an_unsigned_foreign_or_older_assignment_changes_nothing(scene, what):
    async def story(world):
        good, other = world.controller.release(), world.controller.release(version="2.0.0")
        await world.boot()
        world.controller.assign(DIGITS1)
        await world.serving(good)
        forged = dataclasses.replace(world.controller.assignment(), skills=(world.controller.releases[DIGITS2],))
        key = world.controller.director
        match what:
            case "unsigned":
                sealed = b'{"payload":"e30=","signature":""}'
            case "foreign":
                sealed = seal(dataclasses.replace(forged, device="board-2", counter=99), key)
            case "older":
                sealed = seal(dataclasses.replace(forged, counter=0), key)
            case _:
                sealed = seal(dataclasses.replace(forged, counter=99), signing.new_key())
        world.controller.mqtt.publish(topics.down("board-1", "desired"), sealed)
        world.controller.command("q", b"{}", op="infer", skill="digits")
        await world.until(lambda: "q" in world.controller.results)
        assert json.loads(world.controller.results["q"][1]) == {"version": "1.0.0"}
        assert world.state("digits", other) is None

    scene(story)


def test_expired_metadata_blocks_an_install_until_it_is_signed_anew_and_stops_nothing(scene):
    async def story(world):
        good, late = world.controller.release(), world.controller.release(version="2.0.0")
        await world.boot()
        world.controller.assign(DIGITS1)
        await world.serving(good)
        month = dt.timedelta(days=30)  # the controller's clock goes on, its metadata is not signed anew
        world.controller.time += int(month.total_seconds())
        world.controller.assign(DIGITS2)
        await world.until(lambda: (s := world.state("digits", late)) is not None and s.phase == "stalled")
        assert "expired" in world.state("digits", late).reason
        assert world.state("digits", good).phase == "serving"
        world.controller.refresh(NOW + month)
        world.controller.tell()
        await world.serving(late)

    scene(story)


def test_a_device_whose_clock_is_wrong_takes_the_time_from_the_signed_assignment(scene, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 0.0)  # no battery: 1970

    async def story(world):
        digest = world.controller.release()
        await world.boot()
        world.controller.assign(DIGITS1)
        await world.serving(digest)

    scene(story)


def test_a_skill_that_is_no_longer_assigned_is_removed_with_its_files(scene):
    async def story(world):
        digest = world.controller.release()
        await world.boot()
        world.controller.assign(DIGITS1)
        await world.serving(digest)
        world.controller.assign()
        await world.until(lambda: not world.controller.reports[-1].skills)
        await world.until(lambda: not list((world.data / "versions").iterdir()))
        assert not world.workers.alive

    scene(story)


def test_an_older_assignment_replayed_to_a_device_that_lost_its_last_one_removes_nothing(scene):
    async def story(world):
        digest = world.controller.release()
        await world.boot()
        world.controller.assign()
        world.controller.assign(DIGITS1)
        await world.serving(digest)
        await world.power_cut()
        (world.data / "assignment.json").write_bytes(b"torn")
        world.controller.counter, world.controller.wanted, world.controller.answers_nonce = 1, (), False
        world.controller.tell()
        await world.boot()
        await world.until(lambda: world.controller.reports and world.controller.reports[-1].counter == 1)
        await asyncio.sleep(3600)
        assert world.agent.service.find("digits").installed.version == "1.0.0"
        assert (world.data / "active/digits.json").exists()
        world.controller.answers_nonce = True  # the controller itself says so, to this very boot
        world.controller.tell()
        await world.until(lambda: not world.controller.reports[-1].skills)

    scene(story)


def test_a_disk_that_will_not_be_cleared_is_a_warning_once(scene, monkeypatch, caplog):
    async def story(world):
        caplog.set_level("DEBUG", "skerry.agent")
        with monkeypatch.context() as broken:

            def refuse(*_):
                raise StorageError("cannot remove x: Input/output error")

            broken.setattr("edge_agent.store.Store.collect", refuse)
            await world.boot()
            for number in (1, 2):
                digest = world.controller.release(version=f"{number}.0.0")
                world.controller.assign(("digits", f"{number}.0.0"))
                await world.serving(digest)
                await asyncio.sleep(1)
        told = [record.levelname for record in caplog.records if "disk.uncollected" in record.message]
        assert told[0] == "WARNING"
        assert set(told[1:]) == {"DEBUG"}

    scene(story)


def test_garbage_collection_keeps_the_serving_and_the_previous_version(scene):
    async def story(world):
        digests = [world.controller.release(version=f"{n}.0.0", weights=bytes([n]) * 100_000) for n in (1, 2, 3)]
        await world.boot()
        for n, digest in enumerate(digests, 1):
            world.controller.assign(("digits", f"{n}.0.0"))
            await world.serving(digest)
            await world.until(lambda: not world.agent.reconciler.pointers()["digits"].trial)
        kept = {path.name for path in (world.data / "versions").iterdir()}
        assert kept == set(digests[1:])

    scene(story)


def test_a_full_disk_at_any_write_is_reported_and_the_old_version_serves(scene, monkeypatch):
    """Each write, link, rename and fsync of an update fails once with ENOSPC; then there is room again."""

    async def story(world):
        good = world.controller.release()
        await world.boot()
        world.controller.assign(DIGITS1)
        await world.serving(good)
        await world.until(lambda: not world.agent.reconciler.pointers()["digits"].trial)
        calls = {"count": 0, "fail": 1}
        names = ("fsync", "replace", "link", "pwrite")
        for name in names:
            real = getattr(os, name)

            def failing(*arguments, real=real):
                calls["count"] += 1
                if calls["count"] == calls["fail"]:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real(*arguments)

            monkeypatch.setattr(os, name, failing)
        version, failures = 1, 0
        while failures < 100:
            version += 1
            calls["fail"] = 10**9
            digest = world.controller.release(version=f"{version}.0.0", weights=os.urandom(100_000))
            calls["count"], calls["fail"] = 0, failures + 1
            world.controller.assign(("digits", f"{version}.0.0"))
            await world.until(
                lambda digest=digest: (
                    world.agent.service.find("digits")
                    and (s := world.state("digits", digest)) is not None
                    and s.phase in ("serving", "refused", "failed")
                )
            )
            assert world.state("digits", digest).phase == "serving"
            assert world.agent.service.find("digits").installed.version == f"{version}.0.0"
            if calls["count"] < calls["fail"]:
                break
            failures += 1
        assert 10 < failures < 100

    scene(story)


def test_any_bytes_on_any_topic_leave_the_device_serving(scene):
    async def story(world):
        digest = world.controller.release()
        await world.boot()
        world.controller.assign(DIGITS1)
        await world.serving(digest)
        for kind in ("desired", "cmd", "blk"):
            for junk in (b"x", b"\x00" * 40, b"{}", b'{"payload":1}', b"\xff" * 70_000, b"\x00\x00\x00\x02{}"):
                world.controller.mqtt.publish(topics.down("board-1", kind), junk)
        world.controller.command("q", b"{}", op="infer", skill="digits")
        await world.until(lambda: "q" in world.controller.results)
        assert world.controller.results["q"][0]["ok"] is True

    scene(story)


def test_a_manifest_that_lies_about_its_name_is_refused(scene):
    async def story(world):
        world.controller.release()
        wanted = world.controller.releases[DIGITS1]
        ref, target = wanted.manifest, signing.release_target("photos", "1.0.0")
        world.controller.targets = signing.add_release(
            world.controller.targets, target, ref, world.controller.publisher, dt.datetime.now(dt.UTC)
        )
        world.controller.refresh()
        world.controller.releases["photos", "1.0.0"] = dataclasses.replace(wanted, skill="photos", target=target)
        await world.boot()
        world.controller.assign(("photos", "1.0.0"))
        state = await world.settled(ref.sha256, "photos")
        assert state.phase == "refused"
        assert "digits 1.0.0" in state.reason

    scene(story)


def test_the_device_knows_its_objects_by_their_content(scene):
    async def story(world):
        digest = world.controller.release()
        await world.boot()
        world.controller.assign(DIGITS1)
        await world.serving(digest)
        for path in (world.data / "objects").iterdir():
            assert sha256_hex(path.read_bytes()) == path.name
        with pytest.raises(FormatError):
            await world.agent.service.infer("digits", None, b"", 0, 0)

    scene(story)


def test_an_end_without_a_reason_is_said_as_one_and_a_broker_of_another_ca_by_what_it_is(scene, caplog):
    async def story(world):
        agent = await world.boot()
        agent._look_at_standing = lambda: "foreign"
        await world.until(lambda: agent.reconciler.connected)
        agent._mqtt.put(Disconnected("10.0.0.1:8883: Unspecified error"))
        await world.until(lambda: not agent.reconciler.connected)
        lost = [record.message for record in caplog.records if "broker.lost" in record.message]
        assert lost == ["broker.lost reason='10.0.0.1:8883: the connection was closed, and the broker gave no reason'"]
        await world.until(lambda: agent.status()["away"] == FOREIGN)

    scene(story)


def test_a_device_that_was_removed_says_so_once_and_goes_on_serving(scene, caplog):
    async def story(world):
        digest = world.controller.release()
        agent = await world.boot()
        looks = iter(["silent", "unknown"])
        agent._look_at_standing = lambda: next(looks)
        world.controller.assign(DIGITS1)
        await world.serving(digest)
        for _ in range(6):
            world.broker.cut("board-1")
            agent._mqtt.put(Disconnected("it ended"))
            await asyncio.sleep(50)
        assert agent.status()["away"] == unknown(agent._identity)
        told = [record.message for record in caplog.records if "device.unknown" in record.message]
        assert len(told) == 1
        assert "the controller no longer knows this device: enrol it again" in told[0]
        assert agent.service.find("digits").installed.version == "1.0.0"

    scene(story)
