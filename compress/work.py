"""Where a run stands: its time, its progress bar, what it keeps beside OUT, and the best so far."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from compress import Progress, folder, kept
from compress.judge import Emitted, Original, rank
from compress.pipeline import State
from compress.report import Moment
from skills.profile import Profile

ENDING_S = 15.0  # kept at least for the last measurements
NOTED_EVERY_S = 10.0  # how often the time spent is written down, for a run that is resumed
TRAINED_UP_TO = 0.9  # of the progress bar


def ending(candidates: int, inputs: int, seconds_an_input: float) -> float:
    """Return the seconds that are kept for letting each candidate answer the report part, and for timing. Pure."""
    return max(ENDING_S, candidates * inputs * seconds_an_input)


class Work:
    """One run, from the second that it `began`."""

    def __init__(self, out: Path, began: float, budget: float, progress: Progress) -> None:
        self.out, self.began, self.budget, self.progress = out, began, budget, progress
        self.cache: folder.Cache | None = None
        self.about = ""
        self.noted = began
        self.calibrated = 1.0
        self.ending = ENDING_S
        self.trail: list[Moment] = []
        self.left_out: list[str] = []
        # Notes of the passes before `place`: they hold for what is trained too, later ones are of another network.
        self.before_placing: tuple[str, ...] = ()
        self.best = ""
        self.rank: tuple[bool, float] | None = None  # of the best so far
        self.shown = 0.0

    def open(self, about: str, resume: bool) -> None:
        """Begin to keep things beside OUT, or go on with what an interrupted run kept there under the same `about`.

        That is a hash of all that the result depends on. The time that the interrupted run took counts too, and its best so far
        is the one to beat.
        """
        if not resume:
            folder.forget(self.out)
        self.cache, self.about = folder.Cache(folder.workdir(self.out) / "cache"), about
        seconds = self.get("seconds")
        if resume and seconds is None and folder.workdir(self.out).is_dir():
            self.left_out.append(
                f"There was nothing to resume in {self.out}: what an interrupted run kept there is of another model, other data "
                "or options, or another version. This run started anew."
            )
            folder.forget(self.out)
        self.began -= float(seconds or 0)
        best = self.get("best")
        if best is not None and folder.best_folder(self.out).is_dir():
            self.best, over, number = json.loads(best)
            self.rank = over, number

    def close(self) -> None:
        """Forget everything: the result is there."""
        self.cache = None
        folder.forget(self.out)

    def get(self, key: str) -> bytes | None:
        return self.cache.get(self.about + key) if self.cache is not None else None

    def put(self, key: str, value: bytes) -> None:
        if self.cache is not None:
            self.cache.put(self.about + key, value)
            self.note()

    def note(self) -> None:
        """Write down how much time is spent."""
        self.noted = time.monotonic()
        if self.cache is not None:
            self.cache.put(self.about + "seconds", str(self.noted - self.began).encode())

    def passed(self, name: str, profile: Profile, make: Callable[[], State]) -> State:
        """Return what a pass made of the model, or several did: as kept under `name`, or made now and kept."""
        raw = self.get(f"pass-{name}")
        if raw is not None:
            return kept.unpack(raw, profile)
        state = make()
        self.put(f"pass-{name}", kept.pack(state))
        return state

    def say(self, stage: str, share: float) -> None:
        self.shown = max(self.shown, share)
        if time.monotonic() - self.noted > NOTED_EVERY_S:
            self.note()
        self.progress(stage, self.shown, self.best)

    def left(self, share: float = 1.0) -> float:
        return max(0.0, share * (self.budget - self.ending) - (time.monotonic() - self.began))

    def spent(self) -> float:
        """Return how far the run is by the clock, 0..1."""
        return min(1.0, (time.monotonic() - self.began) / self.budget)

    def found(self, emitted: Emitted, original: Original, max_drop: float, *, trained: bool = False) -> None:
        """Take down what was come by so far, and offer it as the best."""
        minutes, ratio = (time.monotonic() - self.began) / 60, original.size / len(emitted.file)
        self.trail.append(Moment(round(minutes, 2), round(ratio, 3), round(emitted.drop_select, 4), emitted.name))
        self.offer(emitted, original, max_drop, trained=trained)

    def offer(self, emitted: Emitted, original: Original, max_drop: float, *, trained: bool = False) -> None:
        """Keep a candidate on the disk as the best so far and say so, if it ranks before all others."""
        mine = rank(emitted, max_drop, trained=trained)
        if self.rank is not None and mine >= self.rank:
            return
        ratio = original.size / len(emitted.file)
        self.rank, self.best = mine, f"{ratio:.1f}x smaller, {emitted.drop_select:+.2f} points on select"
        kind = "tflite" if emitted.audit is None else "onnx"
        # 1. The model itself. A crash behind it leaves the rank of an earlier one: the next run may write this one again.
        folder.write_folder(
            folder.best_folder(self.out), {f"model.{kind}": emitted.file, "best.txt": self.best.encode()}
        )
        # 2. Its rank.
        self.put("best", json.dumps([self.best, *mine]).encode())
