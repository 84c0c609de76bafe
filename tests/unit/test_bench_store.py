"""What the split bench keeps: only what the same code measured, and it says since when it is there."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def store() -> Any:
    path = Path(__file__).parents[2] / "bench" / "split" / "store.py"
    spec = importlib.util.spec_from_file_location("bench_split_store", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_a_cell_is_measured_once_and_anew_when_the_code_or_what_it_is_made_from_has_changed(
    store: Any, tmp_path: Path
) -> None:
    told: list[str] = []

    def value(code: str, link: str) -> int:
        kept = store.Store(tmp_path, told.append, {"code": code})
        return int(kept.get("cell", {"link": link}, lambda: len(told)))

    assert [value("a", "fast"), value("a", "fast"), value("b", "fast"), value("b", "slow"), value("a", "fast")] == [
        1, 1, 2, 3, 1,
    ]  # fmt: skip


def test_what_was_there_already_is_told_with_its_day(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    cells = ("one", "two"), ("one", "two", "three"), ("one", "three", "four", "four")
    for day, names in zip(("2026-11-19", "2026-11-20", "2026-11-21"), cells, strict=True):
        monkeypatch.setattr(store.time, "strftime", lambda _, day=day: day)
        kept = store.Store(tmp_path, lambda _: None, {"code": "a"})
        for name in names:
            kept.get(name, {}, lambda: 0)
        told.append(kept.kept())
    assert told == [
        "", "2 of 3 cells kept from 2026-11-19", "2 of 3 cells kept from 2026-11-19 to 2026-11-20",
    ]  # fmt: skip


def test_the_digest_changes_with_any_python_file_but_those_left_out(store: Any, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/one.py").write_text("1")
    (tmp_path / "table.py").write_text("1")
    first = store.digest([tmp_path], ["table.py"])
    (tmp_path / "table.py").write_text("2")
    (tmp_path / "notes.txt").write_text("2")
    assert store.digest([tmp_path], ["table.py"]) == first
    (tmp_path / "deep/one.py").write_text("2")
    assert store.digest([tmp_path], ["table.py"]) != first
    (tmp_path / "deep/one.py").rename(tmp_path / "deep/two.py")
    second = store.digest([tmp_path], ["table.py"])
    (tmp_path / "deep/two.py").rename(tmp_path / "two.py")
    assert store.digest([tmp_path], ["table.py"]) != second
