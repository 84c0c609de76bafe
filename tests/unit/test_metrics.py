from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from compress.data import Data, Part
from compress.measure import (
    BOOTSTRAP_SEED,
    OWN_RESAMPLES,
    Drop,
    drop,
    paired_drop,
    points,
    resampled,
    samples_for_proof,
    verdict,
)  # fmt: skip
from compress.metrics import METRICS, Metric, choose, macro_f1, roc_auc, unlabelled
from skills.errors import FormatError, UsageError

Array = NDArray[Any]
X = np.zeros((8, 3), np.float32)


def part(x: Array, y: Array | None, groups: Array | None = None) -> Part:
    return Part(x, y, np.arange(len(x)), "x", groups)


def metric(name: str | Callable[..., Any], output: Array, x: Array, y: Array | None = None) -> Metric:
    return choose(Data(x, y, metric=name), output, x)


def one_hot(answers: Array, classes: int) -> Array:
    return np.eye(classes)[answers]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=50))
def test_macro_f1_is_the_mean_of_each_class_harmonic_mean(pairs: list[tuple[int, int]]) -> None:
    y, answer = np.array(pairs).T
    each = []
    for name in set(y) | set(answer):
        right = ((y == name) & (answer == name)).sum()
        precision, recall = right / max(1, (answer == name).sum()), right / max(1, (y == name).sum())
        each.append(2 * precision * recall / (precision + recall) if right else 0.0)
    assert macro_f1(y, answer) == pytest.approx(np.mean(each))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=40))
def test_roc_auc_is_the_share_of_pairs_in_the_right_order(pairs: list[tuple[bool, int]]) -> None:
    ones, zeros = [s for y, s in pairs if y], [s for y, s in pairs if not y]
    wins = [(a > b) + (a == b) / 2 for a in ones for b in zeros]
    y, rank = np.array(pairs, int).T
    assert roc_auc(y, rank) == pytest.approx(np.mean(wins) if wins else 0.5)


def test_an_autoencoder_is_judged_by_its_error_as_the_anomaly_score() -> None:
    x = np.ones((4, 3), np.float32)
    output = x + np.array([0, 0.1, 3, 2])[:, None]
    y = np.array([0, 0, 1, 1])
    judged = choose(Data(x, y), output, x)
    assert judged.name == "roc_auc"
    assert judged.of(output, part(x, y), output) == 1.0


@pytest.mark.parametrize(
    ("output", "y", "name"),
    [
        ((8, 4), np.arange(8) % 4, "top1"),
        ((8, 1), np.arange(8) % 2, "roc_auc"),
        ((8,), np.arange(8) % 2, "roc_auc"),
        ((8, 2), np.arange(8) % 2, "top1"),
        ((8, 4), np.zeros((8, 4)), "mse"),
        ((8, 1), np.zeros(8), "mse"),
        ((8, 4), None, "agreement"),
        ((8, 3), None, "cosine"),  # shaped like the input
        ((8, 2, 4), None, "cosine"),
    ],
)
def test_the_metric_that_fits_is_taken_when_none_is_asked_for(
    output: tuple[int, ...], y: Array | None, name: str
) -> None:
    assert choose(Data(X, y), np.zeros(output), X).name == name


@pytest.mark.parametrize(
    ("output", "y", "name", "classes"),
    [
        ((8, 4), np.arange(8) % 4, None, True),
        ((8, 4), np.arange(8) % 4, lambda out, y: (out.argmax(1) == y).astype(float), True),
        ((8, 3), np.arange(8) % 3, "macro_f1", True),  # shaped like the input, and yet asked for as scores
        ((8, 4), None, None, True),
        ((8, 4), np.zeros((8, 4)), None, False),  # boxes
        ((8, 4), np.zeros((8, 4)), lambda out, y: abs(out - y).mean(1).clip(0, 1), False),
        ((8, 4), None, "cosine", False),  # embeddings
        ((8, 3), np.arange(8) % 2, "roc_auc", False),  # an autoencoder
        ((8, 1), np.arange(8) % 2, None, False),
    ],
)
def test_outputs_are_class_scores_where_the_metric_and_the_labels_say_so(
    output: tuple[int, ...], y: Array | None, name: Any, classes: bool
) -> None:
    assert choose(Data(X, y, metric=name), np.zeros(output), X).classes is classes


def test_without_y_the_target_of_a_reconstruction_is_its_input() -> None:
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    judged = metric("mse", x, x)
    assert not judged.needs_labels
    assert judged.of(x + 2, part(x, None), x) == pytest.approx(4)
    labelled = metric("mse", x[:, :1], x, x[:, 0])
    assert labelled.needs_labels
    assert labelled.of(x[:, :1] + 3, part(x, x[:, 0]), x) == pytest.approx(9)


def test_psnr_is_in_decibels_under_the_span_of_the_targets() -> None:
    x = np.array([[0.0, 10.0], [5.0, 5.0]])
    judged = metric("psnr", x, x)
    assert judged.of(x + 1, part(x, None), x) == pytest.approx(20)
    assert judged.of(x, part(x, None), x) == pytest.approx(100)


@pytest.mark.parametrize(
    ("name", "output", "y", "kind", "sentence"),
    [
        ("top2", (8, 4), np.arange(8) % 4, UsageError, "there is no metric top2, did you mean top1"),
        ("map50", (8, 4), None, UsageError, "there is no metric map50: use one of top1, macro_f1"),
        ("top1", (8, 4), None, FormatError, "the metric top1 needs y, the data has only x"),
        (
            "macro_f1",
            (8, 4),
            np.arange(8),
            FormatError,
            r"labels in y run from 0 to 7, the model's output has 4 classes",
        ),
        ("macro_f1", (8, 4, 2), np.arange(8), FormatError, r"macro_f1 needs an output \[N, classes\]"),
        ("top1", (8, 4), np.zeros(8), FormatError, r"y is float64 \[N\], top1 expected 8 whole-number labels"),
        ("roc_auc", (8, 1), np.zeros(8, int), FormatError, "all labels in y are 0, roc_auc needs both 0 and 1"),
        ("roc_auc", (8, 1), np.arange(8), FormatError, r"labels in y run from 0 to 7, roc_auc takes \(0 to 1\)"),
        ("roc_auc", (8, 5), np.arange(8) % 2, FormatError, "one or two scores a sample or a reconstruction"),
        ("psnr", (8, 4), None, FormatError, "psnr needs y or the input in the shape of the model's first output"),
        (None, (8, 4), np.zeros((8, 2)), FormatError, r"y is float64 \[N, 2\] and the model's first output \[N, 4\]"),
        (None, (8, 1), np.arange(8), FormatError, "numbers of the output's shape, or a metric of your own"),
    ],
)
def test_a_metric_that_does_not_fit_is_one_sentence(
    name: str | None, output: tuple[int, ...], y: Array | None, kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        choose(Data(X, y, metric=name), np.zeros(output), X)


def per_sample(outputs: Array, y: Array) -> Array:
    return np.asarray(np.abs(outputs[:, 0] - y) < 1)


def whole_set(outputs: Array, y: Array) -> float:
    return float((np.abs(outputs[:, 0] - y) < 1).mean())


def test_a_metric_of_ones_own_may_mark_samples_or_give_one_number() -> None:
    y = np.arange(30, dtype=np.float64)
    before, after = y[:, None] * np.ones(2), y[:, None] * np.ones(2) + (np.arange(30) % 5 == 0)[:, None] * 2
    found = [drop(metric(own, before, before, y), part(before, y), before, after) for own in (per_sample, whole_set)]
    assert [one.points for one in found] == pytest.approx([20, 20])
    assert found[0].hi > 20
    assert found[1].hi > 20


def test_a_metric_of_ones_own_where_less_is_better_drops_when_it_grows() -> None:
    def error(outputs: Array, y: Array) -> float:
        return float(np.abs(outputs - y).mean())

    error.higher_is_better = False  # type: ignore[attr-defined]
    error.bounded = False  # type: ignore[attr-defined]
    y = np.zeros((30, 1))
    judged = metric(error, y, y, y)
    assert judged.name == "error"
    assert judged.unit == "per cent"
    assert points(judged, part(y, y), y + 2, y + 3) == pytest.approx(50)


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        (lambda outputs, y: 1 / 0, "the metric <lambda> raised ZeroDivisionError"),
        (lambda outputs, y: [1, 2, 3], r"gave \[3\] numbers for 8 samples, expected one, or one for each"),
        (lambda outputs, y: 17.0, "gave 17 to 17, expected 0 to 1"),
        (lambda outputs, y: float("nan"), "gave nan to nan, expected 0 to 1"),
    ],
)
def test_a_metric_of_ones_own_that_fails_is_named(own: Callable[..., Any], sentence: str) -> None:
    with pytest.raises(FormatError, match=sentence):
        metric(own, X, X, np.zeros(8)).of(X, part(X, np.zeros(8)), X)


@given(st.integers(0, 20), st.booleans())
def test_no_grouping_narrows_the_interval_of_right_and_wrong(seed: int, clustered: bool) -> None:
    order = np.random.default_rng(seed)
    y = order.integers(0, 3, 120)
    before, after = one_hot(order.permutation(y), 3), one_hot(y, 3)
    groups = np.repeat(np.arange(12), 10) if clustered else order.permutation(np.repeat(np.arange(12), 10))
    plain = drop(metric("top1", before, X, y), part(y[:, None], y), before, after)
    grouped = drop(metric("top1", before, X, y), part(y[:, None], y, groups), before, after)
    assert grouped.points == pytest.approx(plain.points)
    assert grouped.lo <= plain.lo <= plain.hi <= grouped.hi


def test_changes_that_come_in_groups_widen_the_interval() -> None:
    y = np.zeros(1000, np.int64)
    groups = np.repeat(np.arange(20), 50)
    before, after = one_hot(y, 2), one_hot((groups < 2).astype(int), 2)
    plain = drop(metric("top1", before, X, y), part(y[:, None], y), before, after)
    grouped = drop(metric("top1", before, X, y), part(y[:, None], y, groups), before, after)
    assert plain.hi - plain.lo < 4
    assert grouped.hi - grouped.lo > 20


@pytest.mark.parametrize("name", METRICS)
def test_no_change_is_no_drop_and_with_few_samples_proves_nothing(name: str) -> None:
    order = np.random.default_rng(0)
    x = order.standard_normal((40, 3)).astype(np.float32)
    output = order.standard_normal((40, 3)).astype(np.float32)
    y = {"top1": np.arange(40) % 3, "macro_f1": np.arange(40) % 3, "roc_auc": np.arange(40) % 2}.get(name)
    found = drop(metric(name, output, x, y), part(x, y), output, output)
    assert found.points == pytest.approx(0)
    assert found.lo <= 0 <= found.hi
    if name in ("top1", "macro_f1", "roc_auc", "agreement"):
        assert found.hi > 1


def test_one_group_says_nothing() -> None:
    y = np.zeros(50, np.int64)
    right = one_hot(y, 2)
    found = drop(metric("top1", right, X, y), part(y[:, None], y, y), right, right)
    assert (found.points, found.lo, found.hi) == (0, -100, 100)


def test_a_drop_is_the_same_when_asked_again() -> None:
    order = np.random.default_rng(1)
    y, outputs = order.integers(0, 4, 200), order.standard_normal((2, 200, 4))
    judged = metric("macro_f1", outputs[0], X, y)
    first, again = (drop(judged, part(y[:, None], y), *outputs) for _ in range(2))
    assert first == again
    assert first.lo < first.points == points(judged, part(y[:, None], y), *outputs) < first.hi


def test_the_bootstrap_agrees_with_the_interval_of_paired_proportions() -> None:
    order = np.random.default_rng(2)
    before = (order.random(3000) < 0.9).astype(np.float64)
    after = np.where(order.random(3000) < 0.03, 1 - before, before)
    exact = paired_drop(before, after)
    again = resampled(Metric("top1", lambda *_: ()), (before,), (after,), None)
    assert again.lo == pytest.approx(exact.lo, abs=0.15)
    assert again.hi == pytest.approx(exact.hi, abs=0.15)


def test_a_relative_error_is_in_per_cent_and_positive_when_worse() -> None:
    order = np.random.default_rng(3)
    x = order.standard_normal((500, 4))
    before, after = (x + scale * order.standard_normal(x.shape) for scale in (0.1, 0.2))
    found = drop(metric("mse", before, x), part(x, None), before, after)
    assert found.points == pytest.approx(300, rel=0.1)
    assert found.lo < found.points < found.hi


def test_the_number_of_samples_for_a_proof_proves_it() -> None:
    before = np.ones(500)
    after = np.ones(500)
    after[:2] = 0
    found = paired_drop(before, after)
    assert verdict(found, 1.0) == "within_budget_unproven"
    need = samples_for_proof(found, 1.0)
    assert need is not None
    assert need > 500
    again = paired_drop(np.ones(need), np.repeat(after, need // 500 + 1)[:need])
    assert again.hi < 1.1
    assert samples_for_proof(Drop(1.2, 0.5, 2.0, 500), 1.0) is None
    assert samples_for_proof(Drop(0.2, -0.2, 0.6, 500), 1.0) == 125


def test_what_is_measured_without_labels_is_agreement_or_cosine() -> None:
    assert unlabelled(np.zeros((2, 5)), np.zeros((2, 3))).name == "agreement"
    assert unlabelled(np.zeros((2, 5)), np.zeros((2, 5))).name == "cosine"


def test_a_metric_that_may_be_slow_is_asked_less_often() -> None:
    calls = 0

    def slow(outputs: Array, y: Array) -> float:
        nonlocal calls
        calls += 1
        return float((outputs[:, 0] == y).mean())

    y = np.zeros(30)
    judged = metric(slow, X, X, y)
    drop(judged, part(y[:, None], y), y[:, None], y[:, None])
    assert BOOTSTRAP_SEED == 0
    assert calls < 2 * OWN_RESAMPLES + 20
