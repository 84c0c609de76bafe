"""A run of onnxruntime that is ended from another thread."""

import threading
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from skills import ort
from skills.timer import Halt, Halted

WIDTH, STEPS = 768, 600


@pytest.fixture(scope="module")
def endless() -> Any:
    """A chain of products that would take many seconds."""
    weight = numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32), "w")
    nodes = [helper.make_node("MatMul", [f"t{at}", "w"], [f"t{at + 1}"]) for at in range(STEPS)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [WIDTH, WIDTH]) for name in ("t0", f"t{STEPS}")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ort.Chain.of([ort.session(model.SerializeToString())], [f"t{STEPS}"])


def test_a_run_under_way_is_ended_at_its_next_operator(endless: Any) -> None:
    halt, begun = Halt(), threading.Event()

    def end() -> None:
        begun.wait(30)
        halt.set()

    ender = threading.Thread(target=end)
    ender.start()
    with pytest.raises(Halted):
        endless.run({"t0": np.eye(WIDTH, dtype=np.float32)}, before_each=begun.set, halt=halt)
    ender.join()


def test_what_is_halted_already_does_not_begin(endless: Any) -> None:
    halt = Halt()
    halt.set()
    with pytest.raises(Halted):
        endless.run({"t0": np.eye(WIDTH, dtype=np.float32)}, halt=halt)
