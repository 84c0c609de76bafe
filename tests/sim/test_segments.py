"""The extractor: the chain of segments is the whole model, weights are stored once, skips and shared constants included."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cloud.split import segment
from cloud.split.graph import observed_types, read_flow
from cloud.split.inputs import read_model
from cloud.split.segment import Pieces, join, write_segments
from cloud.split.shortlist import shortlist
from skills import ort
from skills.errors import FormatError

WIDTH = 6


def wrap(nodes: list[Any], constants: list[Any], outputs: list[str], functions: bool = False) -> Any:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", None]) for name in outputs]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("t0", TensorProto.FLOAT, ["n", WIDTH])], ends, constants
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@st.composite
def models(draw: st.DrawFn) -> Any:
    """A random DAG of MatMul, Add, Relu and Mul with skips, a shared weight, and tensors with many readers."""
    chance = np.random.default_rng(draw(st.integers(0, 1000)))
    shared = numpy_helper.from_array(chance.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 3, "shared")
    nodes, constants, tensors = [], [shared], ["t0"]
    for at in range(1, draw(st.integers(3, 12)) + 1):
        kind = draw(st.sampled_from(["MatMul", "Shared", "Add", "Relu", "Mul"]))
        first = draw(st.sampled_from(tensors[-3:]))
        reads = [first]
        if kind == "MatMul":
            constants.append(
                numpy_helper.from_array(chance.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 3, f"w{at}")
            )
            reads.append(f"w{at}")
        elif kind == "Shared":
            reads.append("shared")
        elif kind != "Relu":
            reads.append(draw(st.sampled_from(tensors)))
        nodes.append(helper.make_node("MatMul" if kind == "Shared" else kind, reads, [f"t{at}"], f"n{at}"))
        tensors.append(f"t{at}")
    read = {name for node in nodes for name in node.input}
    ends = [name for name in tensors[1:] if name not in read]
    return wrap(nodes, constants, ends)


def split_at(model: Any, prefixes: list[frozenset[int]], folder: Path, x: np.ndarray) -> tuple[Pieces, ort.Chain]:
    types = observed_types(model, {"t0": x})
    flow = read_flow(model, types)
    pieces = write_segments(model, flow, prefixes, folder, types, base="")
    return pieces, ort.chain([folder / one.file.lstrip("/") for one in pieces.segments], flow.outputs)


@settings(max_examples=40, deadline=None)
@given(model=models(), data=st.data())
def test_a_chain_of_any_nested_cuts_equals_the_whole(
    model: Any, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    flow = read_flow(model)
    sizes = data.draw(st.lists(st.integers(1, len(flow.ops) - 1), max_size=4, unique=True).map(sorted))
    x = np.random.default_rng(0).standard_normal((2, WIDTH)).astype(np.float32)
    _, chain = split_at(model, [frozenset(range(size)) for size in sizes], tmp_path_factory.mktemp("s"), x)
    whole = ort.session(model.SerializeToString()).run({"t0": x})
    found = chain.run({"t0": x})
    assert set(found) == set(whole)
    for name, array in whole.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5)
    assert [len(session.outputs) > 0 for session in chain.sessions] == [True] * (len(sizes) + 1)


@settings(max_examples=25, deadline=None)
@given(model=models(), data=st.data())
def test_segments_joined_again_answer_as_the_chain_of_them(
    model: Any, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    flow, folder = read_flow(model), tmp_path_factory.mktemp("j")
    sizes = data.draw(st.lists(st.integers(1, len(flow.ops) - 1), min_size=1, max_size=4, unique=True).map(sorted))
    x = np.random.default_rng(0).standard_normal((2, WIDTH)).astype(np.float32)
    pieces, chain = split_at(model, [frozenset(range(size)) for size in sizes], folder, x)
    for after in range(len(pieces.segments)):
        values = chain.run({"t0": x}, 0, after)
        one, right = joined(pieces, folder, flow.outputs, after).run(values), chain.run(values, after)
        assert set(one) == set(right)
        for name, array in right.items():
            np.testing.assert_allclose(one[name], array, rtol=1e-5, atol=1e-5)


def joined(pieces: Pieces, folder: Path, outputs: tuple[str, ...], after: int) -> ort.Chain:
    files = [folder / one.file.lstrip("/") for one in pieces.segments[after:]]
    model = join(files, outputs)
    onnx.checker.check_model(model)
    return ort.Chain.of([ort.session(model.SerializeToString(), beside=folder)], outputs)


def big(name: str, seed: int) -> Any:
    return numpy_helper.from_array(np.random.default_rng(seed).standard_normal((WIDTH, 200)).astype(np.float32), name)


def test_every_weight_is_stored_once_even_when_two_segments_use_it(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["t0", "shared"], ["t1"]),
        helper.make_node("MatMul", ["t1", "back"], ["t2"]),
        helper.make_node("MatMul", ["t2", "shared"], ["t3"]),
    ]
    back = numpy_helper.from_array(np.random.default_rng(1).standard_normal((200, WIDTH)).astype(np.float32), "back")
    model = wrap(nodes, [big("shared", 0), back], ["t3"])
    x = np.ones((1, WIDTH), np.float32)
    folder = tmp_path / "segments"
    folder.mkdir()
    pieces, chain = split_at(model, [frozenset({0}), frozenset({0, 1})], folder, x)
    assert pieces.shared is not None
    on_disk = sum(path.stat().st_size for path in folder.iterdir())
    assert on_disk < 1.1 * len(model.SerializeToString())
    np.testing.assert_allclose(
        chain.run({"t0": x})["t3"], ort.session(model.SerializeToString()).run({"t0": x})["t3"], rtol=1e-5
    )


def test_packed_low_bit_weights_unfold_in_the_segment_that_uses_them(tmp_path: Path) -> None:
    import ml_dtypes

    chance = np.random.default_rng(0)
    codes = [chance.integers(-8, 8, (WIDTH, WIDTH)).astype(ml_dtypes.int4) for _ in range(2)]
    constants = [numpy_helper.from_array(np.float32(0.1), "scale")]
    nodes, last = [], "t0"
    for at, code in enumerate(codes):
        constants.append(numpy_helper.from_array(code, f"packed{at}"))
        nodes += [
            helper.make_node("Cast", [f"packed{at}"], [f"float{at}"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"float{at}", "scale"], [f"weight{at}"]),
            helper.make_node("MatMul", [last, f"weight{at}"], [f"u{at}"]),
        ]
        last = f"u{at}"
    model = wrap(nodes, constants, [last])
    x = np.ones((1, WIDTH), np.float32)
    pieces, chain = split_at(model, [frozenset({0})], tmp_path, x)
    for at, piece in enumerate(pieces.segments):
        stored = onnx.load(tmp_path / piece.file.lstrip("/")).graph.initializer
        assert [item.name for item in stored if item.data_type == TensorProto.INT4] == [f"packed{at}"]
    np.testing.assert_allclose(
        chain.run({"t0": x})[last], ort.session(model.SerializeToString()).run({"t0": x})[last], rtol=1e-5
    )


def test_a_tensor_that_a_subgraph_captures_crosses_the_cut(tmp_path: Path) -> None:
    branch = [
        helper.make_graph(
            [helper.make_node(kind, ["t1"], [f"{kind}_out"])],
            kind,
            [],
            [helper.make_tensor_value_info(f"{kind}_out", 1, None)],
        )
        for kind in ("Relu", "Neg")
    ]
    nodes = [
        helper.make_node("Mul", ["t0", "two"], ["t1"]),
        helper.make_node("ReduceSum", ["t0"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["t2"], then_branch=branch[0], else_branch=branch[1]),
    ]
    constants = [numpy_helper.from_array(np.float32(2), "two"), numpy_helper.from_array(np.float32(0), "zero")]
    model = wrap(nodes, constants, ["t2"])
    flow = read_flow(model)
    assert set(flow.live(frozenset({0, 1, 2}))) == {"t1", "positive"}
    for sign in (1, -1):
        x = np.full((1, WIDTH), sign, np.float32)
        _, chain = split_at(model, [frozenset({0, 1, 2})], tmp_path, x)
        assert np.array_equal(chain.run({"t0": x})["t2"], ort.session(model.SerializeToString()).run({"t0": x})["t2"])


def test_nodes_in_any_order_are_put_in_order(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["t1"], ["t2"]), helper.make_node("Neg", ["t0"], ["t1"])]
    flow = read_flow(wrap(nodes, [], ["t2"]))
    assert [op.kind for op in flow.ops] == ["Neg", "Relu"]


def test_cuts_that_are_not_nested_or_not_closed_are_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Neg", [f"t{at}"], [f"t{at + 1}"]) for at in range(3)]
    model, x = wrap(nodes, [], ["t3"]), np.ones((1, WIDTH), np.float32)
    for prefixes in ([frozenset({1})], [frozenset({0, 1}), frozenset({0})], [frozenset({0, 1, 2})]):
        with pytest.raises(FormatError):
            split_at(model, prefixes, tmp_path, x)


@pytest.mark.parametrize("kind", ["plain", "residual", "depthwise"])
def test_the_shortlisted_cuts_of_a_small_net_keep_its_answers(kind: str, small_net: Any, tmp_path: Path) -> None:
    net = small_net(kind)
    types = observed_types(net.model, {"x": net.x})
    flow = read_flow(net.model, types)
    cuts = shortlist(flow)
    assert cuts
    pieces = write_segments(net.model, flow, [cut.prefix for cut in cuts], tmp_path, types, base="")
    chain = ort.chain([tmp_path / one.file.lstrip("/") for one in pieces.segments], flow.outputs)
    whole = ort.session(net.model.SerializeToString())
    np.testing.assert_allclose(
        chain.run({"x": net.x[:50]})["logits"], whole.run({"x": net.x[:50]})["logits"], atol=1e-5
    )
    for before, after in itertools.pairwise([*pieces.live, pieces.outputs]):
        assert before
        assert after


def outside(model: Any, folder: Path) -> Path:
    """Write the model with all its constants in a file beside it."""
    path = folder / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def three_products() -> Any:
    nodes = [
        helper.make_node("MatMul", ["t0", "shared"], ["t1"]),
        helper.make_node("MatMul", ["t1", "back"], ["t2"]),
        helper.make_node("MatMul", ["t2", "shared"], ["t3"]),
    ]
    back = numpy_helper.from_array(np.random.default_rng(1).standard_normal((200, WIDTH)).astype(np.float32), "back")
    return wrap(nodes, [big("shared", 0), back], ["t3"])


@pytest.mark.parametrize("limit", [1 << 30, 4000])
def test_external_data_is_never_read_into_the_graph_and_very_large_segments_keep_theirs_outside(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "INLINE_BYTES", limit)
    right = ort.session(three_products().SerializeToString())
    path = outside(three_products(), tmp_path)
    raw, graph = read_model(path)
    assert graph.ByteSize() < 1500
    x = np.random.default_rng(2).standard_normal((2, WIDTH)).astype(np.float32)
    types = observed_types(graph, {"t0": x}, tmp_path)
    flow = read_flow(graph, types)
    folder = tmp_path / "segments"
    folder.mkdir()
    pieces = write_segments(graph, flow, [frozenset({0}), frozenset({0, 1})], folder, types, source=tmp_path)
    chain = ort.chain([folder.parent / one.file for one in pieces.segments], flow.outputs)
    np.testing.assert_allclose(chain.run({"t0": x})["t3"], right.run({"t0": x})["t3"], rtol=1e-5)
    np.testing.assert_array_equal(ort.session(raw).run({"t0": x})["t3"], right.run({"t0": x})["t3"])
    assert pieces.shared is not None
    held = [one for one in pieces.segments if one.bytes > 4000]
    assert len(held) == (0 if limit == 4000 else 1)


@pytest.mark.parametrize("fault", ["missing", "short", "elsewhere"])
def test_external_data_that_is_not_there_or_lies_elsewhere_is_one_sentence(fault: str, tmp_path: Path) -> None:
    graph = read_model(outside(three_products(), tmp_path))[1]
    if fault == "missing":
        (tmp_path / "weights.bin").unlink()
    elif fault == "short":
        (tmp_path / "weights.bin").write_bytes(b"\0" * 5000)
    else:
        for item in graph.graph.initializer:
            item.external_data[0].value = "../weights.bin"
    flow = read_flow(graph)
    with pytest.raises(FormatError, match="is missing or too short|which is not beside the model"):
        write_segments(graph, flow, [frozenset({0})], tmp_path, source=tmp_path)


def test_names_that_a_loop_inside_a_branch_captures_cross_the_cut(tmp_path: Path) -> None:
    body = helper.make_graph(
        [
            helper.make_node("Add", ["sum_in", "t1"], ["sum_out"]),
            helper.make_node("Identity", ["go_in"], ["go_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_in", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_out", TensorProto.FLOAT, None),
        ],
    )
    yes = helper.make_graph(
        [helper.make_node("Loop", ["three", "", "t0"], ["looped"], body=body)],
        "yes", [], [helper.make_tensor_value_info("looped", TensorProto.FLOAT, None)],
    )  # fmt: skip
    no = helper.make_graph(
        [helper.make_node("Mul", ["t2", "weight"], ["negative"])],
        "no", [], [helper.make_tensor_value_info("negative", TensorProto.FLOAT, None)],
    )  # fmt: skip
    nodes = [
        helper.make_node("Mul", ["t0", "weight"], ["t1"]),
        helper.make_node("Neg", ["t1"], ["t2"]),
        helper.make_node("ReduceSum", ["t0"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["t3"], then_branch=yes, else_branch=no),
    ]
    constants = [
        numpy_helper.from_array(np.float32(2), "weight"), numpy_helper.from_array(np.float32(0), "zero"),
        numpy_helper.from_array(np.int64(3), "three"),
    ]  # fmt: skip
    model = wrap(nodes, constants, ["t3"])
    assert set(read_flow(model).live(frozenset({0, 1, 2, 3}))) == {"t0", "t1", "t2", "positive"}
    for sign in (1, -1):
        x = np.full((1, WIDTH), sign, np.float32)
        right = ort.session(model.SerializeToString()).run({"t0": x})["t3"]
        for at in range(1, 5):
            folder = tmp_path / f"{sign}{at}"
            folder.mkdir()
            _, chain = split_at(model, [frozenset(range(at))], folder, x)
            assert np.array_equal(chain.run({"t0": x})["t3"], right)


def test_an_output_that_depends_on_no_input_is_refused() -> None:
    nodes = [helper.make_node("Relu", ["t0"], ["t1"]), helper.make_node("Neg", ["w"], ["t2"])]
    with pytest.raises(FormatError, match="output 't2' depends on no input"):
        read_flow(wrap(nodes, [numpy_helper.from_array(np.ones((1, WIDTH), np.float32), "w")], ["t1", "t2"]))


def quantized(model: Any) -> Any:
    """Put QuantizeLinear and DequantizeLinear behind every node."""
    nodes = []
    for node in model.graph.node:
        given = node.output[0]
        node.output[0] = f"{given}.float"
        nodes += [
            node,
            helper.make_node("QuantizeLinear", [f"{given}.float", "step", "middle"], [f"{given}.codes"]),
            helper.make_node("DequantizeLinear", [f"{given}.codes", "step", "middle"], [given]),
        ]
    constants = [
        *model.graph.initializer, numpy_helper.from_array(np.float32(0.05), "step"),
        numpy_helper.from_array(np.uint8(128), "middle"),
    ]  # fmt: skip
    return wrap(nodes, constants, [item.name for item in model.graph.output])


@settings(max_examples=25, deadline=None)
@given(model=models(), data=st.data())
def test_a_chain_cut_at_codes_is_bit_equal_to_the_whole(
    model: Any, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = quantized(model)
    flow = read_flow(model)
    glued, prefixes = flow.glued(), [frozenset[int]()]
    for size in range(1, len(flow.ops)):
        prefix = frozenset(range(size))
        if not set(flow.live(prefix)) & glued and data.draw(st.booleans()):
            prefixes.append(prefix)
    x = np.random.default_rng(0).standard_normal((2, WIDTH)).astype(np.float32)
    folder = tmp_path_factory.mktemp("q")
    pieces, chain = split_at(model, prefixes[1:], folder, x)
    whole = ort.session(model.SerializeToString()).run({"t0": x})
    found, again = chain.run({"t0": x}), joined(pieces, folder, flow.outputs, 0).run({"t0": x})
    for name, array in whole.items():
        assert np.array_equal(found[name], array)
        assert np.array_equal(again[name], array)
