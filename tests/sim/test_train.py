"""The student: the float function before training, its codes and scales after, the same weights for the same seed."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from compress import graph, train
from compress.graph import with_biases
from compress.learn import heavy
from compress.measure import answers
from compress.passes.canonicalise import canonicalise
from compress.student import Student, _Round, spreads
from compress.train import Checkpoint, Settings, Trained, fit, rate
from compress.views import Views
from compress.weights import limits
from skills import ort

Build = Callable[[str], Any]
SHORT = Settings(12, batch=32, threads=1)


class Lesson:
    """A small net, its training inputs and itself as the teacher."""

    def __init__(self, net: Any) -> None:
        self.model = with_biases(canonicalise(net.model))
        self.x, self.y = net.x[:256], net.y[:256]
        self.session = ort.session(self.model.SerializeToString())
        self.views = Views(self.x, self.session, 2, 0, lambda _key, make: make())

    def student(self, bits: float | None = None) -> Student:
        rounded = [dataclasses.replace(layer, bits=bits) for layer in heavy(self.model)] if bits is not None else []
        return Student(self.model, rounded, spreads(self.model, self.x))

    def trained(self, settings: Settings = SHORT, bits: float | None = None, **more: Any) -> Trained:
        return fit(self.student(bits), self.views, self.y, settings, **more)


def weights(trained: Trained) -> dict[str, bytes]:
    found = {name: value.tobytes() for name, value in graph.arrays(trained.model).items()}
    for node, codes in trained.codes.items():
        found |= {f"{node} values": codes.values.tobytes(), f"{node} scales": codes.scales.tobytes()}
    return found


def closeness(one: Any, other: Any) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.mark.parametrize("kind", ["plain", "residual", "depthwise", "transposed", "conv1d", "squeeze"])
def test_an_untrained_student_computes_the_float_function(kind: str, small_net: Build) -> None:
    lesson = Lesson(small_net(kind))
    student = lesson.student()
    assert student.norms
    student.modules().eval()
    with torch.no_grad():
        got = student.twin(torch.from_numpy(lesson.x)).numpy()
    assert closeness(got, answers(lesson.session, lesson.x)) < 1e-3


@pytest.mark.parametrize("kind", ["plain", "residual", "depthwise", "transposed", "conv1d"])
def test_the_folded_graph_computes_what_the_trained_student_does(kind: str, small_net: Build) -> None:
    lesson = Lesson(small_net(kind))
    student = lesson.student()
    trained = fit(student, lesson.views, lesson.y, SHORT)
    with torch.no_grad():
        got = student.twin(torch.from_numpy(lesson.x)).numpy()
    folded = answers(ort.session(trained.model.SerializeToString()), lesson.x)
    assert closeness(folded, got) < 1e-4
    assert closeness(folded, answers(lesson.session, lesson.x)) > 1e-3  # it did learn something


@pytest.mark.parametrize("kind", ["plain", "transposed", "conv1d"])
@pytest.mark.parametrize("bits", [4, 2])
def test_codes_times_scales_are_the_weights_that_the_student_was_trained_with(
    kind: str, bits: float, small_net: Build
) -> None:
    lesson = Lesson(small_net(kind))
    student = lesson.student(bits)
    trained = fit(student, lesson.views, lesson.y, SHORT)
    with torch.no_grad():
        got = student.twin(torch.from_numpy(lesson.x)).numpy()
    values = graph.arrays(trained.model)
    for layer in heavy(lesson.model):
        assert (values[layer.weight] == trained.codes[layer.node].restore()).all()
    restored = answers(ort.session(trained.model.SerializeToString()), lesson.x)
    assert closeness(restored, got) < 5e-3  # scales are stored in 16 bits
    low, high = limits(bits)
    for codes in trained.codes.values():
        assert codes.bits == bits
        assert low <= codes.values.min() <= codes.values.max() <= high
        assert (codes.scales > 0).all()


def test_the_gradient_of_rounding_reaches_weights_inside_and_scales_everywhere() -> None:
    weight = torch.tensor([[-9.0, -0.4, 0.3, 0.7, 9.0]], requires_grad=True)
    scale = torch.tensor([[0.5]], requires_grad=True)
    rounded = _Round.apply(weight, scale, -4, 3)
    assert rounded.detach().tolist() == [[-2.0, -0.5, 0.5, 0.5, 1.5]]
    rounded.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[0, 1, 1, 1, 0]]
    errors = [-4, -1 - -0.8, 1 - 0.6, 1 - 1.4, 3]
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(sum(errors) / math.sqrt(5 * 3), rel=1e-5)


def test_the_same_seed_gives_the_same_weights_and_another_one_others(small_net: Build) -> None:
    lesson = Lesson(small_net("plain"))
    assert weights(lesson.trained(bits=3)) == weights(lesson.trained(bits=3))
    other = Settings(12, batch=32, threads=1, seed=1)
    assert weights(lesson.trained(bits=3)) != weights(lesson.trained(other, bits=3))


def test_a_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(
    small_net: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "KEPT_EVERY_S", -1.0)
    lesson = Lesson(small_net("residual"))
    saved: list[bytes] = []
    whole = lesson.trained(bits=3, checkpoint=Checkpoint(lambda: None, saved.append))
    assert len(saved) == SHORT.steps
    for state in (saved[4], saved[-1]):
        made: list[float] = []
        resumed = lesson.trained(
            bits=3, checkpoint=Checkpoint(lambda state=state: state, saved.append), say=made.append
        )
        assert len(made) < SHORT.steps
        assert weights(resumed) == weights(whole)


def test_training_ends_when_its_time_is_up_and_can_be_done_again_without_a_clock(small_net: Build) -> None:
    lesson = Lesson(small_net("plain"))
    left = iter([3.0, 2.0, 1.0, 0.0])
    ended = lesson.trained(left=lambda: next(left))
    assert ended.steps == 3
    again = lesson.trained(Settings(12, batch=32, threads=1, stop=3))
    assert again.steps == 3
    assert weights(again) == weights(ended)


@pytest.mark.parametrize(
    ("card", "native", "said"),
    [("", False, "cpu, float32"), ("", True, "cpu, bfloat16"), ("NVIDIA H200", False, "cuda (NVIDIA H200), bfloat16")],
)
def test_what_training_computes_on_is_told_with_its_numbers(
    card: str, native: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(card))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: card)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert train.training_machine() == said


def test_the_rate_rises_first_and_then_falls_to_nothing() -> None:
    rates = [rate(step, 200) for step in range(200)]
    top = rates.index(max(rates))
    assert 0 < top < 60
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 0.01
