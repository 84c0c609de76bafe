"""Every packed form of weights, run on the real runtime and held against the same arithmetic in NumPy."""

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from onnx import helper, numpy_helper

from compress import profiles
from compress.emit import emit
from compress.passes.canonicalise import canonicalise
from compress.scheme import Layer, Range, Scheme
from compress.weights import TERNARY, encode
from skills import ort

INPUT, OUTPUT = Range(-1.0, 3.0), Range(0.0, 6.0)
UNFOLDING = {"Cast", "Mul", "Div", "Mod", "Split", "Squeeze", "BitShift"}
WIDTHS = (8, 4, 3, 2, TERNARY)
CASES = [
    (compute, bits, profile) for compute in ("int8", "float") for bits in WIDTHS for profile in ("x86-vnni", "x86-avx2")
]


def conv_model() -> tuple[Any, dict[str, np.ndarray]]:
    chance = np.random.default_rng(3)
    values = {"w": chance.standard_normal((8, 4, 3, 3)) * 0.3, "b": chance.standard_normal(8)}
    values = {name: value.astype(np.float32) for name, value in values.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    return model_of(nodes, ["n", 4, 6, 6], ["n", 8, 6, 6], values), values


def gemm_model() -> tuple[Any, dict[str, np.ndarray]]:
    chance = np.random.default_rng(4)
    values = {
        "w": chance.standard_normal((9, 31)).astype(np.float32),
        "b": chance.standard_normal(9).astype(np.float32),
    }
    return model_of(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm", transB=1)], ["n", 31], ["n", 9], values
    ), values


def model_of(nodes: list[Any], taken: list[Any], made: list[Any], values: dict[str, np.ndarray]) -> Any:
    body = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, taken)],
        [helper.make_tensor_value_info("y", 1, made)],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    model = canonicalise(helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    onnx.checker.check_model(model)
    return model


def rounded(x: np.ndarray, limits: Range) -> np.ndarray:
    scale, zero = limits.quant("u8")
    return (np.clip(np.rint(x / np.float32(scale)) + zero, 0, 255) - zero) * scale


def convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    windows = sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, weight) + bias[:, None, None]


@pytest.mark.parametrize(("compute", "bits", "profile"), CASES)
def test_a_packed_convolution_computes_what_its_codes_say(compute: str, bits: float, profile: str) -> None:
    model, values = conv_model()
    target = profiles.find(profile)
    layer = Layer("conv", "Conv", "w", 0, (8, 4, 3, 3), 1, compute, bits)  # type: ignore[arg-type]
    ranges = {"x": INPUT, "y": OUTPUT} if compute == "int8" else {}
    file = emit(model, Scheme((layer,), ranges, target), {}).SerializeToString()
    x = np.random.default_rng(5).uniform(-1.2, 3.2, (3, 4, 6, 6)).astype(np.float32)
    weight = encode(values["w"], 0, bits, target.weight_bits if compute == "int8" else 8).restore()
    bias = values["b"].astype(np.float16).astype(np.float32)  # as stored
    want = np.maximum(convolved(rounded(x, INPUT) if ranges else x, weight, bias), 0)
    got = ort.session(file, exact=profiles.saturates_here(target)).run({"x": x})["y"]
    if ranges:  # one step of the output's codes is lost to the order of additions
        assert np.abs(got - rounded(want, OUTPUT)).max() <= OUTPUT.quant("u8")[0] * 1.01
    else:
        assert np.allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_packed_gemm_answers_in_float_from_its_codes(bits: float) -> None:
    model, values = gemm_model()
    layer = Layer("gemm", "Gemm", "w", 0, (9, 31), 1, "int8", bits)
    target = profiles.find("x86-vnni")
    file = emit(model, Scheme((layer,), {"x": INPUT}, target), {}).SerializeToString()
    x = np.random.default_rng(6).uniform(-1, 3, (5, 31)).astype(np.float32)
    want = rounded(x, INPUT) @ encode(values["w"], 0, bits).restore().T + values["b"]
    assert np.allclose(ort.session(file, exact=profiles.saturates_here(target)).run({"x": x})["y"], want, atol=0.02)
    assert ort.audit(file).counts["QGemm"] == 1


@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_int8_layers_fold_into_the_int8_kernel_at_load(bits: float) -> None:
    model, _ = conv_model()
    layer = Layer("conv", "Conv", "w", 0, (8, 4, 3, 3), 1, "int8", bits)
    file = emit(model, Scheme((layer,), {"x": INPUT, "y": OUTPUT}, profiles.find("x86-vnni")), {}).SerializeToString()
    audit = ort.audit(file)
    assert audit.counts["QLinearConv"] == 1
    assert not UNFOLDING & audit.counts.keys()
    assert not audit.stayed_float


@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_float_layers_leave_nothing_to_unfold_at_run_time(bits: float) -> None:
    model, _ = conv_model()
    layer = Layer("conv", "Conv", "w", 0, (8, 4, 3, 3), 1, "float", bits)
    counts = ort.audit(emit(model, Scheme((layer,), {}, profiles.find("x86-vnni")), {}).SerializeToString()).counts
    assert not (UNFOLDING | {"DequantizeLinear"}) & counts.keys()


def test_four_bits_halve_the_file_of_eight() -> None:
    chance = np.random.default_rng(0)
    weight = chance.standard_normal((64, 64, 3, 3)).astype(np.float32)
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1] * 4)]
    model = model_of(nodes, ["n", 64, 6, 6], ["n", 64, 6, 6], {"w": weight})
    sizes = []
    for bits in (4, 8):
        layer = Layer("conv", "Conv", "w", 0, weight.shape, 1, "int8", bits)
        scheme = Scheme((layer,), {"x": INPUT, "y": INPUT}, profiles.find("x86-vnni"))
        sizes.append(len(emit(model, scheme, {}).SerializeToString()))
    assert sizes[0] < 0.55 * sizes[1]


def test_a_bias_too_large_for_its_channel_is_not_clipped() -> None:
    # A channel of nearly dead weights has a tiny scale; a bias of 5 in units of that scale would overflow int32.
    values = {"w": np.full((2, 4, 1, 1), 1e-12, np.float32), "b": np.array([5.0, 1.0], np.float32)}
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv"), helper.make_node("Relu", ["c"], ["y"])]
    model = model_of(nodes, ["n", 4, 2, 2], ["n", 2, 2, 2], values)
    layer = Layer("conv", "Conv", "w", 0, (2, 4, 1, 1))
    scheme = Scheme((layer,), {"x": INPUT, "y": OUTPUT}, profiles.find("x86-vnni"))
    got = ort.session(emit(model, scheme, {}).SerializeToString()).run({"x": np.zeros((1, 4, 2, 2), np.float32)})["y"]
    assert np.allclose(got[0, :, 0, 0], [5, 1], atol=0.03)
