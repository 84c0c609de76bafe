"""The int8 `.tflite` that we write, run in LiteRT and held against the ONNX graph that it came from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from compress import compress, interpreter, profiles, tflite
from compress.converters import litert
from compress.converters.litert import Converted
from compress.emit import emit
from compress.passes.canonicalise import canonicalise
from compress.passes.place import place
from compress.passes.ranges import activations
from compress.statistics import observe
from skills import ort
from skills.errors import FormatError, Unreachable

Build = Callable[[str], Any]


def quantized(model: Any, x: np.ndarray) -> Any:
    """Return the graph that is lowered for a target of whole numbers alone."""
    model = canonicalise(model)
    seen = observe(model, activations(model), x, lambda _share: None, 1)
    return emit(model, place(model, seen, profiles.find("ethos-u55"), depthwise="int8", others="int8"), seen)


@pytest.mark.parametrize("kind", ["plain", "residual", "depthwise"])
def test_the_tflite_answers_as_the_original(kind: str, small_net: Build, tmp_path: Path) -> None:
    net = small_net(kind)
    (tmp_path / "m.onnx").write_bytes(net.model.SerializeToString())
    report = compress(tmp_path / "m.onnx", net.data, tmp_path / "out", device="arm64-litert", max_drop=3.0)
    assert report.verdict != "not_reached"
    assert report.details.model_file == "model.tflite"
    file = (tmp_path / "out" / "model.tflite").read_bytes()
    assert file[4:8] == b"TFL3"
    assert len(file) == report.result.bytes_file
    got = interpreter.session(file).run({"x": net.x})["logits"]
    want = ort.session(net.model.SerializeToString()).run({"x": net.x})["logits"]
    assert (got.argmax(1) == want.argmax(1)).mean() > 0.97
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.97


def test_names_types_and_shapes_are_those_of_the_onnx(small_net: Build, tmp_path: Path) -> None:
    net = small_net("plain")
    (tmp_path / "m.onnx").write_bytes(net.model.SerializeToString())
    compress(tmp_path / "m.onnx", net.data, tmp_path / "out", device="arm64-litert", max_drop=3.0)
    session = interpreter.session((tmp_path / "out" / "model.tflite").read_bytes())
    assert session.inputs == (ort.Port("x", "float32", (-1, 1, 12, 12)),)
    assert session.outputs == (ort.Port("logits", "float32", (-1, 4)),)
    assert session.raw.get_signature_list() == {"serving_default": {"inputs": ["x"], "outputs": ["logits"]}}
    assert tuple(session.raw.get_input_details()[0]["shape"]) == (1, 1, 12, 12)


@pytest.mark.parametrize(
    ("stride", "pads", "size"),
    [(2, [1, 1, 1, 1], 12), (2, [0, 0, 1, 1], 12), (1, [0, 0, 0, 0], 9), (2, [1, 1, 1, 1], 9)],
)
def test_every_padding_of_onnx_lands_on_the_same_pixels(
    stride: int, pads: list[int], size: int, tmp_path: Path
) -> None:
    chance = np.random.default_rng(1)
    weight = chance.standard_normal((6, 3, 3, 3)).astype(np.float32)
    made = (size + pads[0] + pads[2] - 3) // stride + 1
    head = chance.standard_normal((5, 6 * made * made)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=pads, strides=[stride] * 2),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]),  # pixels in ONNX's order: the lowering must transpose back
        helper.make_node("Gemm", ["f", "h"], ["y"], transB=1),
    ]
    ends = [
        helper.make_tensor_value_info("x", 1, ["n", 3, size, size]),
        helper.make_tensor_value_info("y", 1, ["n", 5]),
    ]
    body = helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(head, "h")]
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    x = chance.standard_normal((200, 3, size, size)).astype(np.float32)
    report = compress(tmp_path / "m.onnx", {"x": x}, tmp_path / "out", device="arm64-litert", max_drop=50)
    assert report.result.metric > 0.9


def no_second_writer(*_args: object, **_facts: object) -> None:
    raise Unreachable("the environment of litert cannot be made: the package index does not answer")


@pytest.mark.parametrize("kind", ["Sigmoid", "Tanh"])
def test_an_operator_without_an_int8_form_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litert, "ready", no_second_writer)
    weight = np.random.default_rng(0).standard_normal((4, 1, 3, 3)).astype(np.float32)
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4), helper.make_node(kind, ["c"], ["y"])]
    ends = [helper.make_tensor_value_info(n, 1, ["n", c, 6, 6]) for n, c in (("x", 1), ("y", 4))]
    body = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    x = np.random.default_rng(1).standard_normal((60, 1, 6, 6)).astype(np.float32)
    with pytest.raises(Unreachable, match=f"operator {kind}.*litert-torch.*index does not answer"):
        compress(tmp_path / "m.onnx", {"x": x}, tmp_path / "out", device="arm64-litert")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [True, False])
def test_what_is_refused_goes_to_the_second_writer(
    small_net: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, data: bool
) -> None:
    net = small_net("plain")
    (tmp_path / "m.onnx").write_bytes(net.model.SerializeToString())
    file = tflite.lower(quantized(net.model, net.x[:200]))
    asked: list[bool] = []

    def convert(_model: object, _x: object, _say: object, *, static: bool) -> Converted:
        asked.append(static)
        return Converted(file, file if static else None)

    def refuse(*_args: object, **_facts: object) -> None:
        raise FormatError(f"the operator Conv has no int8 form for LiteRT here: {tflite.ADVICE}")

    monkeypatch.setattr(tflite, "lower", refuse)
    monkeypatch.setattr(litert, "convert", convert)
    given = {"x": net.x, "y": net.y} if data else None
    report = compress(tmp_path / "m.onnx", given, tmp_path / "out", device="arm64-litert", max_drop=3.0)
    assert asked == [data]
    assert (tmp_path / "out" / "model.tflite").read_bytes() == file
    (said,) = [note for note in report.details.notes if "litert-torch" in note]
    assert "because Skerry's own writer refused: the operator Conv has no int8 form for LiteRT here. " in said
    assert {layer.compute for layer in report.details.layers} == {"int8" if data else "float"}
    assert "litert-torch" in (tmp_path / "out" / "recipe.yaml").read_text()


def test_a_file_that_is_no_tflite_is_one_sentence() -> None:
    with pytest.raises(FormatError, match="LiteRT cannot load the model"):
        interpreter.session(b"nonsense" * 10)


@pytest.mark.parametrize("kind", ["plain", "residual", "depthwise"])
def test_a_file_in_whole_numbers_answers_as_the_graph_it_came_from(kind: str, small_net: Build) -> None:
    net = small_net(kind)
    coded = quantized(net.model, net.x[:200])
    session = interpreter.session(tflite.lower(coded, whole=True))
    ends = [*session.raw.get_input_details(), *session.raw.get_output_details()]
    assert [end["dtype"] for end in ends] == [np.int8, np.int8]
    assert session.inputs == (ort.Port("x", "float32", (-1, 1, 12, 12)),)
    got = session.run({"x": net.x[:200]})["logits"]
    want = ort.session(coded.SerializeToString(), exact=True).run({"x": net.x[:200]})["logits"]
    assert (got.argmax(1) == want.argmax(1)).mean() > 0.97


@pytest.mark.parametrize("whole", [False, True])
def test_an_input_that_lies_channels_last_is_not_turned_in_the_file(whole: bool) -> None:
    chance = np.random.default_rng(1)
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["g"]),
        helper.make_node("Flatten", ["g"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(*end) for end in (("x", 1, ["n", 9, 7, 3]), ("y", 1, ["n", 8]))]
    weight = chance.standard_normal((8, 3, 3, 3)).astype(np.float32)
    body = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = chance.standard_normal((100, 9, 7, 3)).astype(np.float32)
    coded = quantized(model, x)
    session = interpreter.session(tflite.lower(coded, whole=whole))
    assert session.inputs == (ort.Port("x", "float32", (-1, 9, 7, 3)),)
    assert "TRANSPOSE" not in {op["op_name"] for op in session.raw._get_ops_details()}
    got, want = session.run({"x": x})["y"], ort.session(coded.SerializeToString(), exact=True).run({"x": x})["y"]
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.999
