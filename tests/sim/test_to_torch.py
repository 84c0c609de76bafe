"""The torch twin of a graph computes what onnxruntime computes, and its weights go back where they came from."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper

from compress import graph
from compress.operators import OPERATORS
from compress.passes.canonicalise import canonicalise
from compress.to_torch import Twin
from skills import ort
from skills.errors import FormatError, NotFound

Array = NDArray[Any]
CHANCE = np.random.default_rng(3)


def real(*shape: int) -> Array:
    return CHANCE.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> Array:
    return np.abs(real(*shape)) + np.float32(0.1)


def whole(*values: int) -> Array:
    return np.asarray(values, np.int64)


def one(value: float) -> Array:
    return np.asarray(value, np.float32)


class Case:
    """One node: its operator, inputs (None where one is left out) and attributes."""

    def __init__(self, op: str, *inputs: Array | None, opset: int = 21, outs: int = 1, **facts: Any) -> None:
        self.op, self.inputs, self.opset, self.outs, self.facts = op, inputs, opset, outs, facts

    def __str__(self) -> str:
        shown = (f"{name}={str(value).replace(' ', '')}" for name, value in self.facts.items())
        return "-".join((self.op, *shown, *(() if self.opset == 21 else (f"opset{self.opset}",))))[:80]

    def model(self, fed: int) -> Any:
        """Return a model whose first `fed` inputs are fed and the others stored."""
        names = [f"i{at}" if value is not None else "" for at, value in enumerate(self.inputs)]
        ends = [f"o{at}" for at in range(self.outs)]
        node = helper.make_node(self.op, names, ends, "the node", **self.facts)
        given = {n: v for n, v in zip(names, self.inputs, strict=True) if v is not None}
        body = helper.make_graph(
            [node],
            "one",
            [_value(n, v) for n, v in list(given.items())[:fed]],
            [helper.make_empty_tensor_value_info(n) for n in ends],
            [graph.tensor(n, v) for n, v in list(given.items())[fed:]],
        )
        return _model(body, self.opset)

    def feeds(self, fed: int) -> dict[str, Array]:
        given = {f"i{at}": value for at, value in enumerate(self.inputs) if value is not None}
        return dict(list(given.items())[:fed])


def _value(name: str, value: Array) -> Any:
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    shape = [f"{name}_{at}" for at in range(value.ndim)] if value.ndim > 1 else list(value.shape)
    return helper.make_tensor_value_info(name, kind, shape)


def _model(body: Any, opset: int = 21) -> Any:
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(model)  # onnxruntime asks for the outputs' types
    for at, end in enumerate(inferred.graph.output):
        if end.type.tensor_type.elem_type:
            model.graph.output[at].CopyFrom(end)
    return model


def assert_same(model: Any, feeds: dict[str, Array], tolerance: float = 1e-5) -> None:
    want = ort.session(model.SerializeToString()).run(feeds)
    twin = Twin(model)
    got = twin.run({name: torch.from_numpy(value) for name, value in feeds.items()}, list(want))
    for name, value in want.items():
        found = got[name].detach().numpy()
        assert found.shape == value.shape
        assert found.dtype == value.dtype
        scale = max(1e-6, float(np.abs(value).max()), float(np.ptp(value.astype(np.float64)))) if value.size else 1.0
        assert np.allclose(found, value, rtol=0, atol=tolerance * scale, equal_nan=True)


X2, X3, X4, X5 = real(4, 6), real(2, 3, 11), real(2, 3, 9, 10), real(1, 2, 5, 6, 7)
CONVS = [
    Case("Conv", X4, real(4, 3, 3, 3)),
    Case("Conv", X4, real(4, 3, 3, 3), real(4), pads=[1, 1, 1, 1], strides=[2, 2], kernel_shape=[3, 3]),
    Case("Conv", X4, real(6, 1, 3, 3), real(6), group=3, dilations=[2, 1], pads=[2, 0, 1, 1]),
    Case("Conv", X4, real(4, 3, 3, 2), auto_pad="SAME_UPPER", strides=[2, 3]),
    Case("Conv", X4, real(4, 3, 4, 4), auto_pad="SAME_LOWER"),
    Case("Conv", X4, real(4, 3, 4, 4), auto_pad="VALID"),
    Case("Conv", X3, real(4, 3, 3), real(4), pads=[0, 2], strides=[2]),
    Case("Conv", X3, real(4, 3, 4), auto_pad="SAME_UPPER"),
    Case("Conv", X5, real(4, 2, 3, 3, 3), pads=[1, 0, 1, 1, 0, 1], dilations=[1, 2, 1]),
    Case("ConvTranspose", X4, real(3, 4, 3, 3), real(4)),
    Case("ConvTranspose", X4, real(3, 2, 3, 3), real(6), group=3, strides=[2, 2], pads=[1, 1, 1, 1],
         output_padding=[1, 1]),
    Case("ConvTranspose", X4, real(3, 4, 3, 3), strides=[2, 3], pads=[0, 1, 1, 2], dilations=[2, 1]),
    Case("ConvTranspose", X4, real(3, 4, 3, 3), strides=[2, 2], output_shape=[18, 20]),
    Case("ConvTranspose", X4, real(3, 4, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    Case("ConvTranspose", X4, real(3, 4, 3, 3), strides=[2, 2], auto_pad="SAME_LOWER"),
    Case("ConvTranspose", X3, real(3, 4, 4), strides=[2]),
    Case("ConvTranspose", X5, real(2, 3, 2, 2, 2), strides=[2, 1, 2]),
]  # fmt: skip
PRODUCTS = [
    Case("Gemm", X2, real(6, 5), real(5)),
    Case("Gemm", X2, real(5, 6), real(5), transB=1),
    Case("Gemm", X2, real(5, 6), transB=1),
    Case("Gemm", X2, real(5, 4), real(6, 1), transA=1, transB=1, alpha=0.5, beta=2.0),
    Case("Gemm", X2, real(6, 5), alpha=3.0),
    Case("Gemm", X2, real(6, 5), one(0.5)),
    Case("MatMul", real(2, 4, 6), real(6, 5)),
    Case("MatMul", real(2, 1, 4, 6), real(3, 6, 5)),
    Case("MatMul", real(6), real(6, 5)),
    Case("Einsum", real(2, 3, 4), real(2, 5, 4), equation="bij,bkj->bik"),
]  # fmt: skip
NORMS = [
    Case("BatchNormalization", X4, real(3), real(3), real(3), positive(3), epsilon=1e-3),
    Case("BatchNormalization", X3, real(3), real(3), real(3), positive(3)),
    Case("InstanceNormalization", X4, real(3), real(3), epsilon=1e-2),
    Case("LayerNormalization", real(2, 5, 8), real(8), real(8)),
    Case("LayerNormalization", real(2, 5, 8), real(5, 8), axis=1),
    Case("LayerNormalization", real(2, 5, 8), real(8), real(8), axis=-2),
    Case("GroupNormalization", real(2, 6, 4, 4), real(6), real(6), num_groups=3),
    Case("GroupNormalization", real(2, 6, 4, 4), real(3), real(3), num_groups=3, opset=18),
    Case("LRN", real(2, 7, 3, 3), size=3, alpha=0.1, beta=0.5, bias=2.0),
    Case("LRN", real(2, 7, 3, 3), size=5),
    Case("LpNormalization", X3, axis=1, p=1),
    Case("LpNormalization", X3),
]
MATHS = [
    *(Case(op, X4, real(3, 1, 1)) for op in ("Add", "Sub", "Mul", "Div", "PRelu")),
    *(Case(op, whole(7, -7, 9), whole(2, 2, -4)) for op in ("Add", "Div", "Mod")),
    Case("Mod", real(5), real(5), fmod=1),
    Case("Pow", positive(2, 3), one(1.7)), Case("Pow", whole(2, 3), one(2.0)), Case("Pow", X2, one(2.0)),
    *(Case(op, X2, real(6), real(4, 1)) for op in ("Min", "Max", "Sum", "Mean")),
    *(Case(op, X2) for op in ("Neg", "Abs", "Exp", "Erf", "Reciprocal", "Sign", "Floor", "Ceil", "Sin", "Cos")),
    Case("Round", np.float32([-1.5, -0.5, 0.5, 1.5, 2.3])),
    Case("Sqrt", positive(3, 4)), Case("Log", positive(3, 4)),
    *(Case(op, 4 * X2) for op in ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Celu",
                                  "Selu", "Softplus", "Softsign", "Mish", "Gelu", "Identity")),
    Case("LeakyRelu", X2, alpha=0.3), Case("Elu", X2, alpha=0.5), Case("Celu", X2, alpha=0.5),
    Case("Selu", X2, alpha=1.1, gamma=0.9), Case("HardSigmoid", 4 * X2, alpha=1 / 6, beta=0.5),
    Case("HardSigmoid", 4 * X2, alpha=0.3, beta=0.4), Case("Gelu", X2, approximate="tanh"),
    Case("PRelu", X2, real(1)), Case("Softplus", np.float32([-90, 18, 25, 90])),
    Case("Clip", X2, one(-0.5), one(0.6)), Case("Clip", X2, None, one(0.6)), Case("Clip", X2, one(0.0)),
    Case("Clip", X2), Case("Clip", X2, opset=10, min=-0.5, max=0.6), Case("Clip", X2, opset=10, max=0.6),
    *(Case(op, X3, **facts) for op in ("Softmax", "LogSoftmax") for facts in ({}, {"axis": 1}, {"axis": 0})),
    *(Case(op, X3, opset=9, **facts) for op in ("Softmax", "LogSoftmax") for facts in ({}, {"axis": 2}, {"axis": 0})),
    *(Case(op, whole(1, 2, 3), whole(3, 2, 1))
      for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")),
    *(Case(op, np.array([1, 1, 0], bool), np.array([1, 0, 0], bool)) for op in ("And", "Or", "Xor")),
    Case("Not", np.array([1, 0], bool)), Case("Where", real(4, 6) > 0, X2, real(6)),
    Case("Cast", 3 * X2, to=7), Case("Cast", whole(0, 1, 2), to=1), Case("Cast", whole(0, 1, 2), to=9),
    Case("CastLike", whole(0, 1, 2), X2),
]  # fmt: skip
POOLED = [
    Case("MaxPool", X4, kernel_shape=[3, 2], strides=[2, 2]),
    Case("MaxPool", X4, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    Case("MaxPool", X4, kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 2, 1]),
    Case("MaxPool", X4, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    Case("MaxPool", X4, kernel_shape=[3, 3], strides=[2, 3], pads=[1, 1, 1, 1], ceil_mode=1),
    Case("MaxPool", X4, kernel_shape=[2, 2], dilations=[2, 3]),
    Case("MaxPool", X4, kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    Case("MaxPool", X4, kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_LOWER"),
    Case("MaxPool", X3, kernel_shape=[3], strides=[2], ceil_mode=1),
    Case("MaxPool", X5, kernel_shape=[2, 2, 2], strides=[2, 1, 2]),
    Case("AveragePool", X4, kernel_shape=[3, 2], strides=[2, 2]),
    Case("AveragePool", X4, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    Case("AveragePool", X4, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1),
    Case("AveragePool", X4, kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 2, 1], count_include_pad=1),
    Case("AveragePool", X4, kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 2, 1]),
    Case("AveragePool", X4, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    Case("AveragePool", X4, kernel_shape=[3, 3], strides=[2, 3], pads=[1, 1, 1, 1], ceil_mode=1),
    Case("AveragePool", X4, kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    Case("AveragePool", X4, kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_LOWER", count_include_pad=1),
    Case("AveragePool", X3, kernel_shape=[3], strides=[2], pads=[1, 1]),
    Case("AveragePool", X5, kernel_shape=[2, 2, 2]),
    *(Case(op, x) for op in ("GlobalAveragePool", "GlobalMaxPool") for x in (X3, X4, X5)),
]
REDUCED = [
    *(Case(op, X3, whole(-1), opset=18)
      for op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
                 "ReduceSumSquare", "ReduceLogSumExp")),
    Case("ReduceLogSum", positive(3, 4), whole(1), opset=18),
    *(Case(op, X4, opset=11, axes=[1, -1], keepdims=0)
      for op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceProd", "ReduceL2")),
    *(Case(op, X4, opset=18, keepdims=keep) for op in ("ReduceMean", "ReduceMax", "ReduceProd") for keep in (0, 1)),
    Case("ReduceSum", X4, noop_with_empty_axes=1), Case("ReduceSum", whole(3, 4, 5)), Case("ReduceMax", whole(3, 4, 5)),
    Case("ArgMax", X3, axis=1), Case("ArgMax", X3, keepdims=0), Case("ArgMin", X3, axis=-1),
    Case("TopK", X3, whole(2), outs=2), Case("TopK", X3, whole(2), outs=2, largest=0, axis=1),
    Case("CumSum", X3, np.asarray(2)), Case("CumSum", X3, np.asarray(1), exclusive=1, reverse=1),
    Case("CumSum", X3, np.asarray(-1), exclusive=1),
]  # fmt: skip
MOVED = [
    Case("Flatten", X4), Case("Flatten", X4, axis=0), Case("Flatten", X4, axis=-1), Case("Flatten", X4, axis=4),
    Case("Reshape", X4, whole(0, -1)), Case("Reshape", X4, whole(-1, 5)),
    Case("Reshape", real(0, 3), whole(3, 0), allowzero=1),
    Case("Transpose", X4, perm=[0, 2, 3, 1]), Case("Transpose", X3),
    Case("Squeeze", real(1, 3, 1, 2), whole(0, -2)), Case("Squeeze", real(1, 3, 1, 2)),
    Case("Squeeze", real(1, 3, 1, 2), axes=[2], opset=11),
    Case("Unsqueeze", X2, whole(0, -1)), Case("Unsqueeze", X2, axes=[1, 3], opset=11),
    Case("Concat", X4, real(2, 5, 9, 10), axis=1), Case("Concat", X2, real(4, 1), real(4, 2), axis=-1),
    Case("Split", X4, whole(2, 7), axis=2, outs=2), Case("Split", X4, axis=3, outs=2, opset=13),
    Case("Split", X4, axis=3, outs=3, num_outputs=3), Case("Split", X4, axis=3, split=[1, 9], outs=2, opset=11),
    Case("Slice", X4, whole(1, 2), whole(9, -2), whole(2, 3)), Case("Slice", X4, whole(0, 1), whole(2, 99)),
    Case("Slice", X4, whole(0), whole(2**62), whole(-1), whole(3)),
    Case("Slice", X4, whole(-1), whole(-(2**62)), whole(3), whole(-2)),
    Case("Slice", X4, whole(7, 0), whole(1, 2), whole(2, 0), whole(-3, 1)), Case("Slice", X4, whole(5), whole(2)),
    Case("Slice", X4, whole(2), whole(5), whole(3), whole(-1)),
    Case("Slice", X4, opset=9, starts=[1, 2], ends=[9, -2], axes=[2, 3]),
    Case("Gather", X2, whole(3, -1, 0)), Case("Gather", X3, np.asarray(1), axis=2),
    Case("Gather", X3, CHANCE.integers(-3, 3, (2, 2)), axis=1), Case("Gather", whole(5, 6, 7), np.asarray(1)),
    Case("Gather", X2, CHANCE.integers(0, 4, (3, 5))),
    Case("GatherElements", X3, CHANCE.integers(-3, 3, (2, 3, 4)), axis=1),
    Case("Pad", X4, whole(0, 1, 2, 0, 0, 0, 3, 4)), Case("Pad", X4, whole(0, 0, 1, 2, 0, 0, 3, 4), one(1.5)),
    Case("Pad", X4, whole(0, 0, -1, 2, 0, 0, 3, -4)), Case("Pad", X4, whole(1, 2), None, whole(-1)),
    *(Case("Pad", X4, whole(0, 1, 2, 3, 0, 1, 0, 4), mode=mode) for mode in ("reflect", "edge", "wrap")),
    Case("Pad", X4, opset=10, pads=[0, 0, 1, 2, 0, 0, 3, 4], value=0.5),
    Case("Expand", real(3, 1), whole(2, 1, 6)), Case("Expand", X2, whole(1)), Case("Tile", X2, whole(2, 3)),
    Case("Shape", X4), Case("Shape", X4, start=1, end=-1), Case("Size", X4),
    Case("ConstantOfShape", whole(2, 3)),
    Case("ConstantOfShape", whole(2), value=helper.make_tensor("v", 7, [1], [5])),
    Case("Range", np.asarray(1), np.asarray(11), np.asarray(3)), Case("Range", one(1), one(0), one(-0.25)),
    *(Case("DepthToSpace", real(2, 8, 3, 4), blocksize=2, mode=mode) for mode in ("DCR", "CRD")),
    Case("SpaceToDepth", real(2, 3, 4, 6), blocksize=2),
    Case("Trilu", real(2, 4, 4)), Case("Trilu", real(4, 5), np.asarray(-1), upper=0), Case("Dropout", X2),
    *(Case("Constant", **{name: value})
      for name, value in (("value_int", 3), ("value_ints", [3, 4]), ("value_float", 0.5), ("value_floats", [0.5, 1.0]),
                          ("value", helper.make_tensor("v", 1, [2], [5, 6])))),
]  # fmt: skip
WHERE = ("half_pixel", "asymmetric", "pytorch_half_pixel", "align_corners", "half_pixel_symmetric")
RESIZED = [
    *(Case("Resize", X4, None, None, whole(2, 3, *size), mode=mode, coordinate_transformation_mode=where)
      for mode in ("nearest", "linear", "cubic") for where in WHERE for size in ((18, 30), (5, 7))),
    *(Case("Resize", X4, None, np.float32([1, 1, 2, 1.7]), mode="nearest", coordinate_transformation_mode=where,
           nearest_mode=nearest)
      for where in ("asymmetric", "half_pixel") for nearest in ("floor", "ceil", "round_prefer_ceil")),
    Case("Resize", X4, None, np.float32([2, 0.6]), mode="linear", axes=[2, 3]),
    Case("Resize", X3, None, np.float32([1, 1, 2]), mode="linear"),
    Case("Resize", X4, np.float32([1, 1, 2, 3]), mode="nearest", opset=10),
    Case("Upsample", X4, np.float32([1, 1, 2, 2]), mode="nearest", opset=9),
    Case("Upsample", X4, np.float32([1, 1, 2, 2]), mode="linear", opset=9),
]  # fmt: skip
RECURRENT = [
    Case(op, real(5, 2, 3), real(dirs, gates * 4, 3), real(dirs, gates * 4, 4),
         *((real(dirs, gates * 8), None, real(dirs, 2, 4), *((real(dirs, 2, 4),) if op == "LSTM" else ()))
           if full else ()),
         hidden_size=4, direction=direction, outs=3 if op == "LSTM" else 2, **facts)
    for op, gates, facts in (("LSTM", 4, {}), ("GRU", 3, {}), ("GRU", 3, {"linear_before_reset": 1}), ("RNN", 1, {}))
    for direction, dirs in (("forward", 1), ("reverse", 1), ("bidirectional", 2))
    for full in (False, True)
]  # fmt: skip
CASES = [*CONVS, *PRODUCTS, *NORMS, *MATHS, *POOLED, *REDUCED, *MOVED, *RESIZED, *RECURRENT]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_operator_computes_what_onnxruntime_computes(case: Case) -> None:
    given = sum(value is not None for value in case.inputs)
    for fed in sorted({min(1, given), given}):  # the rest stored, then everything fed
        assert_same(case.model(fed), case.feeds(fed))


def test_every_operator_has_a_parity_case() -> None:
    assert {case.op for case in CASES} == set(OPERATORS)


def test_a_missing_operator_is_named_with_its_node() -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["where"], "find it"),
        helper.make_node("Fancy", ["where"], ["y"], "be fancy", domain="com.example"),
    ]
    body = helper.make_graph(nodes, "g", [_value("x", X2)], [helper.make_empty_tensor_value_info("y")])
    with pytest.raises(FormatError, match=r"Fancy \(node 'be fancy'\), NonZero \(node 'find it'\)"):
        Twin(helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)]))


@pytest.mark.parametrize(
    "case",
    [
        Case("LSTM", real(5, 2, 3), real(1, 16, 3), real(1, 16, 4), hidden_size=4, clip=1.0),
        Case("GRU", real(2, 5, 3), real(1, 12, 3), real(1, 12, 4), hidden_size=4, layout=1),
        Case("MaxPool", X4, kernel_shape=[2, 2], outs=2),
        Case("AveragePool", X4, kernel_shape=[2, 2], dilations=[2, 2]),
        Case("Resize", X4, None, np.float32([1, 1, 0.5, 0.5]), mode="linear", antialias=1),
        Case("Cast", X2, to=8),
        Case("ArgMax", X2, select_last_index=1),
    ],
    ids=str,
)
def test_a_setting_that_is_not_computed_is_refused_with_its_node(case: Case) -> None:
    with pytest.raises(FormatError, match=f"{case.op} 'the node': "):
        Twin(case.model(1))


def _answers(model: Any, x: Array) -> Array:
    return next(iter(ort.session(model.SerializeToString()).run({"x": x}).values()))


@pytest.mark.parametrize("kind", ["plain", "residual", "depthwise"])
def test_gradients_reach_every_weight_and_training_reaches_the_graph(
    kind: str, small_net: Callable[[str], Any]
) -> None:
    net = small_net(kind)
    twin, x, y = Twin(net.model), torch.from_numpy(net.x[:64]), torch.from_numpy(net.y[:64])
    stored = graph.arrays(net.model)
    statistics = {name for n in net.model.graph.node if n.op_type == "BatchNormalization" for name in n.input[3:]}
    assert twin.weights.keys() == {name for name, value in stored.items() if value.size > 1} - statistics
    torch.nn.functional.cross_entropy(twin(x), y).backward()
    assert all(weight.grad.abs().max() > 0 for weight in twin.weights.values())
    with torch.no_grad():
        for weight in twin.weights.values():
            weight.sub_(0.01 * weight.grad)
    trained = twin.to_onnx()
    assert not np.allclose(_answers(trained, net.x[:64]), _answers(net.model, net.x[:64]), atol=1e-3)
    assert np.allclose(_answers(trained, net.x[:64]), twin(x).detach().numpy(), atol=1e-4)


def test_an_untrained_twin_gives_back_the_very_bytes(small_net: Callable[[str], Any]) -> None:
    model = graph.copy(small_net("residual").model)
    unpacked = helper.make_tensor("head", 1, [32, 4], graph.arrays(model)["head"].ravel())  # not stored as raw bytes
    next(item for item in model.graph.initializer if item.name == "head").CopyFrom(unpacked)
    assert Twin(model).to_onnx().SerializeToString() == model.SerializeToString()


def test_training_mode_changes_no_answer(small_net: Callable[[str], Any]) -> None:
    net = small_net("plain")
    twin, x = Twin(net.model), torch.from_numpy(net.x[:8])
    assert torch.equal(twin.train()(x), twin.eval()(x))


def test_run_computes_only_what_lies_between_the_fed_and_the_wanted(small_net: Callable[[str], Any]) -> None:
    net = small_net("residual")
    twin, x = Twin(net.model), torch.from_numpy(net.x[:8])
    whole_run = twin.run({"x": x}, ["pooled", "sum", "logits"])
    made = []
    for node in net.model.graph.node:
        twin.on_tensor[node.output[0]] = lambda value, name=node.output[0]: (made.append(name), value)[1]
    part = twin.run({"pooled": whole_run["pooled"], "x": x}, ["sum"])
    assert torch.equal(part["sum"], whole_run["sum"])
    between = [node.output[0] for node in net.model.graph.node]
    assert made == ["pooled", *between[between.index("pooled") + 1 : between.index("sum") + 1]]


def test_a_tensor_that_does_not_follow_from_what_is_fed_is_named(small_net: Callable[[str], Any]) -> None:
    net = small_net("plain")
    with pytest.raises(NotFound, match="'x' is needed"):
        Twin(net.model).run({"features": torch.zeros(1, 32)}, ["logits", "pooled"])


def test_transforms_are_applied_to_weights_and_activations_and_gradients_pass(small_net: Callable[[str], Any]) -> None:
    net = small_net("plain")
    twin, x = Twin(net.model), torch.from_numpy(net.x[:8])
    features = twin.run({"x": x}, ["features"])["features"]
    twin.on_weight["head"] = lambda weight: 2 * weight
    twin.on_tensor["features"] = lambda value: value + 1
    head, offset = twin.weights["head"], twin.weights["offset"]
    assert torch.allclose(twin(x), (features + 1) @ (2 * head) + offset, atol=1e-5)
    fed = twin.run({"features": features}, ["logits"])["logits"]
    assert torch.allclose(fed, (features + 1) @ (2 * head) + offset, atol=1e-5)
    twin(x).sum().backward()
    assert head.grad is not None
    twin.on_weight.clear()
    twin.on_tensor.clear()
    assert torch.allclose(twin(x), features @ head + offset, atol=1e-5)


@pytest.mark.parametrize("which", ["on_weight", "on_tensor"])
def test_a_transform_for_a_name_that_is_not_there_is_refused(which: str, small_net: Callable[[str], Any]) -> None:
    twin = Twin(small_net("plain").model)
    getattr(twin, which)["haed"] = lambda value: value
    with pytest.raises(NotFound, match=f"{which} names 'haed'"):
        twin(torch.zeros(1, 1, 12, 12))


def test_numbers_of_a_formula_are_no_weights_but_vectors_and_transposed_weights_are() -> None:
    nodes = [
        helper.make_node("Div", ["x", "half"], ["a"]),
        helper.make_node("Transpose", ["a/w.t"], ["w"]),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("Add", ["b", "shift"], ["c"]),
        helper.make_node("Mul", ["c", "table"], ["d"]),
        helper.make_node("Reshape", ["d", "shape"], ["y"]),
    ]
    stored = {"half": one(0.5), "a/w.t": real(5, 6), "shift": real(5), "table": real(4, 5), "shape": whole(-1, 2, 5)}
    body = helper.make_graph(
        nodes, "g", [_value("x", X2)], [helper.make_empty_tensor_value_info("y")],
        [graph.tensor(name, value) for name, value in stored.items()],
    )  # fmt: skip
    model = _model(body)
    assert_same(model, {"x": X2})
    twin = Twin(model)
    assert twin.weights.keys() == {"a/w.t", "shift"}
    twin(torch.from_numpy(X2)).square().sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in twin.weights.values())


@pytest.mark.parametrize("case", [case for case in RECURRENT if case.facts["direction"] == "forward"], ids=str)
def test_recurrent_layers_are_trained(case: Case) -> None:
    twin = Twin(case.model(1))
    assert {"i1", "i2"} <= twin.weights.keys()
    twin(torch.from_numpy(case.inputs[0])).square().sum().backward()
    assert all(twin.weights[name].grad.abs().max() > 0 for name in ("i1", "i2"))


def _reordering() -> Any:
    """A graph that computes the shape it wants and takes rows by stored indices."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "zero_axis"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["split"]),
        helper.make_node("Gather", ["split", "rows"], ["y"], axis=1),
    ]
    stored = {"zero": np.asarray(0), "zero_axis": whole(0), "rest": whole(-1, 3), "rows": whole(1, 0, -1)}
    body = helper.make_graph(
        nodes, "g", [_value("x", X2)], [helper.make_empty_tensor_value_info("y")],
        [graph.tensor(name, value) for name, value in stored.items()],
    )  # fmt: skip
    return _model(body)


def test_an_output_left_out_is_not_taken_for_an_input_left_out() -> None:
    x, w, r = real(5, 2, 3), real(1, 16, 3), real(1, 16, 4)
    nodes = [
        helper.make_node("LSTM", ["x", "w", "r"], ["", "state"], hidden_size=4),
        helper.make_node("Clip", ["state", "", "high"], ["y"]),
    ]
    stored = [graph.tensor("w", w), graph.tensor("r", r), graph.tensor("high", one(0.1))]
    body = helper.make_graph(nodes, "g", [_value("x", x)], [helper.make_empty_tensor_value_info("y")], stored)
    assert_same(_model(body), {"x": x})


def test_sizes_computed_in_the_graph_follow_the_input() -> None:
    twin = Twin(_reordering())
    assert [tuple(twin(torch.zeros(n, 6)).shape) for n in (4, 7)] == [(4, 3, 3), (7, 3, 3)]


def test_a_twin_elsewhere_keeps_sizes_on_the_cpu_and_takes_indices_along() -> None:
    made = Twin(_reordering()).to("meta")(torch.zeros(4, 6, device="meta"))  # a device that every machine has
    assert (made.device.type, tuple(made.shape)) == ("meta", (4, 3, 3))


def test_a_copy_of_a_twin_is_trained_apart_and_takes_a_saved_state(small_net: Callable[[str], Any]) -> None:
    net = small_net("plain")
    twin, x = Twin(net.model), torch.from_numpy(net.x[:8])
    other = copy.deepcopy(twin)
    with torch.no_grad():
        other.weights["head"].mul_(2)
    assert not torch.equal(other(x), twin(x))
    other.load_state_dict(twin.state_dict())
    assert torch.equal(other(x), twin(x))


REAL = {
    "cifar10jpeg/resnet20_cifar10jpeg": 1, "cifar10jpeg/resnet56_cifar10jpeg": 1, "imagenet/efficientnet_lite0": 1,
    "face/ultraface_RFB-320": 1, "mlperf_tiny/kws_dscnn": 1, "mlperf_tiny/ad_autoencoder": 1,
    "mlperf_tiny/ic_resnet8": 255, "mlperf_tiny/vww_mobilenetv1_025": 1, "sst2/sst2_textcnn": 1,
    "watch_imu/har_watch_cnn": 1,
}  # fmt: skip


@pytest.mark.reference
@pytest.mark.parametrize("name", REAL)
def test_real_models_compute_what_onnxruntime_computes(name: str, reference: Path) -> None:
    original = onnx.load(reference / f"{name}.onnx")
    (port,) = ort.session(original.SerializeToString()).inputs
    shape = [3 if size == -1 else size for size in port.shape]
    x = (
        CHANCE.integers(0, 2000, shape)
        if port.dtype == "int64"
        else CHANCE.random(shape, np.float32) * np.float32(REAL[name])
    )
    for model in (original, canonicalise(original)):
        assert_same(model, {port.name: x}, 1e-4)
