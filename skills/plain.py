"""A plan whose tail is a stock server of the Open Inference Protocol: whole tensors travel, there and back, uncoded."""

import dataclasses
import math

from skills import codec
from skills.coding import Coding
from skills.split_plan import Cut, Plan


def uncoded(plan: Plan) -> Plan:
    """Return the plan as such a tail serves it: each cut's one way over the link is its tensors' own bytes, losing nothing.

    A cut with texts among its tensors cannot be used.
    """
    cuts = tuple(dataclasses.replace(cut, codings=_raw(cut)) for cut in plan.cuts)
    return dataclasses.replace(plan, cuts=cuts, replies=())


def raw_bytes(cut: Cut) -> int:
    """Return what the tensors of a cut weigh as they are: as measured, else with sizes that are free counted as 1.

    Raises:
        FormatError: a tensor's values have no fixed size.
    """
    sizes = (math.prod(max(side, 1) for side in live.shape) * codec.itemsize(live) for live in cut.tensors)
    return cut.raw_bytes or sum(sizes)


def _raw(cut: Cut) -> tuple[Coding, ...]:
    if not cut.codings or any(live.dtype not in codec.DTYPES for live in cut.tensors):
        return ()
    size = raw_bytes(cut)
    return (Coding("native", bytes_p50=size, bytes_p95=size),)
