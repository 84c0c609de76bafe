"""A plan whose tail is a stock server of the Open Inference Protocol: whole tensors travel, there and back, uncoded."""

import dataclasses
import math

from skills.split import Coding, Cut, Plan

SIZES = {
    "BOOL": 1,
    "UINT8": 1,
    "INT8": 1,
    "UINT16": 2,
    "INT16": 2,
    "FP16": 2,
    "UINT64": 8,
    "INT64": 8,
    "FP64": 8,
}  # else 4


def uncoded(plan: Plan) -> Plan:
    """Return the plan as such a tail serves it: each cut's one way over the link is its tensors' own bytes, losing nothing.

    Sizes that the model leaves free count as 1.
    """
    cuts = tuple(dataclasses.replace(cut, codings=(_raw(cut),)) if cut.codings else cut for cut in plan.cuts)
    return dataclasses.replace(plan, cuts=cuts, replies=())


def _raw(cut: Cut) -> Coding:
    size = sum(math.prod(max(side, 1) for side in live.shape) * SIZES.get(live.dtype, 4) for live in cut.tensors)
    return Coding("native", bytes_p50=size, bytes_p95=size)
