"""How a split plan lies on the tail's disk: DIR/<plan hash>/split.yaml beside its segments; the one place that writes it."""

import shutil
from collections.abc import Callable
from pathlib import Path

from skills.files import fsync_directory, storage_errors, write_atomic
from skills.split_plan import Plan, plan_hash


def lay_out(plan: Plan, text: str, read: Callable[[str], bytes], tails: Path) -> bool:
    """Write `text`, the plan's own, and the files that `read` gives by the plan's paths; False when all of it lay there.

    Only one caller at a time may write to `tails`.

    Raises:
        StorageError: the disk is full; a tail never sees the half of it.
    """
    name = plan_hash(plan)
    target, work = tails / name, tails / f".{name}.tmp"
    if (target / "split.yaml").is_file():
        return False
    with storage_errors(target):
        # 1. Everything under a name that no tail looks at. A crash leaves it, and the next attempt begins with removing it.
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        for file in plan.files():
            (work / file).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(work / file, read(file))
        write_atomic(work / "split.yaml", text.encode())
        # 2. Commit point: the folder moves. What lay there without a plan was never served.
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
        fsync_directory(tails)
    return True
