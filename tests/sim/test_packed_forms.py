"""Whole small nets in every stored width: the same answers as plain int8 codes, int8 kernels, and few bytes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from cloud.split.inputs import read_model
from compress import profiles
from compress.emit import emit, layer_codes, least_runtime, widths
from compress.passes.canonicalise import canonicalise
from compress.passes.place import find_layers, place
from compress.passes.ranges import activations
from compress.scheme import Layer, Scheme
from compress.statistics import Statistics, observe
from compress.weights import TERNARY, encode
from skills import ort
from skills.macros import expanded

WIDTHS = (8, 4, 3, 2, TERNARY)
KINDS = ("plain", "residual", "depthwise")
OLD = dataclasses.replace(profiles.find("x86-vnni"), runtime_min="1.17")  # gets int8 codes, each layer for itself


@dataclasses.dataclass(frozen=True)
class Case:
    """A canonical net with its statistics and a scheme of 8 bits."""

    model: Any
    seen: Statistics
    scheme: Scheme
    x: np.ndarray


@pytest.fixture(scope="module")
def case() -> Callable[..., Case]:
    known: dict[tuple[str, str], Case] = {}

    def build(small_net: Any, kind: str, profile: str = "x86-vnni") -> Case:
        if (kind, profile) not in known:
            net = small_net(kind)
            model = canonicalise(net.model)
            seen = observe(model, activations(model), net.x[:100], lambda _share: None)
            scheme = place(model, seen, profiles.find(profile), depthwise="int8", others="int8")
            known[kind, profile] = Case(model, seen, scheme, net.x[100:200])
        return known[kind, profile]

    return build


def in_width(scheme: Scheme, bits: float) -> Scheme:
    return scheme.with_bits({layer.node: bits for layer in scheme.layers})


def as_plain_int8(case: Case, scheme: Scheme) -> Any:
    """The same codes, scales and biases in the plainest form: int8, float32 and int32, each layer for itself."""
    values = {item.name: numpy_helper.to_array(item) for item in case.model.graph.initializer}
    nodes = {node.name: node for node in case.model.graph.node}
    codes, biases = {}, {}
    for layer in scheme.layers:
        codes[layer.node] = dataclasses.replace(layer_codes(layer, values[layer.weight], 8), bits=8)
        if len(nodes[layer.node].input) > 2:
            bias = values[nodes[layer.node].input[2]]
            biases[layer.node] = bias.astype(np.float16).astype(np.float32)
    plain = dataclasses.replace(in_width(scheme, 8), profile=OLD)
    return emit(case.model, plain.with_codes(codes).with_biases(biases), case.seen)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_net_answers_exactly_as_its_codes_in_plain_int8(case, small_net, kind: str, bits: float) -> None:
    one = case(small_net, kind)
    scheme = in_width(one.scheme, bits)
    packed, plain = emit(one.model, scheme, one.seen), as_plain_int8(one, scheme)
    onnx.checker.check_model(packed, full_check=True)
    got = ort.session(packed.SerializeToString()).run({"x": one.x})["logits"]
    assert (got == ort.session(plain.SerializeToString()).run({"x": one.x})["logits"]).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_a_packed_net_gets_its_int8_kernel_and_nothing_is_left_to_unfold(
    case, small_net, kind: str, bits: float
) -> None:
    one = case(small_net, kind)
    audit = ort.audit(emit(one.model, in_width(one.scheme, bits), one.seen).SerializeToString())
    assert sorted(row.node for row in audit.rows) == sorted(f"L{at}" for at in range(len(one.scheme.layers)))
    assert not audit.stayed_float
    assert not {"Cast", "Div", "Mod", "Mul", "Split", "BitwiseXor", "Squeeze", "Reshape"} & audit.counts.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_net_says_the_same_with_its_functions_written_out(case, small_net, kind: str) -> None:
    one = case(small_net, kind)
    packed = emit(one.model, in_width(one.scheme, TERNARY), one.seen)
    assert packed.functions
    flat = expanded(packed)
    assert not flat.functions
    onnx.checker.check_model(flat)
    answers = [ort.session(model.SerializeToString()).run({"x": one.x})["logits"] for model in (packed, flat)]
    assert (answers[0] == answers[1]).all()


def test_a_packed_net_is_split_with_its_functions_written_out(case, small_net) -> None:
    one = case(small_net, "residual")
    packed = emit(one.model, in_width(one.scheme, 2), one.seen)
    assert "QuantizeLinear" not in {node.op_type for node in packed.graph.node}
    written, graph = read_model(packed.SerializeToString())
    # The planner knows by this operator that the quantized input is still the input.
    assert "QuantizeLinear" in {node.op_type for node in graph.graph.node}
    assert onnx.load_model_from_string(written) == graph


def test_the_audit_names_each_layer_of_a_net_whose_layers_became_calls(case, small_net) -> None:
    one = case(small_net, "residual")
    layers = [dataclasses.replace(layer, compute="float") for layer in one.scheme.layers]
    layers[0] = one.scheme.layers[0]
    audit = ort.audit(
        emit(one.model, dataclasses.replace(one.scheme, layers=tuple(layers)), one.seen).SerializeToString()
    )
    assert {row.node for row in audit.rows if row.int8} == {"L0"}
    assert {row.node for row in audit.stayed_float} == {f"L{at}" for at in range(1, len(layers))}


def test_each_narrower_width_makes_a_smaller_file(case, small_net) -> None:
    one = case(small_net, "residual")
    sizes = [emit(one.model, in_width(one.scheme, bits), one.seen).ByteSize() for bits in (32, *WIDTHS)]
    assert sizes == sorted(sizes, reverse=True)


def test_widths_may_be_mixed_layer_by_layer(case, small_net) -> None:
    one = case(small_net, "depthwise")
    scheme = one.scheme.with_bits({layer.node: WIDTHS[at % len(WIDTHS)] for at, layer in enumerate(one.scheme.layers)})
    packed, plain = emit(one.model, scheme, one.seen), as_plain_int8(one, scheme)
    answers = [ort.session(model.SerializeToString()).run({"x": one.x})["logits"] for model in (packed, plain)]
    assert (answers[0] == answers[1]).all()


def test_given_codes_are_stored_as_they_are_where_the_width_fits(case, small_net) -> None:
    one = case(small_net, "plain")
    layer = one.scheme.layers[0]
    weight = next(numpy_helper.to_array(i) for i in one.model.graph.initializer if i.name == layer.weight)
    codes = encode(weight, layer.axis, 2)
    codes = dataclasses.replace(codes, values=-1 - codes.values)
    fixed = in_width(one.scheme, 2).with_codes({layer.node: codes})
    other = in_width(one.scheme, 4).with_codes({layer.node: codes})
    assert emit(one.model, fixed, one.seen) != emit(one.model, in_width(one.scheme, 2), one.seen)
    assert emit(one.model, other, one.seen) == emit(one.model, in_width(one.scheme, 4), one.seen)


def test_a_given_bias_replaces_the_models(case, small_net) -> None:
    one = case(small_net, "plain")
    head = one.scheme.layers[-1]
    raised = one.scheme.with_biases({head.node: np.array([0, 0, 50, 0], np.float32)})
    got = ort.session(emit(one.model, raised, one.seen).SerializeToString()).run({"x": one.x})["logits"]
    assert (got.argmax(axis=1) == 2).all()


def test_a_runtime_too_old_for_packed_weights_gets_eight_bits(case, small_net) -> None:
    one = case(small_net, "plain")
    assert widths(one.model, OLD) == (8,)
    old = emit(one.model, dataclasses.replace(in_width(one.scheme, 2), profile=OLD), one.seen)
    assert not old.functions
    assert {item.data_type for item in old.graph.initializer} <= {1, 2, 3, 6, 7}


def test_a_runtime_without_division_of_bytes_gets_eight_bits(case, small_net) -> None:
    one = case(small_net, "plain")
    assert widths(one.model, dataclasses.replace(OLD, runtime_min="1.20")) == (8,)
    assert widths(one.model, dataclasses.replace(OLD, runtime_min="1.21")) == WIDTHS


def test_litert_gets_plain_int8(case, small_net) -> None:
    one = case(small_net, "plain", "arm64-litert")
    assert widths(one.model, one.scheme.profile) == (8,)
    assert not emit(one.model, one.scheme, one.seen).functions


@pytest.mark.parametrize(
    ("bits", "least"), [(8, (1, 18)), (4, (1, 21)), (3, (1, 21)), (2, (1, 21)), (TERNARY, (1, 21))]
)
def test_the_least_runtime_of_a_scheme_is_known(bits: float, least: tuple[int, int]) -> None:
    layer = Layer("c", "Conv", "w", 0, (4, 4, 3, 3), bits=bits)
    assert least_runtime(Scheme((layer,), {}, profiles.find("x86-vnni"))) == least


@pytest.mark.parametrize("name", ["x86-vnni", "x86-avx2", "arm64-onnxruntime"])
def test_every_shipped_profile_of_onnxruntime_takes_every_width(case, small_net, name: str) -> None:
    assert widths(case(small_net, "plain").model, profiles.find(name)) == WIDTHS


def test_weights_whose_scales_16_bits_cannot_hold_are_exact_all_the_same() -> None:
    # A net for pictures of 0…255 million: its scales are smaller than any 16-bit float.
    weight = (np.random.default_rng(0).standard_normal((8, 16)) * 1e-9).astype(np.float32)
    node = helper.make_node("Gemm", ["x", "w"], ["y"], "g", transB=1)
    body = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", 1, ["n", 16])],
        [helper.make_tensor_value_info("y", 1, ["n", 8])], [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    model = canonicalise(helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    layer = Layer("g", "Gemm", model.graph.node[0].input[1], 0, (8, 16), 1, "float", 4)
    file = emit(model, Scheme((layer,), {}, profiles.find("x86-vnni")), {}).SerializeToString()
    x = np.random.default_rng(1).uniform(0, 255e6, (5, 16)).astype(np.float32)
    want = x @ encode(weight, 0, 4).restore().T
    assert np.allclose(ort.session(file).run({"x": x})["y"], want, rtol=1e-4, atol=1e-5)


def reader() -> tuple[Any, dict[str, np.ndarray]]:
    """A net that reads words: an embedding, an LSTM, a GRU and a wide MatMul."""
    chance = np.random.default_rng(2)
    shapes = {
        "table": (50, 32), "lw": (1, 64, 32), "lr": (1, 64, 16), "gw": (1, 36, 16), "gr": (1, 36, 12), "m": (12, 40)
    }  # fmt: skip
    values = {name: (chance.standard_normal(shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Gather", ["table", "words"], ["e"], "gather"),
        helper.make_node("LSTM", ["e", "lw", "lr"], ["", "h"], "lstm", hidden_size=16),
        helper.make_node("GRU", ["h", "gw", "gr"], ["g"], "gru", hidden_size=12),
        helper.make_node("MatMul", ["g", "m"], ["y"], "matmul"),
    ]
    body = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("words", 7, [9, "n"])],
        [helper.make_tensor_value_info("y", 1, [1, 1, "n", 40])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )  # fmt: skip
    return canonicalise(helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)), values


@pytest.mark.parametrize("bits", WIDTHS)
def test_tables_and_recurrent_weights_are_stored_in_few_bits_and_folded_to_float(bits: float) -> None:
    model, values = reader()
    layers = tuple(dataclasses.replace(layer, compute="float", bits=bits) for layer in find_layers(model))
    assert [layer.weight for layer in layers] == list(values)
    restored = reader()[0]
    for item in restored.graph.initializer:
        layer = next(layer for layer in layers if layer.weight == item.name)
        codes = encode(values[item.name], layer.axis, bits)
        item.CopyFrom(numpy_helper.from_array(codes.restore(), item.name))
    file = emit(model, Scheme(layers, {}, profiles.find("x86-vnni")), {}).SerializeToString()
    words = np.random.default_rng(3).integers(0, 50, (9, 4))
    got, want = (ort.session(data).run({"words": words})["y"] for data in (file, restored.SerializeToString()))
    assert (got == want).all()
    assert not {"Cast", "Mul", "Div", "Mod", "Split"} & ort.audit(file).counts.keys()
    assert len(file) < sum(value.nbytes for value in values.values()) * (bits + 5) / 32


def test_each_kind_of_weights_has_scales_along_its_own_axis() -> None:
    model, _ = reader()
    axes = {layer.weight: layer.axis for layer in find_layers(model)}
    assert axes == {"table": 0, "lw": 1, "lr": 1, "gw": 1, "gr": 1, "m": 1}
