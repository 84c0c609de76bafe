"""The split plans that a tail serves: DIR/<plan hash>/split.yaml and segments, checked and loaded when first asked for."""

import concurrent.futures
import contextlib
import dataclasses
import re
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud.split.segment import join
from cloud.tail import pace
from cloud.tail.guard import NotPermitted
from cloud.tail.joined import Joined, joined, through
from cloud.tail.layout import lay_out
from cloud.tail.pace import Batching, Pace
from cloud.tail.stage_host import StageHost
from skills import ort
from skills.bundle import MAX_PART_BYTES
from skills.errors import FormatError, NotFound, TrustError, Unreachable
from skills.files import read_bytes, sha256_file
from skills.split_plan import MAX_PLAN_BYTES, Plan, load_plan, plan_hash
from skills.stages import check_stages

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

MAX_LOADED = 16  # plans held in memory; the one used longest ago makes room
WAIT_S = 0.05  # for somebody else's loading: a device should hear of it while it still waits, and a wait keeps a thread
MEASURE_WAIT_S = 60.0  # the same on a thread that answers nobody


class Loading(Unreachable):
    """Somebody else is loading the plan: ask again in a moment."""


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """A plan whose segments' hashes were checked, and its warm sessions, or the process that runs its stages.

    `joined` has all that is behind a cut as one graph, by the number of segments on the device, where that is faster.
    """

    name: str
    plan: Plan
    chain: ort.Chain | StageHost
    pace: Pace
    joined: dict[int, Joined] = dataclasses.field(default_factory=dict)

    def run(self, values: "Arrays", segment: int, until_s: float) -> "tuple[Arrays, int]":
        """Run one segment, or all from it on where they are joined; return what lives on and which segment is next.

        Code of a skill is waited for until `until_s` (monotonic), a graph until it is done.

        Raises:
            SkerryError: as `ort.Chain.run` or `StageHost.run`.
        """
        if isinstance(self.chain, StageHost):
            return self.chain.run(values, segment, segment + 1, until_s=until_s), segment + 1
        whole = self.joined.get(segment)
        if whole is not None and whole.soon(values):
            return whole.chain.run(values), len(self.plan.segments)
        return self.chain.run(values, segment, segment + 1), segment + 1


class Store:
    """Finds plans by hash; safe to use from many threads.

    `may_run` is asked before the code of a plan of stages is touched, and raises NotPermitted where it must not run.
    """

    def __init__(self, folder: Path, threads: int = 1, may_run: Callable[[str], None] | None = None) -> None:
        self._folder, self._threads, self._may_run = folder, threads, may_run or _never
        self._lock = threading.Lock()
        self._loading: dict[str, concurrent.futures.Future[Loaded]] = {}  # by whoever asked first
        self._loaded: dict[str, Loaded] = {}

    def names(self) -> tuple[str, ...]:
        """Return the hashes of the plans that lie in the folder, the newest first."""
        found = []
        for path in self._folder.glob("*/split.yaml"):
            with contextlib.suppress(OSError):  # removed at this moment
                if is_hash(path.parent.name):
                    found.append((-path.stat().st_mtime_ns, path.parent.name))
        return tuple(name for _, name in sorted(found))

    def loaded(self) -> tuple[str, ...]:
        """Return the hashes of the plans in memory, the one used last at the end."""
        with self._lock:
            return tuple(self._loaded)

    def measure(self, name: str, budget_s: float) -> Loaded:
        """Load a plan if it is not, and measure its batch sizes if they are not.

        Raises:
            NotFound, TrustError, NotPermitted, FormatError, Loading: as `get`.
        """
        found = self.get(name, MEASURE_WAIT_S)
        if isinstance(found.chain, StageHost):
            why = Batching(why="the stages of a skill are asked one by one")
            found.pace.batching = {cut.after: why for cut in found.plan.cuts if cut.after < len(found.plan.segments)}
        elif not found.pace.batching:
            join = partial(self._join, found.plan, self._folder / name)
            found.joined.update(joined(found.plan, found.chain, join, budget_s))
            chain, whole = found.chain, found.joined
            pace.measure(
                found.plan, chain, found.pace, budget_s,
                run=lambda after, values: through(chain, whole.get(after), after, values),
            )  # fmt: skip
        return found

    def paces(self) -> dict[str, Pace]:
        """Return what is known of the speed of each plan in memory."""
        with self._lock:
            return {name: found.pace for name, found in self._loaded.items()}

    def forget(self, name: str) -> None:
        """Let go of a plan; requests that run keep what they hold of it."""
        with self._lock:
            self._loaded.pop(name, None)

    def get(self, name: str, wait_s: float = WAIT_S) -> Loaded:
        """Return the plan of that hash, loading and warming it the first time; who asks meanwhile waits up to `wait_s`.

        Raises:
            NotFound: no such plan lies here.
            TrustError: its folder's name is not its hash, or a segment's hash is not the plan's.
            NotPermitted: it is code, which this tail may not run.
            FormatError: split.yaml or a segment is not what it should be.
            Loading: somebody else is loading it still.
        """
        found = self._held(name)
        if found is not None:
            return found
        if not is_hash(name) or not (self._folder / name / "split.yaml").is_file():
            raise NotFound(f"no plan {name[:32]!r} lies here: publish its skill to this controller again")
        mine: concurrent.futures.Future[Loaded] = concurrent.futures.Future()
        with self._lock:
            if name in self._loaded:
                return self._loaded[name]
            theirs = self._loading.setdefault(name, mine)
        if theirs is not mine:
            try:
                return theirs.result(wait_s)
            except concurrent.futures.TimeoutError:
                raise Loading(f"the plan {name} is being loaded: ask again, or answer on the device") from None
        try:
            found = self._load(name)
        except BaseException as error:
            with self._lock:
                del self._loading[name]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._loading[name]
            self._loaded[name] = found
            while len(self._loaded) > MAX_LOADED:
                self._loaded.pop(next(iter(self._loaded)))
        mine.set_result(found)
        return found

    def _join(self, plan: Plan, folder: Path, after: int) -> ort.Chain:
        """Return the segments behind `after` as one graph; raises FormatError where that is not to be had."""
        files = [folder / segment.file for segment in plan.segments[after:]]
        outputs = [tensor.name for tensor in plan.outputs]
        whole = join(files, outputs).SerializeToString()
        return ort.Chain.of([ort.session(whole, self._threads, beside=files[0].parent)], outputs)

    def _held(self, name: str) -> Loaded | None:
        with self._lock:
            found = self._loaded.pop(name, None)
            if found is not None:
                self._loaded[name] = found  # now the one used last
            return found

    def _load(self, name: str) -> Loaded:
        folder = self._folder / name
        plan = load_plan(
            read_bytes(folder / "split.yaml", "the split plan", MAX_PLAN_BYTES).decode("utf-8", "replace"),
            f"{name}/split.yaml",
        )
        if plan_hash(plan) != name:
            raise TrustError(f"the folder {name} holds the plan {plan_hash(plan)}")
        if plan.stages:
            self._may_run(name)
            check_stages(plan)
        for part in (*plan.segments, *plan.parts, *((plan.shared,) if plan.shared else ())):
            file = folder / part.file
            if not file.is_file():
                raise NotFound(f"the plan {name} names {part.file}, which is not there")
            if sha256_file(file) != part.sha256:
                raise TrustError(f"the segment {part.file} of plan {name} is not the one that was planned")
        if plan.stages:
            return Loaded(name, plan, StageHost(folder, name, plan, self._threads), Pace(len(plan.segments)))
        chain = ort.chain(
            [folder / segment.file for segment in plan.segments],
            [tensor.name for tensor in plan.outputs],
            self._threads,
        )
        _warm(plan, chain)
        return Loaded(name, plan, chain, Pace(len(plan.segments)))


def _never(plan: str) -> None:
    raise NotPermitted(f"the plan {plan} is a skill's code, and this tail runs none")


def is_hash(name: str) -> bool:
    """Say whether `name` has the form of a plan hash."""
    return re.fullmatch(r"[0-9a-f]{16}", name) is not None


def install(plan_folder: Path, tails: Path) -> str:
    """Copy a finished plan to where a tail finds it and return its hash; an interrupted copy is never served.

    Raises:
        NotFound, FormatError: the folder holds no valid plan.
        StorageError: the disk is full.
    """
    text = read_bytes(plan_folder / "split.yaml", "the split plan", MAX_PLAN_BYTES).decode("utf-8", "replace")
    plan = load_plan(text, str(plan_folder / "split.yaml"))
    lay_out(plan, text, lambda file: read_bytes(plan_folder / file, "the segment", MAX_PART_BYTES), tails)
    return plan_hash(plan)


def _warm(plan: Plan, chain: ort.Chain) -> None:
    """Run every segment once on zeros, so that the first request does not pay for lazy set-up."""
    import numpy as np

    from skills.codec import DTYPES

    feeds = {
        live.name: np.zeros([1 if size == -1 else size for size in live.shape], DTYPES[live.dtype])
        for live in plan.inputs
    }
    try:
        chain.run(feeds)
    except FormatError:
        return  # a free size that may not be one: then the first request warms the chain
