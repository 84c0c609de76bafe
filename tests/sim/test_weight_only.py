"""Linear layers in blocks of 4 bits: read by the runtime as NumPy says, kept only where they are worth it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from compress import graph, neural, profiles
from compress.data import Data
from compress.emit import emit
from compress.judge import check_audit
from compress.measure import answers
from compress.metrics import choose
from compress.passes import weight_only
from compress.passes.bits import BITS
from compress.passes.canonicalise import CANONICALISE
from compress.passes.place import PLACE
from compress.passes.ranges import RANGES
from compress.passes.weight_only import WEIGHT_ONLY, in_blocks, large
from compress.pieces import pieces
from compress.pipeline import Bench, State
from compress.recipe import Recipe, RecipeLayer, load_recipe, recipe_layers
from compress.splits import split
from compress.weights import Blocks
from skills import ort
from skills.errors import SkerryError

SIZE = 32


def rtn(layers: Sequence[neural.Linear], _method: str, size: int) -> list[Blocks]:
    """Round to nearest, as neural-compressor's method of that name: a stand-in where it is not installed."""
    found = []
    for layer in layers:
        rows = layer.weight.reshape(len(layer.weight), -1, size)
        scales = (np.abs(rows).max(axis=2) / 7).astype(np.float32)
        codes = np.clip(np.rint(rows / scales[..., None]), -8, 7).astype(np.int8)
        found.append(Blocks(codes.reshape(layer.weight.shape), scales, size))
    return found


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> tuple[State, Bench]:
    """A small net of three linear layers, one of them too small, calibrated and placed; neural-compressor is the stand-in."""
    monkeypatch.setattr(weight_only, "LARGE", 64 * 64)
    monkeypatch.setattr(weight_only, "SIZES", (SIZE,))
    monkeypatch.setattr(neural, "available", lambda: True)
    monkeypatch.setattr(neural, "rounded", rtn)
    chance = np.random.default_rng(2)
    stored = {"w1": chance.standard_normal((64, 64)) / 8, "w2": chance.standard_normal((128, 64)) / 8}
    stored |= {"b2": chance.standard_normal(128), "w3": chance.standard_normal((5, 128)) / 4}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "w2", "b2"], ["c"], "second", transB=1),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "w3"], ["y"], "head", transB=1),
    ]
    ends = [helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("x", 64), ("y", 5))]
    inits = [graph.tensor(name, value.astype(np.float32)) for name, value in stored.items()]
    body = helper.make_graph(nodes, "net", ends[:1], ends[1:], inits)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    x = chance.standard_normal((300, 64)).astype(np.float32)
    y = ort.session(model.SerializeToString()).run({"x": x})["y"].argmax(1).astype(np.int64)
    state = CANONICALISE.run(State(model), None)  # type: ignore[arg-type] - it never looks at its bench
    parts = split(Data(x, y), 0)
    session = ort.session(state.model.SerializeToString())
    original = [answers(session, part.x) for part in (parts.calibrate, parts.select)]
    metric = choose(Data(x, y), original[0][:1], x[:1])
    bench = Bench(profiles.find("x86-avx2"), parts, metric, *original, 10.0, "both", lambda _share, _best: None)
    return PLACE.run(RANGES.run(state, bench), bench), bench


def coded(state: State) -> dict[str, Blocks]:
    layers = large(state.model, state.planned(), SIZE)
    values = graph.arrays(state.model)
    weights = [neural.Linear(np.moveaxis(values[la.weight], la.axis, 0), np.eye(64, dtype=np.float32)) for la in layers]
    return {layer.node: blocks for layer, blocks in zip(layers, rtn(weights, "rtn", SIZE), strict=True)}


def with_restored(model: Any, state: State, blocks: dict[str, Blocks]) -> Any:
    """Return the float model with the weights that the blocks stand for, scales as 16 bits hold them."""
    copy = graph.copy(model)
    for layer in state.planned().layers:
        if layer.node in blocks:
            one = blocks[layer.node]
            one = dataclasses.replace(one, scales=one.scales.astype(np.float16).astype(np.float32))
            (item,) = [item for item in copy.graph.initializer if item.name == layer.weight]
            item.CopyFrom(graph.tensor(layer.weight, np.moveaxis(one.restore(), 0, layer.axis)))
    return copy


def test_only_large_linear_layers_whose_inputs_fill_blocks_are_taken(prepared: tuple[State, Bench]) -> None:
    state, _ = prepared
    assert [layer.shape for layer in large(state.model, state.planned(), SIZE)] == [(64, 64), (128, 64)]
    assert not large(state.model, state.planned(), 48)


def test_the_runtime_reads_blocks_as_numpy_does_with_and_without_bias(prepared: tuple[State, Bench]) -> None:
    state, bench = prepared
    blocks = coded(state)
    scheme = in_blocks(state, bench, blocks)
    # The head stays in int8: take it out, so that nothing else is rounded.
    scheme = dataclasses.replace(scheme, layers=tuple(la for la in scheme.layers if la.node in blocks), ranges={})
    file = emit(state.model, scheme, state.seen()).SerializeToString()
    want = ort.session(with_restored(state.model, state, blocks).SerializeToString()).run({"x": bench.splits.report.x})[
        "y"
    ]
    got = ort.session(file).run({"x": bench.splits.report.x})["y"]
    assert np.allclose(got, want, atol=2e-3 * np.abs(want).max())
    assert ort.audit(file).counts["MatMulNBits"] == 2
    assert pieces(file)["weights in 4 bits"] == sum(one.values.size for one in blocks.values()) // 2


def test_a_layer_in_blocks_computes_in_float_and_the_others_as_before(prepared: tuple[State, Bench]) -> None:
    state, bench = prepared
    scheme = in_blocks(state, bench, coded(state))
    assert [(layer.compute, layer.bits) for layer in scheme.layers] == [("float", 4), ("float", 4), ("int8", 8)]


def test_blocks_that_the_runtime_did_not_take_fail_the_audit(prepared: tuple[State, Bench]) -> None:
    state, bench = prepared
    audit = ort.audit(emit(state.model, state.planned(), state.seen()).SerializeToString())
    with pytest.raises(SkerryError, match="2 layers should read 4-bit weights"):
        check_audit(audit, in_blocks(state, bench, coded(state)))


def test_blocks_are_kept_where_they_are_smaller_and_within_the_budget(prepared: tuple[State, Bench]) -> None:
    state, bench = prepared
    after = WEIGHT_ONLY.run(state, bench)
    assert after.planned().blocks.keys() == coded(state).keys()
    assert "Kept: " in after.notes[-1]


def test_blocks_that_cost_too_much_are_told_and_left(
    prepared: tuple[State, Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, bench = prepared
    shifted = lambda *given: [dataclasses.replace(one, values=-one.values) for one in rtn(*given)]  # noqa: E731
    monkeypatch.setattr(neural, "rounded", shifted)
    after = WEIGHT_ONLY.run(state, dataclasses.replace(bench, max_drop=0.5))
    assert after.planned() is state.planned()
    assert "points without: gptq 32" in after.notes[-1]
    assert "Kept" not in after.notes[-1]


def test_a_way_that_fails_is_told_and_the_others_go_on(
    prepared: tuple[State, Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(layers: Sequence[neural.Linear], method: str, size: int) -> list[Blocks]:
        if method == "gptq":
            raise SkerryError("the matrix is singular")
        return rtn(layers, method, size)

    state, bench = prepared
    monkeypatch.setattr(neural, "rounded", fails)
    after = WEIGHT_ONLY.run(state, bench)
    assert "gptq 32: the matrix is singular" in after.notes[-2]
    assert after.choices == {"weight-only": "rtn 32"}


def test_a_missing_extra_is_one_sentence(prepared: tuple[State, Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    state, bench = prepared
    monkeypatch.setattr(neural, "available", lambda: False)
    after = WEIGHT_ONLY.run(state, bench)
    assert after.notes[-1].endswith("pip install 'skerry[inc]'.")
    assert after.planned() is state.planned()


@pytest.mark.converters
@pytest.mark.skipif(not neural.available(), reason="needs the extra: pip install 'skerry[inc]'")
def test_neural_compressor_answers_better_by_gptq_than_by_rounding_to_nearest() -> None:
    chance = np.random.default_rng(4)
    weight = (chance.standard_normal((64, 128)) / 8).astype(np.float32)
    read = (chance.standard_normal((600, 16)) @ chance.standard_normal((16, 128))).astype(np.float32)
    read += 0.1 * chance.standard_normal(read.shape).astype(np.float32)
    off = {}
    for method in neural.METHODS:
        (one,) = neural.rounded([neural.Linear(weight, read)], method, SIZE)
        off[method] = float(((read @ (one.restore() - weight).T) ** 2).mean())
    assert off["gptq"] < 0.7 * off["rtn"]


def test_a_recipe_gives_the_same_blocks_without_a_search(prepared: tuple[State, Bench]) -> None:
    state, bench = prepared
    found = WEIGHT_ONLY.run(state, bench)
    asked = Recipe(bench.profile, 10.0, "both", 0, found.passes, (), choices=found.choices)
    again = WEIGHT_ONLY.run(state, dataclasses.replace(bench, planned=asked))
    assert emit(again.model, again.planned(), again.seen()) == emit(found.model, found.planned(), found.seen())
    assert not again.tried
    none = WEIGHT_ONLY.run(state, dataclasses.replace(bench, planned=dataclasses.replace(asked, choices={})))
    assert none.planned() is state.planned()


def test_a_recipe_fits_the_layers_behind_those_in_blocks_as_they_were_fitted_before(
    prepared: tuple[State, Bench],
) -> None:
    state, bench = prepared
    bench = dataclasses.replace(bench, max_drop=100.0)
    layers = tuple(
        RecipeLayer(layer.node, "int8", bits) for layer, bits in zip(state.planned().layers, (8, 8, 3), strict=True)
    )
    asked = Recipe(bench.profile, 100.0, "both", 0, (), layers)
    fitted = BITS.run(state, dataclasses.replace(bench, planned=asked))  # what a search may come to
    found = WEIGHT_ONLY.run(fitted, bench)
    assert len(found.planned().blocks) == 2
    layers = recipe_layers(found.planned())
    assert [(layer.bits, layer.bits_before) for layer in layers] == [(4, 8), (4, 8), (3, None)]
    text = dataclasses.replace(asked, layers=layers, choices=found.choices).encode().decode()
    planned = dataclasses.replace(bench, planned=load_recipe(text, "recipe.yaml"))
    again = WEIGHT_ONLY.run(BITS.run(state, planned), planned)
    assert emit(again.model, again.planned(), again.seen()) == emit(found.model, found.planned(), found.seen())
    assert recipe_layers(again.planned()) == layers
