"""Keeps the plans that may be asked for loaded, warm and measured, and lets go of the others: a thread beside the traffic."""

import logging
import threading
from collections.abc import Callable, Sequence

from cloud.tail.metrics import Metrics
from cloud.tail.pace import Pace
from cloud.tail.store import MAX_LOADED, Loading, Store
from skills.errors import SkerryError

LOG = logging.getLogger("skerry.tail")
LOOK_EVERY_S = 2.0
MEASURE_S = 0.5  # for the batch sizes of one plan


class Warmer:
    """Done once every plan that was there at the start is warm; from then on new ones are found within two seconds."""

    def __init__(
        self, store: Store, allowed: Callable[[], frozenset[str] | None], metrics: Metrics, measure_s: float = MEASURE_S
    ) -> None:
        self._store, self._allowed, self._metrics, self._measure_s = store, allowed, metrics, measure_s
        self._tried: dict[str, Pace | None] = {}  # what was loaded then: a plan that comes back is another one
        self._measured: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tail-warm", daemon=True)
        self._done = threading.Event()

    @property
    def done(self) -> bool:
        """Whether what was there at the start is warm."""
        return self._done.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until `done`; False when it is not in time."""
        return self._done.wait(timeout_s)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the plan at hand."""
        self._stop.set()
        self._thread.join(timeout=10)

    def look(self) -> None:
        """Load what is new and may be used, the newest first; forget what is gone from the disk or used by nobody.

        What a request has loaded since is measured too, whether it was given up, was not to be loaded or never tried before.
        """
        try:
            allowed = self._allowed()
        except SkerryError as error:
            LOG.debug(
                "tail.table_unreadable error=%s", error
            )  # nobody is let in: there is nothing to warm, nor to drop
            return
        there = [name for name in self._store.names() if allowed is None or name in allowed]
        for name in {*self._store.loaded(), *self._measured} - set(there):
            self._store.forget(name)
            self._metrics.forget(name)
            self._measured.discard(name)
            LOG.info("plan.dropped plan=%s", name)
        self._tried = {name: pace for name, pace in self._tried.items() if name in there}
        for name in self._due(there):
            if self._stop.is_set():
                return
            self._tried[name] = None
            try:
                loaded = self._store.measure(name, self._measure_s)
            except Loading:
                del self._tried[name]  # by a request: it is looked at again soon
                continue
            except SkerryError as error:
                LOG.warning("plan.unusable plan=%s error=%s", name, error)
                continue
            finally:
                if name in self._tried:
                    self._tried[name] = self._store.paces().get(name)
            self._tried[name] = loaded.pace
            self._measured.add(name)
            for after, found in sorted(loaded.pace.batching.items()):
                took = ",".join(f"{size}:{ms:.2f}" for size, ms in found.batch_ms.items())
                self._metrics.measured(name, after, found.max_batch, dict(found.batch_ms))
                LOG.info(
                    "plan.measured plan=%s after=%s max_batch=%s batch_ms=%s why=%s",
                    name, after, found.max_batch, took or "-", found.why,
                )  # fmt: skip

    def _due(self, there: Sequence[str]) -> list[str]:
        """Return the plans to measure: the newest ones that were never tried, and what is in memory and was not measured."""
        held = self._store.paces()
        return [
            name
            for at, name in enumerate(there)
            if (name in held and held[name] is not self._tried.get(name))
            or (at < MAX_LOADED and name not in self._tried)
        ]

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                self.look()
            except Exception:
                LOG.exception("warmer.failed")  # the outermost loop: requests load what they need by themselves
            self._done.set()
            self._stop.wait(LOOK_EVERY_S)
