"""The numbers of one run: what `demo.json` holds, one type a chapter."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cloud.demo.claims import Claim


@dataclasses.dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds."""

    p50: float
    p90: float
    worst: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Times":
        """Return the median, the 90th percentile and the largest of some milliseconds."""
        ranked = sorted(values)
        if not ranked:
            return cls(0.0, 0.0, 0.0, 0)
        p50, p90 = (ranked[min(len(ranked) - 1, int(len(ranked) * share))] for share in (0.5, 0.9))
        return cls(round(p50, 3), round(p90, 3), round(ranked[-1], 3), len(ranked))


@dataclasses.dataclass(frozen=True, slots=True)
class Smaller:
    """Chapter a: the two compressions, as their report.json says."""

    accuracy_float: float
    onnxruntime: Mapping[str, Any]
    litert: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """What became of one release on one device."""

    device: str
    stage: str
    variant: str
    received_bytes: int
    reused_bytes: int
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Delivered:
    """Chapter b: the bundle and its first rollout."""

    bundle_bytes: int
    parts: int
    seconds_push_to_serving: float
    broker: str
    arrivals: tuple[Arrival, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """Chapter c: what one device answered for every held-out digit."""

    device: str
    variant: str
    asked: int
    right: int
    same_as_model: int
    local: Times
    relayed: Times


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    """Chapter d: version 1.1.0, of which only the changed parts travel."""

    bundle_bytes: int
    uploaded_bytes: int
    seconds: float
    arrivals: tuple[Arrival, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """Chapter d: something that must not serve, and why it does not."""

    what: str
    version: str
    device: str
    phase: str
    reason: str
    still_serving: str


@dataclasses.dataclass(frozen=True, slots=True)
class Together:
    """Chapter e: the photo classifier between a slow device and the tail."""

    slowdown: float
    link: str
    samples: int
    verdicts: tuple[Mapping[str, Any], ...]
    measured: tuple[Mapping[str, Any], ...]
    private_verdict: str
    normal: Times
    local: Times
    agreement: float
    sent: int
    answered: int
    slowest_ms: float
    ran: Mapping[str, int]
    tail_back_s: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Story:
    """Everything; chapters that were not reached are None."""

    version: str
    date: str
    machine: Mapping[str, Any]
    seconds: Mapping[str, float]
    claims: tuple[Claim, ...]
    smaller: Smaller | None
    delivered: Delivered | None
    asked: tuple[Asked, ...]
    update: Update | None
    refusals: tuple[Refusal, ...]
    rollback: tuple[Arrival, ...]
    together: Together | None
