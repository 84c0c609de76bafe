import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.data import Data
from compress.splits import split


@given(st.integers(20, 400), st.integers(0, 5))
def test_calibrate_select_and_report_never_share_a_sample(count: int, seed: int) -> None:
    x = np.arange(count, dtype=np.float32)[:, None]
    parts = split(Data(x, np.zeros(count, np.int64)), seed)
    rows = [set(part.x[:, 0]) for part in (parts.calibrate, parts.select, parts.report)]
    assert all(rows)
    assert not rows[0] & rows[1]
    assert not rows[1] & rows[2]
    assert not rows[0] & rows[2]


@given(st.integers(20, 3000), st.integers(0, 3))
def test_with_training_data_everything_else_is_reported_on(count: int, seed: int) -> None:
    x, train = np.zeros((7, 1), np.float32), np.arange(count, dtype=np.float32)[:, None]
    parts = split(Data(x, None, train, None), seed)
    assert len(parts.report) == 7
    assert parts.calibrate.source == parts.select.source == "x_train"
    assert not set(parts.calibrate.rows) & set(parts.select.rows)


def test_the_same_seed_gives_the_same_split() -> None:
    x = np.arange(100, dtype=np.float32)[:, None]
    assert (split(Data(x), 3).report.rows == split(Data(x), 3).report.rows).all()
    assert (split(Data(x), 3).report.rows != split(Data(x), 4).report.rows).any()


def test_too_few_samples_are_refused() -> None:
    from skills.errors import FormatError

    with pytest.raises(FormatError, match="x has 19 samples, expected at least 20"):
        split(Data(np.zeros((19, 1), np.float32)), 0)
