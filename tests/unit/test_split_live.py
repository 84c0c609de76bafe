"""The planner's part in measuring a live device: what it asks for, how long it waits, and what it makes of the figures."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloud.cli import splitting
from cloud.device_fake import made_up
from cloud.split.live import LiveDevice, doubt, measured_slowdown, with_figures
from cloud.split.profile import Costs
from cloud.split.segment import Pieces
from cloud.views import MeasureView
from skills.coding import Coding, Live
from skills.errors import DeadlineExceeded, FormatError, NotFound, Refused, SkerryError, Unreachable, UsageError
from skills.measurement import Figures, Work, read_work
from skills.split_plan import Millis, Segment
from skills.wire import to_plain

X, MIDDLE, Y = (Live(name, "FP32", (-1, 4)) for name in ("x", "middle", "y"))
CODINGS = ((Coding("native"),), (Coding("u8", scales=(1.0,), zeros=(0,)), Coding("u4", scales=(1.0,), zeros=(0,))))


@dataclasses.dataclass
class FakeDoor:
    """Answers `measuring` for `turns` questions and then with what `figures` makes of the work."""

    turns: int
    figures: Any = made_up
    errors: list[SkerryError | None] = dataclasses.field(default_factory=list)  # of the first questions, in their order
    lent: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def lend_object(self, sha256: str, data: bytes) -> None:
        self.lent[sha256] = data

    def measure(self, device: str, work: str) -> MeasureView:
        assert device == "cam-1"
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error
        self.turns -= 1
        if self.turns >= 0:
            return MeasureView("measuring", 0.0, None)
        return MeasureView("done", 1.0, to_plain(self.figures(work, read_work(self.lent[work]))))


def steps(seconds: float) -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += seconds


def measured(door: FakeDoor, folder: Path, told: list[str] | None = None, step_s: float = 30.0) -> Figures:
    import numpy as np

    for at in range(2):
        (folder / f"{at}.onnx").write_bytes(b"segment %d" % at)
    segments = tuple(
        Segment(f"{at}.onnx", "0" * 64, 9, (ins,), (outs,))
        for at, (ins, outs) in enumerate((("x", "middle"), ("middle", "y")))
    )
    pieces = Pieces(segments, None, ((X,), (MIDDLE,)), (Y,))
    samples = [{"x": np.full((1, 4), at, np.float32)} for at in range(20)]
    clock = steps(step_s)
    device = LiveDevice("cam-1", door, 512.0, lambda: next(clock), lambda seconds: None)
    return device.figures(
        folder, pieces, samples, CODINGS, 3, lambda stage, done, of: told.append(stage) if told is not None else None
    )


def test_it_sends_every_segment_and_eight_inputs_and_asks_until_the_figures_are_there(tmp_path: Path) -> None:
    door, told = FakeDoor(turns=2), list[str]()
    figures = measured(door, tmp_path, told)
    assert [row.p50 for row in figures.heads] == [0.0, 1.0, 2.0]
    assert [len(row) for row in figures.encode_ms] == [1, 2]
    work = read_work(door.lent[figures.work])
    assert [part.path for part in work.parts] == ["0.onnx", "1.onnx", "samples.npz"]
    assert set(door.lent) == work.objects | {figures.work}
    assert told == ["sending to cam-1"] * 4 + ["cam-1 is measuring"] * 2 + ["cam-1 is done"]


def test_a_device_that_is_never_done_is_waited_for_half_an_hour(tmp_path: Path) -> None:
    door = FakeDoor(turns=10_000)
    with pytest.raises(DeadlineExceeded, match="cam-1 had not measured the model after 30 minutes"):
        measured(door, tmp_path)
    assert 10_000 - door.turns < 61


@pytest.mark.parametrize("error", [Unreachable("cam-1 is not connected"), DeadlineExceeded("cam-1 did not answer")])
def test_questions_that_nobody_answered_are_asked_again_for_a_minute_since_the_last_answer(
    error: SkerryError, tmp_path: Path
) -> None:
    told = list[str]()
    figures = measured(FakeDoor(1, errors=[error, error, None, error, error]), tmp_path, told, step_s=15.0)
    assert len(figures.heads) == 3
    assert told.count("cam-1 does not answer, asking again") == 4
    door = FakeDoor(0, errors=[error] * 100)
    with pytest.raises(type(error), match=str(error)):
        measured(door, tmp_path, step_s=15.0)
    assert 100 - len(door.errors) == 3  # at 15 s of each question and 15 s of each look at the clock


def test_a_device_that_refuses_is_not_asked_again(tmp_path: Path) -> None:
    door = FakeDoor(0, errors=[Refused("cam-1 has no room"), None])
    with pytest.raises(Refused, match="no room"):
        measured(door, tmp_path)
    assert door.errors == [None]


def test_figures_of_another_work_or_of_other_counts_are_refused(tmp_path: Path) -> None:
    def other(sha256: str, work: Work) -> Figures:
        return dataclasses.replace(made_up(sha256, work), work="0" * 64)

    def fewer(sha256: str, work: Work) -> Figures:
        return dataclasses.replace(made_up(sha256, work), encode_ms=((0.5,),))

    for figures in (other, fewer):
        with pytest.raises(FormatError, match="measured something else|other counts"):
            measured(FakeDoor(0, figures), tmp_path)


def test_the_devices_times_take_the_place_of_this_machines_and_nothing_else_does(tmp_path: Path) -> None:
    figures = measured(FakeDoor(0), tmp_path)
    here, tail = Millis(0.1, 0.2), Millis(0.5, 0.6)
    costs, codings = with_figures({after: Costs(here, tail) for after in range(3)}, CODINGS, figures)
    assert [costs[after].device.p50 for after in range(3)] == [0.0, 1.0, 2.0]
    assert {cost.tail for cost in costs.values()} == {tail}
    assert [dataclasses.replace(coding, encode_ms=0.0) for row in codings for coding in row] == [
        coding for row in CODINGS for coding in row
    ]
    assert {coding.encode_ms for row in codings for coding in row} == {0.5}
    assert measured_slowdown(costs, figures) == 4.0
    assert doubt({"name": "cam-1", "busy": 0.1}) == ""
    assert doubt({"name": "cam-1", "busy": 0.4}) == (
        "cam-1 was busy: other work had its processor for 40% of the measured time"
    )


class FakeClient:
    """A controller that knows one device."""

    def __init__(self, *, online: bool = True, runtimes: tuple[str, ...] = ("onnxruntime",)) -> None:
        self.online, self.capabilities = online, {"runtimes": dict.fromkeys(runtimes, "1"), "ram_mb": 256}

    def device(self, name: str) -> Any:
        if name != "cam-1":
            raise NotFound(f"there is no device {name}")
        return self


def test_a_device_that_cannot_measure_now_is_told_before_anything_is_cut() -> None:
    def live(name: str = "cam-1", slowdown: float | None = None, **facts: Any) -> LiveDevice:
        return splitting.live_device(name, slowdown, lambda: FakeClient(**facts))  # type: ignore[arg-type,return-value]

    assert live().memory_mb == 256.0
    with pytest.raises(
        NotFound, match="no device profile 'cam-9' .* and no enrolled device either: there is no device"
    ):
        live("cam-9")
    with pytest.raises(UsageError, match="leave --device-slowdown away"):
        live(slowdown=3.0)
    with pytest.raises(Unreachable, match="cam-1 is not connected, so it cannot measure"):
        live(online=False)
    with pytest.raises(Refused, match="cam-1 cannot measure a model: it offers litert, not onnxruntime"):
        live(runtimes=("litert",))
