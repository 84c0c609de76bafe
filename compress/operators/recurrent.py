"""LSTM, GRU and plain recurrent layers: the gates put into torch's order, the steps left to torch."""

from collections.abc import Sequence
from typing import Any

import torch

from compress.operators.site import Builder, Compute, Site

GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}  # where torch's gates stand in ONNX's order
USUAL = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


def _recurrent(site: Site) -> Compute:
    kind, direction = site.node.op_type, site.fact("direction", "forward")
    dirs, size = 2 if direction == "bidirectional" else 1, site.fact("hidden_size")
    activations = site.fact("activations", USUAL[kind] * dirs)
    relu = kind == "RNN" and activations == ["Relu"] * dirs
    for wrong, what in (
        (activations != USUAL[kind] * dirs and not relu, f"activations {', '.join(activations)}"),
        (site.fact("clip") is not None, "clip"),
        (site.fact("layout", 0) != 0, "layout 1 (batch first)"),
        (site.fact("input_forget", 0) != 0, "input_forget"),
        (site.has(4), "sequence lengths as an input"),
        (site.has(7), "peepholes"),
    ):
        if wrong:
            raise site.refusal(f"{what} is not supported")
    layer = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN": torch.rnn_relu if relu else torch.rnn_tanh}[kind]
    by_hand = kind == "GRU" and not site.fact("linear_before_reset", 0)

    def compute(x: Any, w: Any, r: Any, b: Any = None, _lengths: Any = None, h: Any = None, c: Any = None) -> Any:
        x = x.flip(0) if direction == "reverse" else x
        start = x.new_zeros((dirs, x.shape[1], size))
        h, c = start if h is None else h, start if c is None else c
        if b is None:
            b = x.new_zeros((dirs, 2 * w.shape[1]))
        weights = [_in_order(part[d], kind) for d in range(dirs) for part in (w, r, *b.chunk(2, 1))]
        if by_hand:
            y, *last = _reset_first(x, h, weights)
        else:
            state = (h, c) if kind == "LSTM" else h
            training = torch.is_grad_enabled()
            y, *last = layer(x, state, weights, True, 1, 0.0, training, dirs == 2, False)
        y = y.reshape(*y.shape[:2], dirs, size).transpose(1, 2)
        return (y.flip(0) if direction == "reverse" else y, *last)

    return compute


def _in_order(weight: Any, kind: str) -> Any:
    gates = weight.chunk(len(GATES[kind]))
    return torch.cat([gates[at] for at in GATES[kind]])


def _reset_first(x: Any, h: Any, weights: Sequence[Any]) -> tuple[Any, Any]:
    """A GRU whose reset gate acts before the product with the state (linear_before_reset = 0), which torch lacks."""
    made, last = [], []
    for at, state in enumerate(h):
        w, r, w_bias, r_bias = weights[4 * at : 4 * at + 4]
        split = 2 * r.shape[1]  # reset and update gate stand first
        given = x @ w.t() + w_bias + r_bias  # outside the product, so the new gate's may be added here too
        steps = []
        for now in given.flip(0) if at else given:
            reset, update = torch.sigmoid(now[:, :split] + state @ r[:split].t()).chunk(2, 1)
            new = torch.tanh(now[:, split:] + (reset * state) @ r[split:].t())
            state = (1 - update) * new + update * state  # noqa: PLW2901 - the state moves on
            steps.append(state)
        made.append(torch.stack(steps[::-1] if at else steps))
        last.append(state)
    return torch.cat(made, -1), torch.stack(last)


RECURRENT: dict[str, Builder] = dict.fromkeys(GATES, _recurrent)
