"""What each width of a layer is taken to harm, where calibration data show it and where noise hides it."""

import pytest

from compress.passes.bits import harms, supposed

OWN = {4.0: 1.0, 3.0: 4.0, 2.0: 16.0, 1.6: 32.0}


@pytest.mark.parametrize(
    ("measured", "asked", "unit"),
    [({3.0: 0.4}, [3.0], 0.1), ({3.0: -0.1, 1.6: 0.8}, [3.0, 1.6], 0.025), ({3.0: 0.0, 1.6: 3.2}, [3.0, 1.6], 0.1)],
)
def test_harm_follows_the_layers_own_error_from_the_first_width_that_shows_any(
    measured: dict[float, float], asked: list[float], unit: float
) -> None:
    seen = list[float]()

    def look(bits: float) -> float:
        seen.append(bits)
        return measured[bits]

    assert harms(OWN, (3.0, 1.6), look) == pytest.approx({bits: unit * spoilt for bits, spoilt in OWN.items()})
    assert seen == asked


def test_a_layer_whose_harm_is_lost_in_noise_is_taken_for_the_least_harmful_not_for_harmless() -> None:
    assert harms(OWN, (3.0, 1.6), lambda _bits: -0.01) is None
    others = [{4.0: 0.1, 1.6: 0.4}, {4.0: 0.0, 1.6: 0.0}, {4.0: 0.5, 1.6: 6.4}]
    assert supposed(OWN, others) == pytest.approx({4.0: 0.4 / 32, 3.0: 0.05, 2.0: 0.2, 1.6: 0.4})
    assert set(supposed(OWN, []).values()) == {0.0}


def test_a_layer_that_every_width_stores_exactly_is_harmless() -> None:
    assert harms(dict.fromkeys(OWN, 0.0), (3.0, 1.6), lambda _bits: 0.01) == dict.fromkeys(OWN, 0.0)
