"""The program that goes to litert-torch, written and read by the real torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.converters import litert
from compress.passes.canonicalise import canonicalise
from skills import ort
from skills.errors import FormatError


@pytest.mark.parametrize("kind", ["residual", "transposed", "conv1d"])
def test_the_exported_program_answers_as_the_graph_and_its_weights_lie_in_order(
    kind: str, small_net: Callable[[str], Any], tmp_path: Path
) -> None:
    net = small_net(kind)
    model = canonicalise(net.model)
    litert.export(model, net.x, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    assert all(tensor.is_contiguous() for tensor in program.state_dict.values())
    want = ort.session(model.SerializeToString()).run({"x": net.x[:1]})["logits"]
    got = program.module()(torch.from_numpy(net.x[:1])).detach().numpy()
    assert np.allclose(got, want, atol=1e-4)


def test_a_graph_that_torch_cannot_compute_is_named(small_net: Callable[[str], Any], tmp_path: Path) -> None:
    net = small_net("plain")
    model = canonicalise(net.model)
    model.graph.node[0].op_type = "Unheard"
    with pytest.raises(FormatError, match="Unheard"):
        litert.export(model, net.x, tmp_path / "model.pt2")
