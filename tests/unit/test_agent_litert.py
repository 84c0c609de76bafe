"""LiteRT through its door: names, rows, and wrong input, on a real int8 model."""

import numpy as np
import pytest

from edge_agent import runtimes
from edge_agent.runtimes.litert import plain
from skills.errors import FormatError

pytest.importorskip("ai_edge_litert", reason="the extra tflite is not installed")


@pytest.mark.reference
def test_a_model_made_for_one_row_answers_many_row_by_row(reference):
    model = runtimes.door("litert").load(reference / "mlperf_tiny/ic_resnet8_int8.tflite")
    assert runtimes.warm("litert")
    (name,), (output,) = model._inputs, model._outputs
    entry = model._inputs[name]
    rows = np.random.default_rng(0).integers(-128, 127, (3, *entry["shape"][1:])).astype(entry["dtype"])
    together = model.run({name: rows})[output]
    one_by_one = [model.run({name: rows[at : at + 1]})[output] for at in range(3)]
    assert np.array_equal(together, np.concatenate(one_by_one))
    with pytest.raises(FormatError, match="the model takes"):
        model.run({"nonsense": rows})
    with pytest.raises(FormatError, match="LiteRT refuses"):
        model.run({name: rows[:1, :5]})


def test_a_file_that_is_no_model_is_one_sentence(tmp_path):
    (tmp_path / "m.tflite").write_bytes(b"not a model")
    with pytest.raises(FormatError, match=r"LiteRT cannot load m.tflite"):
        runtimes.door("litert").load(tmp_path / "m.tflite")


def test_tensor_names_lose_what_converters_add():
    assert [plain(name) for name in ("serving_default_x:0", "x", "StatefulPartitionedCall:0")] == [
        "x", "x", "StatefulPartitionedCall",
    ]  # fmt: skip
