"""The best so far: what the hidden folder and the progress line have while a run goes on."""

import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import folder, ladder
from compress.judge import Emitted, rank
from compress.pipeline import State
from compress.work import Work

BUDGET = 1.0
NOTHING: Any = None
ORIGINAL: Any = types.SimpleNamespace(size=1000)
FOUND = st.tuples(st.integers(1, 9), st.floats(-5, 40), st.booleans())


def emitted(size: int, lost: float) -> Emitted:
    return Emitted("one", State(None), bytes(size), NOTHING, None, lost)


def begun(out: Path, *, resume: bool = False) -> Work:
    work = Work(out, 0.0, 100.0, lambda *_: None)
    work.open("this", resume=resume)
    return work


def lies_there(out: Path) -> int:
    return len((folder.best_folder(out) / "model.tflite").read_bytes())


@settings(deadline=None)
@given(st.lists(FOUND, min_size=1, max_size=8))
def test_the_best_is_the_smallest_within_the_budget_or_else_the_one_that_lost_least(
    rows: list[tuple[int, float, bool]],
) -> None:
    best = min(rows, key=lambda row: rank(emitted(*row[:2]), BUDGET, trained=row[2]))
    within = [size for size, lost, trained in rows if lost / (ladder.HOPEFUL if trained else 1.0) <= BUDGET]
    if within:
        assert best[0] == min(within)
    else:
        assert best[1] / (ladder.HOPEFUL if best[2] else 1.0) == min(
            lost / (ladder.HOPEFUL if trained else 1.0) for _, lost, trained in rows
        )


@pytest.mark.parametrize(("lost", "within"), [(ladder.HOPEFUL * BUDGET, True), (ladder.HOPEFUL * BUDGET + 0.1, False)])
def test_what_was_trained_may_seem_to_lose_four_budgets_on_select_and_is_within(lost: float, *, within: bool) -> None:
    rows = [rank(emitted(5, lost), BUDGET, trained=trained) for trained in (True, False)]
    assert [not over for over, _ in rows] == [within, False]


def test_the_folder_and_the_line_change_only_for_a_better_candidate(tmp_path: Path) -> None:
    out, seen = tmp_path / "out", list[tuple[int, str]]()
    work = begun(out)
    for size, lost, trained in (
        (9, 2.0, False),
        (5, 3.0, False),
        (8, 0.5, False),
        (7, 0.9, False),
        (2, 5.0, True),
        (6, 3.4, True),
    ):
        work.found(emitted(size, lost), ORIGINAL, BUDGET, trained=trained)
        seen.append((lies_there(out), work.best.split()[0]))
    assert [size for size, _ in seen] == [9, 9, 8, 7, 7, 6]
    assert [line for _, line in seen] == [f"{1000 / size:.1f}x" for size, _ in seen]
    assert (folder.best_folder(out) / "best.txt").read_text() == work.best == "166.7x smaller, +3.40 points on select"
    assert len(work.trail) == 6, "what was found is told in full"


def test_the_best_of_an_interrupted_run_is_the_one_to_beat(tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun(out).found(emitted(5, 0.5), ORIGINAL, BUDGET)
    later = begun(out, resume=True)
    assert later.best.startswith("200.0x smaller")
    later.found(emitted(6, 0.0), ORIGINAL, BUDGET)
    assert lies_there(out) == 5
    later.found(emitted(4, 0.0), ORIGINAL, BUDGET)
    assert lies_there(out) == 4
