"""New weights for a layer whose input lost channels, by least squares: no labels and no training, only activations.

The idea is channel reconstruction (He et al., arXiv 1707.06168): of all weights on the channels that are left, take
those whose outputs come nearest to what the layer gave before. Solved for the change from the present weights, so that
few samples change little and a layer that lost nothing stays exactly as it is.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from compress import graph
from compress.graph import Array

PLACES = 256  # positions of one sample that are fitted: neighbours hardly differ


def refit(
    node: Any, weight: Array, bias: Array | None, batches: Iterable[tuple[Array, Array]], ridge: float = 1e-3
) -> tuple[Array, Array]:
    """Return weights (in the layout of `weight`) and bias of a Conv or Gemm that come nearest to what is wanted.

    Each batch is what the layer reads now, [n, channels left, ...], and what it should give, [n, outputs, ...]; both may
    come from different networks, so errors made before the layer are corrected here as well. `ridge` holds the weights
    back, relative to the mean energy of what is read.

    Raises:
        ValueError: the operator is neither Conv nor a Gemm of rows.
    """
    facts = graph.attributes(node)
    if node.op_type not in ("Conv", "Gemm") or facts.get("transA", 0):
        raise ValueError(f"{node.name}: weights of {node.op_type} cannot be refitted, only those of Conv and Gemm")
    turned = node.op_type == "Gemm" and not facts.get("transB", 0)
    rows = (weight.T if turned else weight).reshape(weight.shape[1] if turned else weight.shape[0], -1)
    groups = int(facts.get("group", 1))
    each = len(rows) // groups
    old = np.concatenate([rows, (np.zeros(len(rows)) if bias is None else bias.reshape(-1))[:, None]], axis=1)
    gram = np.zeros((groups, old.shape[1], old.shape[1]))
    moment = np.zeros((groups, old.shape[1], each))
    for inputs, target in batches:
        seen, taken = windows(inputs, weight.shape[2:], facts)
        wanted = np.moveaxis(target, 1, -1).reshape(-1, groups, each)[taken]
        seen = seen.reshape(len(seen), groups, -1)
        for group in range(groups):
            design = np.concatenate([seen[:, group], np.ones((len(seen), 1), seen.dtype)], axis=1)
            missing = wanted[:, group] - design @ old[group * each : (group + 1) * each].T.astype(design.dtype)
            gram[group] += design.T @ design
            moment[group] += design.T @ missing
    held = ridge * np.trace(gram[:, :-1, :-1], axis1=1, axis2=2) / max(old.shape[1] - 1, 1)
    gram += (held[:, None] + 1e-12)[:, :, None] * np.diag(np.append(np.ones(old.shape[1] - 1), 1e-9))
    new = old + np.linalg.solve(gram, moment).transpose(0, 2, 1).reshape(len(rows), -1)
    found = (new[:, :-1].T if turned else new[:, :-1]).reshape(weight.shape)
    return found.astype(weight.dtype), new[:, -1].astype(weight.dtype)


def windows(x: Array, kernel: Sequence[int], facts: Mapping[str, Any], most: int = PLACES) -> tuple[Array, Array]:
    """Return what a Conv with these attributes multiplies, [places, channels·kernel entries], and which places these are.

    Places are numbered over samples and the layer's output positions in row-major order; of more than `most` a sample,
    evenly spread ones are taken.
    """
    axes = range(len(kernel))
    dilations, strides = ((facts.get(key) or [1 for _ in axes]) for key in ("dilations", "strides"))
    spans = [(size - 1) * by + 1 for size, by in zip(kernel, dilations, strict=True)]
    padded = np.pad(x, [(0, 0), (0, 0), *_pads(x.shape[2:], spans, strides, facts)])
    found = sliding_window_view(padded, spans, axis=tuple(a + 2 for a in axes))
    found = found[(slice(None), slice(None), *(slice(None, None, by) for by in (*strides, *dilations)))]
    found = found.transpose(0, *(a + 2 for a in axes), 1, *(a + 2 + len(kernel) for a in axes))
    grid = found.shape[: 1 + len(kernel)]
    step = -(-math.prod(grid[1:]) // most)
    while math.gcd(step, grid[-1]) > 1:  # else whole columns would never be looked at
        step += 1
    taken = np.arange(0, math.prod(grid), step)
    return found[np.unravel_index(taken, grid)].reshape(len(taken), -1), taken


def _pads(
    sizes: Sequence[int], spans: Sequence[int], strides: Sequence[int], facts: Mapping[str, Any]
) -> list[tuple[int, int]]:
    """Return what is added before and after on each spatial axis."""
    rule = facts.get("auto_pad", b"NOTSET")
    if rule in (b"SAME_UPPER", b"SAME_LOWER"):
        totals = [
            max((-(-size // by) - 1) * by + span - size, 0)
            for size, span, by in zip(sizes, spans, strides, strict=True)
        ]
        less = [(total // 2, total - total // 2) for total in totals]
        return less if rule == b"SAME_UPPER" else [(after, before) for before, after in less]
    given = facts.get("pads") if rule == b"NOTSET" else None
    flat = given or [0] * (2 * len(sizes))
    return list(zip(flat[: len(sizes)], flat[len(sizes) :], strict=True))
