"""From `push` to serving on three agents: real processes on this machine, TLS, a mosquitto or amqtt broker.

    python bench/push.py [--rounds 5] [--json]

The digits skill is built once. Round 1 brings all of it to three agents that have never run a skill (their runtimes start
too); each further round brings a release whose control code changed, so that the model does not travel again. Time runs
from the call of `push` until the rollout reports every device as serving.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from cloud import watch
from cloud.authoring import build_skill
from cloud.cli.screen import Manner, Screen
from cloud.demo.scene import Scene, machine, replaced
from cloud.demo.smaller import load_recipe
from cloud.publish import publish

DEVICES = ("dock", "pier", "quay")
DEADLINE_S = 60.0


def measure(folder: Path, rounds: int) -> list[dict[str, float]]:
    """Return seconds and bytes to each device of every round."""
    load_recipe("digits").build(folder / "digits", lambda stage, share, best: None)
    found = []
    with Scene(folder, Screen(Manner(quiet=True))) as scene:
        scene.start_controller()
        for name in DEVICES:
            scene.add_board(name, "", {})
        scene.wait_online(*DEVICES)
        for number in range(rounds):
            source = folder / f"digits-1.{number}.0"
            version = ("version: 1.0.0", f"version: 1.{number}.0")
            replaced(folder / "digits", source, skill_yaml=version)
            code = source / "classify.py"
            code.write_text(code.read_text() + f"\n# {number}\n")
            build_skill(source, folder / f"{number}.skb", lambda text: None)
            publish(scene.client, folder / f"{number}.skb", scene.publisher_key)
            begin = time.perf_counter()
            started = scene.client.push("digits", f"1.{number}.0", "all", None)
            ended = watch.follow(scene.client, started.id, DEADLINE_S, lambda look: None)
            took = time.perf_counter() - begin
            if {member.stage for member in ended.devices} != {"serving"}:
                sys.exit(
                    f"round {number + 1}: {[(member.device, member.stage, member.reason) for member in ended.devices]}"
                )
            found.append({"seconds": took, "bytes": max(member.received_bytes for member in ended.devices)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as folder:
        found = measure(Path(folder), given.rounds)
    if given.json:
        print(json.dumps({"machine": machine(), "devices": len(DEVICES), "rounds": found}, indent=2))
        return
    later = [row["seconds"] for row in found[1:]]
    print(
        f"first release (everything travels, runtimes start): {found[0]['seconds']:.2f} s, {found[0]['bytes']} bytes a device"
    )
    if later:
        print(
            f"later releases (changed code travels): median {statistics.median(later):.2f} s, {found[-1]['bytes']} bytes a device"
        )


if __name__ == "__main__":
    main()
