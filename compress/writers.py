"""Which of two writers makes a state's file: our own, or, for LiteRT and where it has no form for something, litert-torch.

Our own goes first: its files need no other packages, and are as the passes planned them. A run asks the second one only for
what the first refuses before it has written anything; from then on the second one writes all.
"""

import dataclasses
from collections.abc import Callable

from compress import interpreter, judge, measure, tflite
from compress.converters import litert
from compress.converters.environment import Say, installed
from compress.converters.litert import Converted
from compress.judge import Emitted, Original
from compress.pipeline import Bench, State
from skills.errors import DeadlineExceeded, FormatError, SkerryError, StorageError, Unreachable
from skills.files import sha256_hex
from skills.profile import Profile

CHOICE = "writer"  # its key among a recipe's choices
STATIC, WEIGHTS = "litert-torch, int8", "litert-torch, int8 weights"
NOT_HAD = (Unreachable, StorageError, DeadlineExceeded)  # the same again may do


@dataclasses.dataclass(frozen=True, slots=True)
class Store:
    """What an interrupted run kept, by key."""

    get: Callable[[str], bytes | None]
    put: Callable[[str, bytes], None]


class Writer:
    """Writes the states of one run. `ranged` says whether the inputs are real, so that they tell ranges of activations."""

    def __init__(self, bench: Bench, original: Original, say: Say, store: Store, *, ranged: bool = True) -> None:
        self._bench, self._original, self._say, self._store, self._ranged = bench, original, say, store, ranged
        planned = bench.planned.choices.get(CHOICE, "") if bench.planned is not None else ""
        self._refusal = "the recipe says so" if planned else ""  # why the second one writes
        self._way = planned
        self._wrote = False  # our own did

    @property
    def second(self) -> bool:
        """Say whether litert-torch writes this run's files."""
        return bool(self._refusal)

    def family(self, name: str, state: State) -> list[Emitted]:
        """Return the files of a state, loaded and answering on select, from the safest to the boldest.

        Raises:
            FormatError: neither writer can; both reasons.
            Unreachable, StorageError, DeadlineExceeded: our own cannot, and the other's environment was not to be had.
            SkerryError: the runtime did not make of it what the scheme says.
        """
        bench = self._bench
        if not self.second:
            try:
                made = judge.write(name, state, bench.profile, bench.splits, self._original, bench.metric)
            except FormatError as error:
                if self._wrote or not may_ask(bench.profile):
                    raise
                self._refusal = str(error).removesuffix(f": {tflite.ADVICE}")
            else:
                self._wrote = True
                return [made]
        files = [self._load(name, way, state, found) for way, found in self._converted(state)]
        if not self._way:
            within = [one for one in files if one.drop_select <= bench.max_drop]
            self._way = (within or files)[-1].state.choices[CHOICE]
        return files

    def write(self, name: str, state: State) -> Emitted:
        """Return the file of a state in the way that this run settled on; raises as `family`."""
        files = self.family(name, state)
        return next((one for one in files if one.state.choices.get(CHOICE) == self._way), files[-1])

    def _converted(self, state: State) -> list[tuple[str, Converted]]:
        model = state.model
        key = f"litert-{sha256_hex(model.SerializeToString())}"
        kept = self._store.get(key)
        try:
            found = (
                litert.unpack(kept) if kept is not None
                else litert.convert(model, self._bench.splits.calibrate.x, self._say, static=self._ranged)
            )  # fmt: skip
        except SkerryError as error:
            raise failure(self._refusal, error) from error
        if kept is None:
            self._store.put(key, found.pack())
        return [(WEIGHTS, found), *([(STATIC, found)] if found.static is not None else [])]

    def _load(self, name: str, way: str, state: State, found: Converted) -> Emitted:
        bench, scheme = self._bench, state.scheme
        file = found.static if way == STATIC and found.static is not None else found.weights
        if scheme is not None and way == WEIGHTS:
            layers = tuple(dataclasses.replace(layer, compute="float") for layer in scheme.layers)
            scheme = dataclasses.replace(scheme, layers=layers)
        state = dataclasses.replace(
            state,
            scheme=scheme,
            notes=(*state.notes, note(self._refusal, way, found), *larger(len(file), len(self._original.stripped))),
            choices={**state.choices, CHOICE: way},
        )
        runner = interpreter.session(file)
        answers = measure.answers(runner, bench.splits.select.x)
        drop = measure.points(bench.metric, bench.splits.select, self._original.select, answers)
        return Emitted(name if way == STATIC else f"{name}, float activations", state, file, runner, None, drop)


def may_ask(profile: Profile) -> bool:
    """Return whether the second writer makes files for this target: LiteRT with float ends. Pure."""
    return profile.runtime == "litert" and not profile.whole_numbers


def announced(profile: Profile) -> str:
    """Return what to say at the start of a run: that the second writer may have to be installed. Empty where it is or is none."""
    if not may_ask(profile) or installed(litert.LITERT):
        return ""
    return f" (litert-torch, {litert.LITERT.megabytes} MB, is installed only if Skerry's own writer refuses the model)"


def failure(refusal: str, error: SkerryError) -> SkerryError:
    """Return the one error for two writers that could not. Pure."""
    if isinstance(error, NOT_HAD):
        return type(error)(
            f"Skerry's own writer for LiteRT refused: {refusal}. Then litert-torch is asked, but {error}"
        )
    return FormatError(
        f"{refusal}; litert-torch, asked in its place, could not write it either: {error}. As a last resort, {tflite.ADVICE}"
    )


def larger(after: int, before: int) -> tuple[str, ...]:
    """Return a sentence where the file takes more bytes than what came in. Pure."""
    if after <= before:
        return ()
    return (f"The file is larger than the model that came in: {after} bytes, not {before}.",)


def note(refusal: str, way: str, found: Converted) -> str:
    """Return what the report says of who wrote the file, and why. Pure."""
    said = f"The file was written by {litert.versions()}, because Skerry's own writer refused: {refusal}."
    if way == STATIC:
        left = f", but for {', '.join(found.left)}" if found.left else ""
        said += f" It computes in int8 between float ends{left}."
    else:
        said += " Its weights are int8, its activations float"
        said += f"; all in int8 was not to be had: {found.refused}." if found.static is None else "."
    return f"{said} What is promised of narrow weights and of the speed of removed channels holds for Skerry's own files alone."
