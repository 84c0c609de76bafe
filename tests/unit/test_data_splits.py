import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.data import Data, Splits, load
from compress.meeting import few_classes
from compress.splits import MAX_CALIBRATE, MAX_SELECT, split
from skills.errors import FormatError


@given(st.integers(20, 400), st.integers(0, 5))
def test_calibrate_select_and_report_never_share_a_sample(count: int, seed: int) -> None:
    x = np.arange(count, dtype=np.float32)[:, None]
    parts = split(Data(x, np.zeros(count, np.int64)), seed)
    rows = [set(part.x[:, 0]) for part in (parts.calibrate, parts.select, parts.report)]
    assert [len(part) for part in rows] == [count // 5, count // 5, count - 2 * (count // 5)]
    assert not rows[0] & rows[1]
    assert not rows[1] & rows[2]
    assert not rows[0] & rows[2]
    assert parts.train is None


@given(st.integers(20, 20_000), st.integers(0, 3))
def test_with_training_data_everything_else_is_reported_on(count: int, seed: int) -> None:
    x, train = np.zeros((7, 1), np.float32), np.arange(count, dtype=np.float32)[:, None]
    parts = split(Data(x, None, train, None), seed)
    assert len(parts.report) == 7
    assert parts.train is not None
    of_train = (parts.calibrate, parts.select, parts.train)
    assert {part.source for part in of_train} == {"x_train"}
    rows = np.concatenate([part.rows for part in of_train])
    assert sorted(rows) == list(range(count))
    assert 0 < len(parts.calibrate) <= MAX_CALIBRATE
    assert 0 < len(parts.select) <= MAX_SELECT
    assert len(parts.train) > 0


@given(st.lists(st.integers(1, 300), min_size=20, max_size=60), st.booleans(), st.integers(0, 3))
def test_no_part_shares_a_group_with_another(sizes: list[int], training: bool, seed: int) -> None:
    groups = np.random.default_rng(seed).permutation(np.repeat([f"person {at}" for at in range(len(sizes))], sizes))
    x = np.zeros((len(groups), 1), np.float32)
    data = Data(x, None, x, None, None, groups) if training else Data(x, groups=groups)
    parts = split(data, seed).parts()
    assert all(len(part) for part in parts.values())
    dealt = [group for part in parts.values() if part.groups is not None for group in set(part.groups)]
    assert len(dealt) == len(set(dealt))
    assert all(part.groups is None or (part.groups == groups[part.rows]).all() for part in parts.values())


def test_a_group_over_the_limit_is_left_out_in_part_and_given_to_no_other_part() -> None:
    groups = np.repeat([0, 1, 2], 3000)
    parts = split(Data(np.zeros((9000, 1), np.float32), groups=groups), 0)
    assert [len(part) for part in parts.parts().values()] == [MAX_CALIBRATE, MAX_SELECT, 3000]


def test_the_same_seed_gives_the_same_split() -> None:
    x = np.arange(100, dtype=np.float32)[:, None]
    assert split(Data(x), 3).hashes() == split(Data(x), 3).hashes()
    assert split(Data(x), 3).hashes()["report"] != split(Data(x), 4).hashes()["report"]


def test_a_split_is_hashed_by_its_source_and_its_rows() -> None:
    parts = split(Data(np.zeros((40, 1), np.float32)), 0)
    rows = b"".join(int(row).to_bytes(8, "little") for row in parts.select.rows)
    assert parts.hashes()["select"] == hashlib.sha256(b"x\0" + rows).hexdigest()
    assert set(parts.hashes()) == {"calibrate", "select", "report"}


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(FormatError, match="x has 19 samples, expected at least 20"):
        split(Data(np.zeros((19, 1), np.float32)), 0)


def test_too_few_groups_are_refused() -> None:
    x = np.zeros((40, 1), np.float32)
    with pytest.raises(FormatError, match="x_train has 2 groups, expected at least 3"):
        split(Data(x, None, x, None, None, np.repeat([0, 1], 20)), 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"groups": np.zeros(9, int)}, r"groups has shape \(9,\) and dtype int64, expected 40 whole numbers or texts"),
        ({"groups": np.zeros(40)}, r"groups has shape \(40,\) and dtype float64, expected 40 whole numbers or texts"),
        ({"groups_train": np.zeros(40, int)}, "has groups_train without x_train"),
        ({"group": np.zeros(40, int)}, "has the array group, did you mean groups?"),
        ({"y": np.full((40, 2), np.nan)}, "40 of 40 samples in y hold NaN"),
        ({"y": np.array(["cat"] * 40)}, r"y has shape \(40,\) and dtype <U3, expected 40 rows of numbers"),
        ({"y": [[1], [1, 2]]}, "holds rows of different sizes"),
    ],
)
def test_arrays_that_do_not_belong_together_are_one_sentence(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(FormatError, match=sentence):
        load({"x": np.zeros((40, 1), np.float32), **change})


def test_a_group_in_training_and_in_the_report_is_refused() -> None:
    x, groups = np.zeros((4, 1), np.float32), np.array(["anna", "anna", "ben", "cem"])
    with pytest.raises(FormatError, match=r"1 groups are in both groups and groups_train \(cem\)"):
        load({"x": x, "groups": groups, "x_train": x, "groups_train": np.array(["cem", "dora", "eve", "eve"])})


def sorted_by_class(train: np.ndarray, report: np.ndarray) -> Splits:
    """Return the parts of a file whose rows lie class after class and of which these labels are x_train and x."""
    return split(Data(report[:, None] * np.float32(1), report, train[:, None] * np.float32(1), train), 0)


@pytest.mark.parametrize(("trained", "said"), [(4, True), (5, False), (10, False)])
def test_a_select_part_with_fewer_than_half_of_the_classes_is_said_with_what_to_do(trained: int, said: bool) -> None:
    splits = sorted_by_class(np.repeat(np.arange(trained), 50), np.repeat(np.arange(10), 10))
    found = few_classes("top1", splits)
    assert bool(found) is said
    if said:
        assert "holds 4 of the 10 classes" in found[0]
        assert "shuffle the file before x_train is cut out of it, or give an x_train of all classes" in found[0]


def test_classes_are_counted_only_where_there_are_some() -> None:
    splits = sorted_by_class(np.repeat(np.arange(4), 50), np.repeat(np.arange(10), 10))
    assert few_classes("mse", splits) == ()
    assert few_classes("top1", split(Data(np.zeros((40, 1), np.float32)), 0)) == ()


def test_of_few_samples_with_many_classes_more_are_asked_for() -> None:
    labels = np.arange(100) // 2
    (said,) = few_classes("top1", split(Data(labels[:, None] * np.float32(1), labels), 0))
    assert "give more samples of each class" in said
