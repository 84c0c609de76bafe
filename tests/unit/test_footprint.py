"""What a process takes of memory."""

from pathlib import Path

import pytest

from skills import footprint


def test_what_is_taken_in_one_step_is_counted_from_there_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    monkeypatch.setattr(footprint, "STATUS", status)

    def holding(kb: int) -> object:
        return status.write_text(f"VmPeak:\t99999 kB\nVmHWM:\t{kb} kB\n")

    holding(10_000)
    assert footprint.grown_mb(lambda kb=kb: holding(kb) for kb in (10_000, 11_024, 12_560)) == (0.0, 1.0, 2.5)  # type: ignore[misc]


def test_a_system_that_does_not_tell_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "STATUS", tmp_path / "status")
    (tmp_path / "status").write_text("Name:\tpython\nVmHWMark:\t1 kB\n")
    with pytest.raises(OSError, match="does not tell"):
        footprint.own_kb("VmHWM")
    (tmp_path / "status").write_text("VmHWM:\t  2048 kB\n")
    assert footprint.own_kb("VmHWM") == 2048
