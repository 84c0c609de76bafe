"""How much memory the segments of a model take, measured in a process that loads and runs one after the other.

`python -m cloud.split.memory SHAPES FILE…` prints a JSON list of MiB, above what the bare runtime takes: after one segment,
two, … SHAPES is JSON, the sizes of tensors that go in.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from skills.footprint import grown_mb

DEADLINE_S = 300.0


def measured_mb(files: Sequence[Path], shapes: Mapping[str, Sequence[int]] | None = None) -> tuple[float, ...]:
    """Return the MiB that the first 1, 2, … segments take, arenas and packed weights included; empty where it cannot be told.

    `shapes` has the sizes of the tensors that go into them; of one that it does not name, the graph's own, 1 where they are free.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "cloud.split.memory", json.dumps(shapes or {}), *map(str, files)],
            capture_output=True, timeout=DEADLINE_S, check=True,
        )  # fmt: skip
        found = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()
    return tuple(float(one) for one in found) if len(found) == len(files) else ()


def _main(shapes: Mapping[str, Sequence[int]], files: Sequence[str]) -> None:
    import numpy as np

    from skills import ort

    ort.runtime()
    chance, sessions = np.random.default_rng(0), []

    def one_more(file: str) -> None:
        one = ort.session(Path(file))
        sessions.append(one)  # a device keeps them all
        feeds = {}
        for port in one.inputs:
            shape = shapes.get(port.name, [1 if size == -1 else size for size in port.shape])
            kind = np.dtype(port.dtype)
            feeds[port.name] = (chance.random(shape) if kind.kind == "f" else np.zeros(shape)).astype(kind)
        one.run(feeds)

    print(json.dumps(grown_mb(functools.partial(one_more, file) for file in files)))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]), sys.argv[2:])
