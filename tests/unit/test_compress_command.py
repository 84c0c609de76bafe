"""`skerry compress` before and after the work: how its time is read, what it passes on, what an interrupt says."""

import inspect
import signal
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.models import OptionInfo

import compress
from cloud.cli import STOPPED_BY_SIGNAL, run, workshop
from skills.errors import UsageError
from skills.units import duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("2h", 7200), ("1h0m5s", 3605), (" 5m ", 300)]
)
def test_a_time_budget_is_read_in_hours_minutes_and_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "1.5h", "30m1h", "-5m", "0s", "half an hour", "1h 30m", "٣m"])
def test_any_other_text_is_one_sentence_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no time, expected .* like 90s, 30m or 1h30m$"):
        parse_duration(text)


def test_the_help_states_the_time_budget_that_counts() -> None:
    (option,) = [item for item in get_args(inspect.signature(workshop.compress).parameters["time_budget"].annotation)
                 if isinstance(item, OptionInfo)]  # fmt: skip
    assert parse_duration(str(option.show_default)) == compress.TIME_BUDGET_S


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59))
def test_a_time_is_the_sum_of_its_parts(hours: int, minutes: int, seconds: int) -> None:
    if hours + minutes + seconds:
        assert parse_duration(f"{hours}h{minutes}m{seconds}s") == 3600 * hours + 60 * minutes + seconds


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (45.4, "45 s"), (120, "2 min"), (3570, "1 h"), (5400, "1 h 30 min"), (7200, "2 h")],
)
def test_times_read_well(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def call(monkeypatch: pytest.MonkeyPatch, does: Any, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run the command with `does` in place of the work; return the exit code and what it was called with."""
    seen: dict[str, Any] = {}

    def instead(model: object, data: object, out: Path, *_: object, **named: object) -> object:
        seen.update(named, model=model, data=data, out=out)
        return does()

    monkeypatch.setattr(compress, "compress", instead)
    return run(["compress", *arguments]), seen


def press() -> None:
    raise KeyboardInterrupt


def test_what_was_asked_for_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, seen = call(
        monkeypatch, press, "m.onnx", "--data", "d.npz", "-o", str(tmp_path / "o"), "--time-budget", "1h30m",
        "--teacher", "big.onnx", "--recipe", "r.yaml", "--resume", "--metric", "mse",
    )  # fmt: skip
    assert seen == {
        "model": "m.onnx", "data": "d.npz", "out": tmp_path / "o", "time_budget": 5400.0, "teacher": "big.onnx",
        "recipe": Path("r.yaml"), "resume": True, "metric": "mse",
    }  # fmt: skip


def test_without_data_it_says_that_only_weights_are_compressed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, seen = call(monkeypatch, press, "m.onnx", "-o", str(tmp_path / "o"))
    assert seen["data"] is None
    assert "only the weights are compressed" in capsys.readouterr().err


def test_a_wrong_time_budget_ends_with_2_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, seen = call(monkeypatch, press, "m.onnx", "-o", str(tmp_path / "o"), "--time-budget", "30")
    assert (code, seen) == (UsageError.exit_code, {})
    assert "'30' is no time" in capsys.readouterr().err


def test_an_interrupt_ends_with_130_and_says_what_is_on_disk_and_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    assert call(monkeypatch, press, "m.onnx", "--data", "d.npz", "-o", str(out))[0] == 130
    assert capsys.readouterr().err.strip() == "skerry: interrupted; nothing is left half-written"
    (tmp_path / ".small.work").mkdir()
    assert call(monkeypatch, press, "m.onnx", "--data", "d.npz", "-o", str(out))[0] == 130
    assert f"{out} is as it was; the same command with --resume goes on" in capsys.readouterr().err
    (tmp_path / ".small.work" / "best").mkdir()
    assert workshop.interrupted(out).startswith(
        f"interrupted; the best model so far is in {tmp_path}/.small.work/best;"
    )


def test_sigterm_says_the_same_and_ends_with_its_own_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    (tmp_path / ".small.work").mkdir()

    def stop() -> None:
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, stop, "m.onnx", "--data", "d.npz", "-o", str(out))
    assert ended.value.code == STOPPED_BY_SIGNAL
    assert capsys.readouterr().err.strip() == f"skerry: {workshop.interrupted(out)}"


@pytest.mark.parametrize("kept", [True, False])
def test_resume_without_anything_to_resume_says_so(
    kept: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kept:
        (tmp_path / ".small.work").mkdir()
    call(monkeypatch, press, "m.onnx", "--data", "d.npz", "-o", str(tmp_path / "small"), "--resume")
    said = f"nothing to resume in {tmp_path / 'small'}: starting anew"
    assert (said in " ".join(capsys.readouterr().err.split("\n"))) is not kept
