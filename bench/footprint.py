"""Start-up time and memory of the two console scripts, beside a bare Python in the same run.

    python bench/footprint.py [--json]

Each command runs in turn, interleaved, ROUNDS times; time is wall clock from start to exit, memory is the peak resident
set of the process as the kernel counted it (`ru_maxrss` of the child). Ratios over the bare interpreter are what to read.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import sysconfig
import time
from pathlib import Path

ROUNDS = 9
SCRIPTS = Path(sysconfig.get_path("scripts"))
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "skerry --version": [str(SCRIPTS / "skerry"), "--version"],
    "skerry --help": [str(SCRIPTS / "skerry"), "--help"],
    "skerry-agent --version": [str(SCRIPTS / "skerry-agent"), "--version"],
    "skerry-agent --help": [str(SCRIPTS / "skerry-agent"), "--help"],
}


def run_once(command: list[str]) -> tuple[float, float]:
    """Return (seconds, peak MiB) of one run."""
    started = time.perf_counter()
    pid = os.posix_spawn(
        command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    )
    _, status, usage = os.wait4(pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        run_once(command)  # warm the page cache and the byte code
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            runs[name].append(run_once(command))
    rows = {
        name: {"ms": statistics.median(t for t, _ in found) * 1e3, "mib": statistics.median(m for _, m in found)}
        for name, found in runs.items()
    }
    if arguments.json:
        print(json.dumps({"machine": platform.platform(), "python": platform.python_version(), "rows": rows}, indent=2))
        return
    base = rows["python -c pass"]
    print("| command | start to exit, ms | × bare Python | peak MiB |\n|---|---|---|---|")
    for name, row in rows.items():
        print(f"| `{name}` | {row['ms']:.0f} | {row['ms'] / base['ms']:.1f} | {row['mib']:.0f} |")


if __name__ == "__main__":
    main()
