"""Numbers as people read them."""

import pytest

from skills.units import readable_ms


@pytest.mark.parametrize(
    ("ms", "said"), [(0.0, "0 ms"), (0.4953, "0.5 ms"), (6.24, "6.2 ms"), (9.96, "10 ms"), (63.4, "63 ms")]
)
def test_a_time_below_ten_milliseconds_keeps_two_digits(ms: float, said: str) -> None:
    assert readable_ms(ms) == said
