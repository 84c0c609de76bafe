"""What the link knows of the network and whether the tail is worth asking. Pure: times come in as arguments.

Bandwidth is never probed while requests flow: every answer says how long the tail itself took, the rest was the network.
"""

import dataclasses
from collections import deque

from skills.split import Estimate

RTT_WINDOW_S = 10.0
COLD_AFTER_S = 0.5  # TCP forgets its window after one retransmission timeout without traffic (RFC 2861)
LEAST_SAMPLE_BYTES = 8192  # below, the time says more about the machine than about the network,
LEAST_SAMPLE_MS = 5.0  # unless at the known rate the bytes take so long: then it shows when they no longer do
SMALL_MS = 1.0  # the least that such a sample can tell from nothing
CALL_MS = 0.7  # what a tiny call costs on a link without delay
FAST, SLOW = 0.5, 0.1
GUESS_SHARE = 0.5  # of what is left after the round trip: with a guess beyond it, most of the rate would be guessed
PROBE_EVERY_S = 10.0  # without a transfer for this long, one is made
PROBE_SHARE = 0.03  # of the time, at most
SURPRISES = 3  # round trips in a row that what is known does not explain: the network has changed
TWICE = 2  # as many transfers in a row, twice as slow or twice as fast as known, are enough
LONGER, LONGER_BY_MS = 1.5, 3.0  # a round trip that is both is a surprise
MISSES = 2
TRIAL_S = 10.0  # after a ping closed what missing requests had opened: for this long one more miss opens it again
FIRST_PROBE_S, LAST_PROBE_S, JITTER = 0.5, 30.0, 0.2
SOON_S, ABSENCE_SHARE = 1.0, 0.1  # a probe comes at least so soon, or after so much of the time that the tail was away


class Estimator:
    """Round-trip time as a windowed minimum, bandwidth as the lower of a fast and a slow average."""

    def __init__(self) -> None:
        self._fast = self._slow = 0.0  # 0: not known yet
        self._anew = True  # what is known of the bandwidth is of another way: the next transfer takes its place
        self._fallback_rtt = 0.0
        self._rtts: deque[tuple[float, float]] = deque(maxlen=200)
        self._strange: list[float] = []
        self._longer: list[tuple[float, float]] = []
        self._beyond_ms: float | None = None  # what a request takes on its way beyond a ping and its bytes
        self._queue_ms = 0.0
        self._last_traffic_s = float("-inf")
        self._probe_at_s = self._spent_until_s = float("-inf")

    def on_probe(self, now_s: float, took_s: float) -> None:
        """A transfer was made only to learn the bandwidth; the next one waits its share of the time."""
        self._spent_until_s = now_s + took_s / PROBE_SHARE
        self._probe_at_s = max(now_s + PROBE_EVERY_S, self._spent_until_s)

    def wants_probe(self, now_s: float) -> bool:
        """Say whether nothing was learnt about the bandwidth for a while: the device stayed local, the link may have changed."""
        return now_s >= self._probe_at_s

    def on_traffic(self, now_s: float) -> None:
        """Something was sent or came back."""
        self._last_traffic_s = now_s

    def on_ping(self, now_s: float, rtt_ms: float, *, alone: bool = True) -> None:
        """A tiny call came back; `alone` says that no request of ours was on the link, which would have held it up."""
        rtt = max(0.0, rtt_ms - CALL_MS)
        self._on_round_trip(now_s, rtt, alone)
        self._rtts.append((now_s, rtt))
        self._fallback_rtt = rtt
        self.on_traffic(now_s)

    def _on_round_trip(self, now_s: float, rtt: float, alone: bool) -> None:
        """Ask whether the way has become longer: one that is as short as ever says no, whatever was beside it."""
        known = self.rtt_ms(now_s) if self._rtts else rtt
        if rtt <= max(LONGER * known, known + LONGER_BY_MS):
            self._longer = []
        elif alone:
            self._longer = [*self._longer, (now_s, rtt)]
        if len(self._longer) >= SURPRISES:  # the way is longer now: what was known of it no longer holds
            self._rtts, self._longer = deque(self._longer, maxlen=self._rtts.maxlen), []
            self.on_return()

    def on_return(self) -> None:
        """The tail was away and answers again: the way to it may be another one, and its bandwidth is learnt anew."""
        self._probe_at_s, self._anew = float("-inf"), True

    def on_transfer(
        self,
        now_s: float,
        size: int,
        total_ms: float,
        server_ms: float,
        queue_ms: float = 0.0,
        *,
        cold: bool = False,
        guessed: bool = False,
        alone: bool = True,
    ) -> None:
        """A request and its answer, of `size` bytes together, took `total_ms`, of which the tail says it had `server_ms`.

        A small one, `alone` on the link, says how long the way is, and that a slow link is fast now. What a plan only guessed of
        a tail (`guessed`) teaches nothing where it is most of the time: were it wrong, what remains would be too little, and
        the bandwidth boundless.
        """
        self._queue_ms += (queue_ms - self._queue_ms) * FAST
        self.on_traffic(now_s)
        ours_ms = total_ms - self.rtt_ms(now_s) - 2 * CALL_MS
        if cold or (guessed and server_ms > GUESS_SHARE * ours_ms):
            return
        if size < LEAST_SAMPLE_BYTES:
            if not (self._anew or guessed):
                self._on_small(now_s, size, ours_ms - server_ms, alone)
            return
        moving_ms = max(ours_ms - server_ms, 0.02)
        mbit = min(size * 8 / moving_ms / 1000, 10_000.0)
        self._probe_at_s = max(self._probe_at_s, now_s + PROBE_EVERY_S)
        if self._anew:
            self._fast = self._slow = mbit
            self._strange, self._anew = [], False
            return
        known = self._slow
        self._fast += (mbit - self._fast) * FAST
        self._slow += (mbit - self._slow) * SLOW
        if 0.5 < mbit / known < 2.0:
            self._strange = []
        else:
            self._on_strange(mbit, known)

    def _on_strange(self, mbit: float, known: float) -> None:
        self._strange = [one for one in self._strange if (one < known) == (mbit < known)] + [mbit]
        if len(self._strange) >= TWICE:  # the one that says less of the two is believed
            self._fast = self._slow = (max if mbit < known else min)(self._strange)
            self._strange = []

    def _on_small(self, now_s: float, size: int, moving_ms: float, alone: bool) -> None:
        """A small request took `moving_ms` beyond the known way: what is too long may be a longer way as well as a slower link.

        Three in a row that are too long are taken for a longer way, after which a probe tells what the bandwidth is.
        """
        expected_ms = size * 8 / self._slow / 1000
        if expected_ms >= LEAST_SAMPLE_MS:
            mbit = size * 8 / max(moving_ms, SMALL_MS) / 1000
            if (
                mbit >= 2.0 * self._slow and moving_ms > -LONGER_BY_MS
            ):  # or else the way is shorter now, as a ping will say
                self._on_strange(mbit, self._slow)
                return
            self._strange = []
        more_ms = moving_ms - expected_ms
        beyond = more_ms if self._beyond_ms is None else self._beyond_ms
        self._on_round_trip(now_s, self.rtt_ms(now_s) + more_ms - beyond, alone)
        # A machine that is only busy must not ask for more probes than their share of the time.
        self._probe_at_s = max(self._probe_at_s, self._spent_until_s)
        # What requests always take is no longer way; followed so slowly that a longer way shows first.
        self._beyond_ms = beyond + min(max(more_ms - beyond, -LONGER_BY_MS), LONGER_BY_MS) * SLOW

    def rtt_ms(self, now_s: float) -> float:
        """Return the smallest round trip of the last ten seconds, or the last one known."""
        recent = [rtt for at, rtt in self._rtts if now_s - at <= RTT_WINDOW_S]
        return min(recent) if recent else self._fallback_rtt

    def now(self, now_s: float, up: bool) -> Estimate:
        """Return the estimate; a bandwidth of 0 means that nothing was measured yet."""
        cold = now_s - self._last_traffic_s > COLD_AFTER_S
        return Estimate(min(self._fast, self._slow), self.rtt_ms(now_s), up, cold, self._queue_ms)


@dataclasses.dataclass(slots=True)
class Breaker:
    """Closed: ask the tail. Open: do not, and probe ever more rarely until it answers.

    Requests and pings are counted apart: a tail that lives but does not compute answers pings, and they must not hide it.
    After requests had opened it, a ping closes it on trial only: the next request that misses opens it for longer.
    """

    misses: int = 0  # requests in a row
    silences: int = 0  # pings in a row
    probe_at_s: float | None = None  # None: closed
    wait_s: float = FIRST_PROBE_S
    trial_until_s: float = float("-inf")
    away_since_s: float = float("-inf")

    @property
    def open(self) -> bool:
        """Say whether the tail is left alone."""
        return self.probe_at_s is not None

    def on_success(self) -> None:
        """A request was answered: close, and forget."""
        self.misses, self.silences, self.probe_at_s, self.wait_s = 0, 0, None, FIRST_PROBE_S
        self.trial_until_s = float("-inf")

    def on_ping(self, now_s: float) -> None:
        """A ping was answered: the tail lives; whether it computes shows in a request."""
        if not self.open:
            self.silences = 0
        elif self.misses < MISSES:
            self.on_success()
        else:
            self.silences, self.probe_at_s, self.trial_until_s = 0, None, now_s + TRIAL_S

    def on_miss(self, now_s: float, luck: float, *, ping: bool = False) -> None:
        """No answer in time, no connection, no room; `luck` in 0..1 spreads the probes of many devices by ±20 %.

        What was on its way when it opened is counted and moves no probe: many requests at once are one absence.
        """
        if not self.open and now_s > self.trial_until_s and self.misses >= MISSES:
            self.misses, self.wait_s = 0, FIRST_PROBE_S  # the trial went well, or nobody asked: it begins anew
        self.misses, self.silences = self.misses + (not ping), self.silences + ping
        if self.probe_at_s is not None and not (ping and now_s >= self.probe_at_s):
            return
        if self.open or max(self.misses, self.silences) >= MISSES:
            self.away_since_s = self.away_since_s if self.open else now_s
            self.probe_at_s = now_s + self.wait_s * (1 + JITTER * (2 * luck - 1))
            # A tail that lives and does not compute is asked ever more rarely, one that is away may be back any moment.
            soon = max(SOON_S, ABSENCE_SHARE * (now_s - self.away_since_s)) if ping else LAST_PROBE_S
            self.wait_s = min(self.wait_s * 2, soon, LAST_PROBE_S)
