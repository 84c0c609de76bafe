"""The front of sizes and harms: right where everything can be tried, and never out of order."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.knapsack import Option, front

LAYERS = st.lists(
    st.lists(st.builds(Option, st.integers(0, 50), st.floats(0, 10)), min_size=1, max_size=4), min_size=1, max_size=5
)


@given(LAYERS, st.floats(0, 50))
def test_the_front_holds_the_smallest_choice_for_every_harm(layers: list[list[Option]], most: float) -> None:
    every = [(sum(o.size for o in picks), sum(o.harm for o in picks)) for picks in itertools.product(*layers)]
    most = max(most, min(harm for _, harm in every))
    right = min(size for size, harm in every if harm <= most + 1e-9)
    found = [choice.size for choice in front(layers) if choice.harm <= most + 1e-9]
    assert min(found) == right


@given(LAYERS, st.integers(1, 20))
def test_along_the_front_less_size_costs_more_harm(layers: list[list[Option]], steps: int) -> None:
    choices = front(layers, steps)
    for before, after in itertools.pairwise(choices):
        assert after.size < before.size
        assert after.harm > before.harm
    for choice in choices:
        picked = [options[pick] for options, pick in zip(layers, choice.picks, strict=True)]
        assert choice.size == sum(o.size for o in picked)
        assert choice.harm == pytest.approx(sum(o.harm for o in picked))


@given(LAYERS, st.integers(1, 20))
def test_the_least_harmful_choice_is_on_the_front(layers: list[list[Option]], steps: int) -> None:
    assert front(layers, steps)[0].harm == pytest.approx(sum(min(o.harm for o in options) for options in layers))
