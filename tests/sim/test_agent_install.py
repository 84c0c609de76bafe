"""From an assignment to a serving skill, and everything that may go wrong between, on a clock that jumps."""

import json

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

    scene(story)
