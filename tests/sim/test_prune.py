"""Channels that go without training: what a recipe says is done, the search offers it, and it replays."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress import Goal, graph, kept
from compress.channels import branches, groups
from compress.measure import answers
from compress.passes.canonicalise import canonicalise
from compress.passes.prune import KEPT, PRUNE, smaller, spare
from compress.pipeline import State
from compress.profiles import find
from compress.recipe import read_recipe
from compress.run import run
from compress.shrinking import Shrink
from skills import ort
from skills.errors import FormatError

Build = Callable[[str], Any]


def saved(net: Any, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(net.model.SerializeToString())
    return path


def weights(model: Any) -> int:
    return sum(value.size for value in graph.arrays(model).values())


def last_cut(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let the smallest network be the result, whatever else is better; return the families' names, run by run."""
    seen: list[list[str]] = []

    def result(families: Any, *_: object) -> Any:
        seen.append([one.emitted.name for one in families[-1]])
        return families[-1][-1]

    monkeypatch.setattr("compress.run.result", result)
    return seen


def replayed(folder: Path, net: Any) -> bytes:
    run(folder / "model.onnx", net.data, folder / "again", recipe=folder / "out" / "recipe.yaml")
    return (folder / "again" / "model.onnx").read_bytes()


@pytest.mark.parametrize(("kind", "goal"), [("residual", "both"), ("depthwise", "latency")])
def test_smaller_networks_are_offered_with_the_bits_that_were_found(
    kind: str, goal: Goal, small_net: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = last_cut(monkeypatch)
    net = small_net(kind)
    report = run(saved(net, tmp_path), net.data, tmp_path / "out", device="x86-avx2", max_drop=90.0, goal=goal)
    assert seen[0] == [f"pruned {at + 1}" for at in range(len(seen[0]))]
    recipe = read_recipe(tmp_path / "out" / "recipe.yaml")
    assert recipe.removed is not None
    assert recipe.removed.groups
    assert recipe.passes.index(PRUNE.name) < recipe.passes.index("ranges")
    assert any("Without training" in note for note in report.details.notes)
    before, after = report.details.macs or (0, 0)
    assert 0 < after < before
    assert replayed(tmp_path, net) == (tmp_path / "out" / "model.onnx").read_bytes()


def test_a_residual_branch_may_go_and_is_gone_in_a_replay(
    small_net: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_cut(monkeypatch)
    net = small_net("residual")
    add = branches(canonicalise(net.model))[0].add
    monkeypatch.setattr("compress.candidates.spare", lambda *_: Shrink({}, (add,)))
    run(saved(net, tmp_path), net.data, tmp_path / "out", device="x86-avx2", max_drop=90.0)
    recipe = read_recipe(tmp_path / "out" / "recipe.yaml")
    assert recipe.removed is not None
    assert recipe.removed.branches == (add,)
    assert replayed(tmp_path, net) == (tmp_path / "out" / "model.onnx").read_bytes()


def test_a_coarse_step_leaves_out_the_networks_that_it_went_past(
    small_net: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def far(model: Any, now: Shrink, kept: float, *rest: Any) -> Shrink:
        asked.append(kept)
        return spare(model, now, kept - 0.08, *rest)

    monkeypatch.setattr("compress.candidates.spare", far)
    seen = last_cut(monkeypatch)
    net = small_net("residual")
    run(saved(net, tmp_path), net.data, tmp_path / "out", device="x86-avx2", max_drop=90.0)
    assert asked[0] == KEPT[0]
    assert KEPT[1] not in asked
    assert len(seen[0]) == len(asked) < len(KEPT)


def test_a_run_that_goes_on_has_the_smaller_networks_that_it_made(
    small_net: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def interrupted(model: Any, now: Shrink, kept: float, *rest: Any) -> Shrink:
        asked.append(kept)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return spare(model, now, kept, *rest)

    monkeypatch.setattr("compress.candidates.spare", interrupted)
    net = small_net("plain")
    path = saved(net, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(path, net.data, tmp_path / "out", device="x86-avx2", max_drop=90.0)
    run(path, net.data, tmp_path / "out", device="x86-avx2", max_drop=90.0, resume=True)
    assert asked[1] == asked[2]
    assert asked.count(asked[0]) == 1


def test_without_time_no_channels_go_and_the_report_says_so(small_net: Build, tmp_path: Path) -> None:
    net = small_net("plain")
    report = run(saved(net, tmp_path), net.data, tmp_path / "out", device="x86-avx2", max_drop=90.0, time_budget=1.0)
    said = "No channels were removed: the time ended before the network was cut to 95% of its work."
    assert said in report.details.warnings


def test_nothing_is_removed_for_bytes_alone(small_net: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.candidates.spare", lambda *_: pytest.fail("bits save bytes at less harm"))
    net = small_net("plain")
    run(saved(net, tmp_path), net.data, tmp_path / "out", device="x86-avx2", max_drop=90.0, goal="size")


def test_a_network_that_cannot_be_taken_apart_keeps_its_channels_and_says_why(
    small_net: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> Shrink:
        raise FormatError("the operator Wavelet has no torch counterpart")

    monkeypatch.setattr("compress.candidates.spare", refused)
    net = small_net("plain")
    report = run(saved(net, tmp_path), net.data, tmp_path / "out", device="x86-avx2", max_drop=90.0)
    said = "No channels were removed: pass 'prune': the operator Wavelet has no torch counterpart."
    assert said in report.details.warnings


def test_a_smaller_network_is_kept_for_a_run_that_goes_on(small_net: Build) -> None:
    net = small_net("residual")
    model = canonicalise(net.model)
    number = next(at for at, group in enumerate(groups(graph.with_biases(model))) if group.makers and group.readers)
    shrink = Shrink({number: (0, 2, 3)})
    state = State(smaller(model, shrink, net.x[:64]), removed=shrink)
    assert weights(state.model) < weights(model)
    found = kept.unpack(kept.pack(state), find("x86-avx2"))
    assert found.removed == shrink
    assert kept.unpack(kept.pack(dataclasses.replace(state, removed=None)), find("x86-avx2")).removed is None


def test_a_recipe_that_removes_what_is_not_there_is_refused(
    small_net: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.run.result", lambda families, *_: families[-1][-1])
    net = small_net("residual")
    run(saved(net, tmp_path), net.data, tmp_path / "out", device="x86-avx2", max_drop=90.0)
    recipe = read_recipe(tmp_path / "out" / "recipe.yaml")
    assert recipe.removed is not None
    far = dataclasses.replace(recipe.removed.groups[0], kept=(0, 999))
    for wrong, said in (
        (dataclasses.replace(recipe, removed=None), "does not say what is removed"),
        (dataclasses.replace(recipe, removed=dataclasses.replace(recipe.removed, groups=(far,))), "keeps unit 999"),
    ):
        (tmp_path / "wrong.yaml").write_bytes(wrong.encode())
        with pytest.raises(FormatError, match=said):
            run(tmp_path / "model.onnx", net.data, tmp_path / "no", recipe=tmp_path / "wrong.yaml")
        assert not (tmp_path / "no").exists()


def test_what_stays_answers_as_before_where_nothing_went(small_net: Build) -> None:
    net = small_net("plain")
    same = smaller(canonicalise(net.model), Shrink(), net.x[:64])
    before, after = (
        answers(ort.session(model.SerializeToString()), net.x[:64]) for model in (canonicalise(net.model), same)
    )
    np.testing.assert_allclose(after, before, atol=1e-4)
