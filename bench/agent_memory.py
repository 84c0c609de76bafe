"""Memory of an agent that serves one skill and is connected: supervisor, zygote, worker, beside a bare Python.

    python bench/agent_memory.py [--skill FOLDER] [--rounds 5] [--runtimes onnxruntime] [--json]

Without --skill the digits skill is built first (a minute). A controller on this machine brings it to one device; then the
agent is started anew for each round, answers QUESTIONS questions and is looked at. Read from the kernel (smaps_rollup):

    private  pages that no other process has: what this process adds to a machine where the others run already
    PSS      private, and of every shared page the share of one: adds up over all processes, and falls with their number
    RSS      every page that the process sees: what it would cost on a machine where nothing else runs
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cloud import watch
from cloud.authoring import build_skill
from cloud.cli.screen import Manner, Screen
from cloud.demo.board import Board
from cloud.demo.scene import Scene, machine
from cloud.demo.smaller import load_recipe
from cloud.publish import publish
from edge_agent.status import read_status
from skills import oip

DEVICE = "dock"
QUESTIONS = 200
DEADLINE_S = 60.0
LOOK_EVERY_S = 0.1
BARE, WORKER = "bare python", "worker"
Sizes = dict[str, float]


def memory(pid: int) -> Sizes:
    """Return what a process holds, in MB of 1,000,000 bytes."""
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        found[name.rstrip(":")] = int(value)
    kib = {"private": found["Private_Clean"] + found["Private_Dirty"], "pss": found["Pss"], "rss": found["Rss"]}
    return {name: value * 1024 / 1e6 for name, value in kib.items()}


def bare() -> Sizes:
    """Measure an interpreter that has imported nothing and waits."""
    command = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        return memory(process.pid)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def agent(board: Board) -> dict[str, Sizes]:
    """Start the agent, let it answer, measure its processes, stop it."""
    import numpy as np

    board.start()
    try:
        for _ in range(QUESTIONS):
            board.ask("digits", oip.Call({"image": np.zeros((1, 8, 8), np.uint8)}))
        end = time.monotonic() + DEADLINE_S
        while not (status := read_status(board.folder))["connected"]:
            if time.monotonic() > end:
                sys.exit("the agent did not find its controller")
            time.sleep(LOOK_EVERY_S)
        (zygote,) = children(status["pid"])
        (worker,) = children(zygote)
        return {"supervisor": memory(status["pid"]), "zygote": memory(zygote), WORKER: memory(worker)}
    finally:
        board.stop()


def measure(folder: Path, skill: Path, rounds: int, runtimes: str) -> dict[str, Sizes]:
    """Return the medians over all rounds."""
    found: dict[str, list[Sizes]] = {}
    with Scene(folder, Screen(Manner(quiet=True))) as scene:
        scene.start_controller()
        board = scene.add_board(DEVICE, f"runtimes: [{runtimes}]\n" if runtimes else "", {})
        scene.wait_online(DEVICE)
        release = build_skill(skill, folder / "digits.skb", lambda text: None)
        publish(scene.client, folder / "digits.skb", scene.publisher_key)
        started = scene.client.push("digits", release.skill.version, "all", None)
        ended = watch.follow(scene.client, started.id, DEADLINE_S, lambda look: None)
        if {member.stage for member in ended.devices} != {"serving"}:
            sys.exit(f"the skill does not serve: {[member.reason for member in ended.devices]}")
        board.stop()
        for _ in range(rounds):
            for name, sizes in {BARE: bare(), **agent(board)}.items():
                found.setdefault(name, []).append(sizes)
    return {
        name: {key: statistics.median(sizes[key] for sizes in all_sizes) for key in all_sizes[0]}
        for name, all_sizes in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skill", type=Path, help="the digits skill's folder, as its recipe makes it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--runtimes", default="", help="only these, separated by commas (default: all that are installed)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as name:
        folder = Path(name)
        if given.skill is None:
            load_recipe("digits").build(folder / "digits", lambda stage, share, best: None)
        rows = measure(folder, given.skill or folder / "digits", given.rounds, given.runtimes)
    if given.json:
        print(json.dumps({"machine": machine(), "unit": "MB", "rows": rows}, indent=2))
        return
    print("| process | private, MB | PSS, MB | RSS, MB |\n|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['private']:.1f} | {row['pss']:.1f} | {row['rss']:.1f} |")
    print(
        f"\na worker adds {rows[WORKER]['private']:.1f} MB to what it shares with the zygote; medians of {given.rounds}"
    )


if __name__ == "__main__":
    main()
