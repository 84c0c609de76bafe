"""Durable files."""

import errno
import os
import tracemalloc
from pathlib import Path

import pytest

from skills import files
from skills.errors import NotFound, StorageError


@pytest.mark.parametrize("call", ["open", "fdopen", "fsync", "replace"])
def test_a_full_disk_at_any_step_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call) -> None:
    path = tmp_path / "state"
    files.write_atomic(path, b"old")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(StorageError, match="no space left to write"):
            files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir() if p.name != "home"] == ["state"]


def test_a_missing_file_is_named_by_what_it_is(tmp_path) -> None:
    with pytest.raises(NotFound, match="the key .*nothing does not exist"):
        files.read_bytes(tmp_path / "nothing", "the key", 10)


def test_a_file_over_its_limit_is_not_read_whole(tmp_path) -> None:
    (tmp_path / "large").write_bytes(bytes(11))
    with pytest.raises(StorageError, match="limit of 10"):
        files.read_bytes(tmp_path / "large", "the file", 10)


def test_a_small_file_takes_no_memory_for_what_may_be_read_at_most(tmp_path) -> None:
    (tmp_path / "small").write_bytes(b"abc")
    tracemalloc.start()
    try:
        assert files.read_bytes(tmp_path / "small", "the file", 1 << 28) == b"abc"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_file_whose_size_is_not_told_is_read_up_to_its_limit() -> None:
    whole = Path("/proc/self/limits").read_bytes()
    assert files.read_bytes(Path("/proc/self/limits"), "the file", len(whole)) == whole
    with pytest.raises(StorageError, match="limit of"):
        files.read_bytes(Path("/proc/self/limits"), "the file", len(whole) - 1)


def test_directories_follow_xdg_and_ignore_relative_values(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert files.xdg_data("agent") == tmp_path / "skerry" / "agent"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert files.xdg_data().parts[-3:] == (".local", "share", "skerry")
