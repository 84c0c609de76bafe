"""A recipe done again: the same bytes for the same inputs, said plainly for others, one sentence where it does not fit."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from compress import graph, judge
from compress.passes.canonicalise import CANONICALISE
from compress.recipe import Recipe, read_recipe
from compress.replay import differences
from compress.run import run
from compress.stage import read, write
from compress.train import training_machine
from skills.errors import FormatError

Build = Callable[[str], Any]


def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train two rungs for eight steps, and let the last of them be the result whatever else is smaller."""
    monkeypatch.setattr("compress.ladder.steps", lambda at, *_: 8 if at < 2 else 0)
    monkeypatch.setattr("compress.run.result", lambda families, *_: families[-1][-1])


def with_training(net: Any) -> dict[str, Any]:
    return {"x": net.x[:200], "y": net.y[:200], "x_train": net.x[200:700], "y_train": net.y[200:700]}


def first(net: Any, data: Any, folder: Path, max_drop: float) -> tuple[Path, bytes, Recipe]:
    """Compress a net; return its recipe's path, the bytes of the result, and the recipe."""
    (folder / "model.onnx").write_bytes(net.model.SerializeToString())
    run(folder / "model.onnx", data, folder / "first", device="x86-avx2", max_drop=max_drop)
    path = folder / "first" / "recipe.yaml"
    return path, (folder / "first" / "model.onnx").read_bytes(), read_recipe(path)


def trained_on(folder: Path) -> str:
    return str(json.loads((folder / "lineage.json").read_text()).get("trained_on", ""))


@pytest.mark.parametrize("kind", ["residual", "shortcut", "transformer"])
def test_a_recipe_gives_the_same_bytes_again(kind: str, small_net: Build, tmp_path: Path) -> None:
    net = small_net(kind)
    path, bytes_before, recipe = first(net, net.data, tmp_path, 3.0)
    assert recipe.passes[0] == CANONICALISE.name
    assert trained_on(tmp_path / "first") == "", "nothing was trained"
    stages: set[str] = set()
    report = run(
        tmp_path / "model.onnx", net.data, tmp_path / "second", recipe=path,
        progress=lambda stage, _share, _best: stages.add(stage),
    )  # fmt: skip
    assert (tmp_path / "second" / "model.onnx").read_bytes() == bytes_before
    assert "following the recipe" in stages
    assert not any("choosing bits" in stage for stage in stages)
    assert not any("other inputs" in warning for warning in report.details.warnings)
    again = read_recipe(tmp_path / "second" / "recipe.yaml")
    same = dataclasses.replace(again, inputs={k: v for k, v in again.inputs.items() if k != "recipe"})
    assert same == recipe


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["residual", "shortcut"])
def test_a_recipe_with_training_gives_the_same_bytes_again(
    kind: str, small_net: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_steps(monkeypatch)
    net = small_net(kind)
    path, bytes_before, recipe = first(net, with_training(net), tmp_path, 90.0)
    assert [row.stage for row in recipe.training] == ["rung 1", "rung 2"]
    assert "train" in recipe.passes
    assert trained_on(tmp_path / "first") == training_machine()
    monkeypatch.setattr(
        "compress.ladder.steps", lambda *_, **__: pytest.fail("a recipe's steps are not counted out again")
    )
    monkeypatch.setattr("compress.learn.choose", lambda *_, **__: pytest.fail("nothing is chosen again"))
    run(tmp_path / "model.onnx", with_training(net), tmp_path / "second", recipe=path, time_budget=1.0)
    assert (tmp_path / "second" / "model.onnx").read_bytes() == bytes_before
    pages = [(tmp_path / name / "report.html").read_text() for name in ("first", "second")]
    assert ["when this layer alone is stored so" in page for page in pages] == [True, False]
    assert ["a recipe says the widths" in page for page in pages] == [False, True]
    for page in pages:  # what was said of the network before training is not said of the one that was trained
        assert "Rounding layer after layer" not in page
        assert "whole models were tried" not in page


def test_a_model_that_cannot_be_trained_keeps_what_needs_no_training_and_no_recipe_trains_it(
    small_net: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_steps(monkeypatch)
    net = small_net("plain")
    path, _, _ = first(net, with_training(net), tmp_path, 90.0)
    monkeypatch.setattr("compress.run.result", judge.result)
    (tmp_path / "model.onnx").write_bytes(quantized_at_its_input(net.model).SerializeToString())
    report = run(tmp_path / "model.onnx", with_training(net), tmp_path / "second", device="x86-avx2", max_drop=20.0,
                 teacher=tmp_path / "model.onnx")  # fmt: skip
    (said,) = [said for said in report.details.warnings if said.startswith("Nothing was trained")]
    assert "QuantizeLinear" in said
    assert said.endswith(". The teacher was not used.")
    assert report.verdict != "not_reached"
    assert report.result.bytes_file < report.baseline.bytes_file
    with pytest.raises(FormatError, match="QuantizeLinear"):
        run(tmp_path / "model.onnx", with_training(net), tmp_path / "third", recipe=path)
    assert not (tmp_path / "third").exists()


def test_training_that_breaks_leaves_what_needs_none(
    small_net: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr("compress.learn.fit", broken)
    net = small_net("plain")
    (tmp_path / "model.onnx").write_bytes(net.model.SerializeToString())
    report = run(tmp_path / "model.onnx", with_training(net), tmp_path / "out", device="x86-avx2", max_drop=20.0)
    assert "Nothing was trained: training failed: RuntimeError: not enough memory." in report.details.warnings
    assert report.verdict != "not_reached"


def quantized_at_its_input(model: Any) -> Any:
    """A model as a quantizer writes it: codes, which have no torch counterpart, between its input and what reads that."""
    changed = graph.copy(model)
    for node in changed.graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = "restored" if name == "x" else name
    for at, (kind, source, made) in enumerate((("Quantize", "x", "codes"), ("Dequantize", "codes", "restored"))):
        changed.graph.node.insert(at, helper.make_node(f"{kind}Linear", [source, "step", "zero"], [made]))
    changed.graph.initializer.extend(
        [graph.tensor("step", np.float32(0.05)), graph.tensor("zero", np.array(128, np.uint8))]
    )
    return changed


def test_a_recipe_on_other_data_is_followed_and_the_difference_is_said(small_net: Build, tmp_path: Path) -> None:
    net = small_net("plain")
    path, _, recipe = first(net, net.data, tmp_path, 3.0)
    report = run(tmp_path / "model.onnx", {"x": net.x[::-1].copy(), "y": net.y}, tmp_path / "second", recipe=path)
    assert any("made with other inputs" in warning and "data.x" in warning for warning in report.details.warnings)
    again = read_recipe(tmp_path / "second" / "recipe.yaml")
    assert (again.layers, again.passes, again.choices) == (recipe.layers, recipe.passes, recipe.choices)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: {"layers": (dataclasses.replace(r.layers[0], name="nowhere"), *r.layers[1:])}, "the layer 'nowhere'"),
        (lambda r: {"layers": r.layers[1:]}, "says nothing of the layer"),
        (lambda r: {"passes": (*r.passes, "magic")}, "asks for the pass 'magic'"),
        (lambda r: {"choices": {"guard": "both ways"}}, "chooses 'both ways'"),
        (lambda r: {"passes": (*r.passes, "train")}, "0 stages of training"),
    ],
)  # fmt: skip
def test_a_recipe_for_another_model_is_one_sentence(
    change: Callable[[Recipe], dict[str, Any]], sentence: str, small_net: Build, tmp_path: Path
) -> None:
    net = small_net("plain")
    path, _, recipe = first(net, net.data, tmp_path, 3.0)
    path.write_bytes(dataclasses.replace(recipe, **change(recipe)).encode())
    with pytest.raises(FormatError, match=sentence) as caught:
        run(tmp_path / "model.onnx", net.data, tmp_path / "second", recipe=path)
    assert not (tmp_path / ".second.work").exists()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"groups": 99}, "channel group 99"),
        ({"branches": ("nowhere",)}, "'nowhere' is no residual branch"),
        ({"bits": {"nowhere": 4.0}}, "the layer 'nowhere'"),
        ({}, "has no x_train"),
    ],
)
def test_training_that_does_not_fit_the_model_or_the_data_is_one_sentence(
    change: dict[str, Any], sentence: str, small_net: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_steps(monkeypatch)
    net = small_net("plain")
    path, _, recipe = first(net, with_training(net), tmp_path, 90.0)
    (row, *rest), changes = recipe.training, dict(change)
    if "groups" in changes:
        changes["groups"] = tuple(dataclasses.replace(group, group=99) for group in row.groups)
    path.write_bytes(dataclasses.replace(recipe, training=(dataclasses.replace(row, **changes), *rest)).encode())
    data = with_training(net) if change else net.data
    with pytest.raises(FormatError, match=sentence):
        run(tmp_path / "model.onnx", data, tmp_path / "second", recipe=path)


def test_a_stage_survives_being_written_into_a_recipe(
    small_net: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_steps(monkeypatch)
    net = small_net("plain")
    _, _, recipe = first(net, with_training(net), tmp_path, 90.0)
    for at, row in enumerate(recipe.training):
        assert write(at, read(row)) == row
        short = dataclasses.replace(row, steps=row.steps - 1, planned=row.steps)
        assert write(at, read(short)) == short
        assert read(short).settings.ends() == row.steps - 1


def test_other_inputs_are_named_and_the_recipe_itself_is_none(small_net: Build, tmp_path: Path) -> None:
    net = small_net("plain")
    _, _, recipe = first(net, net.data, tmp_path, 3.0)
    assert differences(recipe, {**recipe.inputs, "recipe": "0" * 64}) == ()
    (sentence,) = differences(recipe, {**recipe.inputs, "data.y": "0" * 64, "teacher": "0" * 64})
    assert sentence.endswith("data.y, teacher.")
