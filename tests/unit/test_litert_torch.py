"""What is asked of litert-torch, what is made of its answers, and which writer a run takes: nothing is installed or converted."""

import dataclasses
import json
import re
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress import interpreter, judge, measure, profiles, writers
from compress.converters import environment, litert
from compress.converters.litert import Converted
from compress.converters.scripts import run_litert
from compress.pipeline import State
from compress.writers import STATIC, WEIGHTS, Store, Writer
from skills.errors import DeadlineExceeded, FormatError, MissingExtra, SkerryError, StorageError, Unreachable
from skills.ort import Port

REFUSAL = "the operator Tanh has no int8 form for LiteRT here"
BOTH = Converted(b"weights", b"static")


def nothing(_said: str) -> None:
    """Say nothing."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """A loaded model with one answer for all inputs."""

    value: float
    inputs: tuple[Port, ...] = (Port("x", "float32", (-1, 2)),)
    outputs: tuple[Port, ...] = (Port("y", "float32", (-1, 2)),)
    load_ms: float = 0.0

    def run(self, feeds: dict[str, np.ndarray], names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        return {"y": np.full((len(feeds["x"]), 2), self.value, np.float32)}


@pytest.mark.parametrize(
    ("device", "second"),
    [("arm64-litert", True), ("ethos-u55", False), ("x86-vnni", False), ("arm64-onnxruntime", False)],
)
def test_only_litert_with_float_ends_has_a_second_writer(device: str, *, second: bool) -> None:
    assert writers.may_ask(profiles.find(device)) is second


@pytest.mark.parametrize(
    ("device", "there", "said"),
    [
        ("arm64-litert", False, True),
        ("arm64-litert", True, False),
        ("ethos-u55", False, False),
        ("x86-vnni", False, False),
    ],
)
def test_a_run_says_at_its_start_what_may_have_to_be_installed(
    device: str, there: bool, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if there:
        interpreter = environment.folder(litert.LITERT) / "bin" / "python"
        interpreter.parent.mkdir(parents=True)
        interpreter.touch()
    assert (
        "2200 MB, is installed only if Skerry's own writer refuses" in writers.announced(profiles.find(device))
    ) is said


def test_a_machine_without_a_home_is_no_reason_to_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    assert writers.announced(profiles.find("arm64-litert"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Unreachable("the index does not answer"), 69),
        (StorageError("no room"), 74),
        (DeadlineExceeded("it hangs"), 75),
        (FormatError("torch cannot export the graph"), 65),
        (SkerryError("litert failed: NotImplementedError"), 65),
    ],
)
def test_what_neither_writer_can_is_one_error_with_both_reasons(error: SkerryError, code: int) -> None:
    found = writers.failure(REFUSAL, error)
    assert found.exit_code == code
    assert REFUSAL in str(found)
    assert str(error) in str(found)


def test_the_report_says_who_wrote_the_file_and_why() -> None:
    said = writers.note(REFUSAL, STATIC, dataclasses.replace(BOTH, left=("GELU",)))
    assert re.search(
        r"litert-torch \d+\.\d+\.\d+ and ai-edge-quantizer \d+\.\d+\.\d+, because .*refused: the operator Tanh", said
    )
    assert "int8 between float ends, but for GELU." in said
    assert "narrow weights and of the speed of removed channels" in said
    alone = writers.note(REFUSAL, WEIGHTS, Converted(b"weights", None, "it does not fit"))
    assert "all in int8 was not to be had: it does not fit." in alone
    assert "not to be had" not in writers.note(REFUSAL, WEIGHTS, BOTH)


def test_a_file_larger_than_what_came_in_is_said() -> None:
    assert writers.larger(10, 10) == ()
    assert "11 bytes, not 10" in writers.larger(11, 10)[0]


def test_every_package_of_the_environment_is_pinned_and_torch_is_ours() -> None:
    lines = litert.LITERT.requirements().split()
    assert all(line.count("==") == 1 for line in lines)
    project = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    (torch,) = [line for line in lines if line.startswith("torch==")]
    assert f'"{torch}"' in project, "an exported graph is read by the torch that wrote it"


@pytest.mark.parametrize("found", [BOTH, Converted(b"w", None, "why"), Converted(b"w", b"s", "", ("TANH", "GELU"))])
def test_what_was_converted_survives_the_store(found: Converted) -> None:
    assert litert.unpack(found.pack()) == found


def test_a_file_in_int8_that_is_larger_than_the_float_one_is_not_offered() -> None:
    made = {"float": b"12345", "weights": b"12", "static": b"123456"}
    found = litert.offered(made, ("TANH",), "")
    assert found == Converted(b"12", None, "in int8 it takes 6 bytes, in float 5")
    assert litert.offered(made | {"static": b"123"}, ("TANH",), "") == Converted(b"12", b"123", "", ("TANH",))


@pytest.mark.parametrize(("value", "right"), [(1.0, True), (1.0005, True), (1.01, False), (float("nan"), False)])
def test_a_converted_file_that_answers_otherwise_is_refused(value: float, *, right: bool) -> None:
    x = np.zeros((3, 2), np.float32)
    if right:
        litert.check_same(Answers(value), Answers(1.0), x)
    else:
        with pytest.raises(FormatError, match="answers otherwise"):
            litert.check_same(Answers(value), Answers(1.0), x)


# --- the environment's script, as the converter sees it


class Model:
    """As much of an ONNX model as the converter looks at."""

    graph = types.SimpleNamespace(input=[types.SimpleNamespace(name="x")], output=[types.SimpleNamespace(name="y")])

    def SerializeToString(self) -> bytes:  # noqa: N802 - protobuf's name
        return b"model"


def told(monkeypatch: pytest.MonkeyPatch, script: Callable[[Path], None]) -> list[str]:
    """Let `script` stand for the environment; return what happened, in order."""
    order: list[str] = []

    def call(_environment: object, _name: str, work: Path, _say: object) -> str:
        order.append("call")
        script(work)
        return ""

    monkeypatch.setattr(litert, "export", lambda *_args: order.append("export"))
    monkeypatch.setattr(litert, "ready", lambda *_args: order.append("ready"))
    monkeypatch.setattr(litert, "call", call)
    monkeypatch.setattr(interpreter, "session", lambda _file: Answers(1.0))
    monkeypatch.setattr(litert.ort, "session", lambda _file: Answers(1.0))
    return order


def leave(work: Path, *, says: bool = True, static: bytes = b"s") -> None:
    for name, content in (("float", b"float"), ("weights", b"w"), ("static", static)):
        (work / f"{name}.tflite").write_bytes(content)
    if says:
        (work / "said.json").write_text('{"left": ["TANH"], "refused": ""}')


def converted() -> Converted:
    return litert.convert(Model(), np.zeros((200, 2), np.float32), nothing, static=True)


def test_the_environment_is_made_only_for_what_torch_can_export(monkeypatch: pytest.MonkeyPatch) -> None:
    order = told(monkeypatch, leave)
    assert converted() == Converted(b"w", b"s", "", ("TANH",))
    assert order == ["export", "ready", "call"]


def test_the_script_is_told_the_names_and_gets_a_hundred_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def script(work: Path) -> None:
        seen.update(json.loads((work / "ask.json").read_text()), rows=len(np.load(work / "inputs.npy")))
        leave(work)

    told(monkeypatch, script)
    converted()
    assert seen == {"input": "x", "output": "y", "static": True, "rows": 100}


def test_a_script_that_dies_on_the_way_leaves_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(work: Path) -> None:
        leave(work, says=False)
        raise SkerryError("litert failed: exit code -11")

    told(monkeypatch, dies)
    assert converted() == Converted(b"w", None, "litert failed: exit code -11")


def test_a_script_that_leaves_nothing_is_an_error_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(_work: Path) -> None:
        raise SkerryError("litert failed: NotImplementedError: aten.x")

    told(monkeypatch, dies)
    with pytest.raises(FormatError, match="NotImplementedError: aten.x"):
        converted()


def test_a_script_that_hangs_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(work: Path) -> None:
        leave(work)
        raise DeadlineExceeded("litert did not come to an end")

    told(monkeypatch, hangs)
    with pytest.raises(DeadlineExceeded):
        converted()


def static(monkeypatch: pytest.MonkeyPatch, broken: set[str]) -> tuple[bytes, tuple[str, ...], str]:
    """Quantize a file with three kinds of operators, where the kinds in `broken` must stay float."""

    def quantized(_work: Path, left: tuple[str, ...], _seen: object) -> bytes:
        for kind in sorted(broken - set(left)):
            raise ValueError(f"no\nscale for {kind}")
        return ("-".join(left) or "all").encode()

    monkeypatch.setattr(run_litert, "kinds", lambda _work: ["ADD", "GELU", "TANH"])
    monkeypatch.setattr(run_litert, "static_recipe", lambda left: left)
    monkeypatch.setattr(run_litert, "ranges", lambda *_args: {})
    monkeypatch.setattr(run_litert, "quantized", quantized)
    monkeypatch.setattr(run_litert, "run", lambda _file, _x: None)
    return run_litert.static(Path(), np.zeros(4), "x")


def test_a_kind_of_operator_that_cannot_be_quantized_stays_float(monkeypatch: pytest.MonkeyPatch) -> None:
    assert static(monkeypatch, set()) == (b"all", (), "")
    assert static(monkeypatch, {"GELU"}) == (b"GELU", ("GELU",), "")
    assert static(monkeypatch, {"GELU", "TANH"}) == (b"", (), "ValueError: no scale for GELU")


# --- which writer


class Bench:
    """Enough of a run: three files, a budget of one point."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, own: object = None, drops: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        self.asked = 0
        self.kept: dict[str, bytes] = {}
        self.own = own
        part = types.SimpleNamespace(x=np.zeros((2, 2), np.float32))
        self.profile, self.planned, self.max_drop, self.metric = profiles.find("arm64-litert"), None, 1.0, None
        self.splits = types.SimpleNamespace(calibrate=part, select=part)
        by_file = {b"weights": drops[0], b"static": drops[1]}
        monkeypatch.setattr(judge, "write", self.write)
        monkeypatch.setattr(litert, "convert", self.convert)
        monkeypatch.setattr(interpreter, "session", lambda file: file)
        monkeypatch.setattr(measure, "answers", lambda runner, _x: runner)
        monkeypatch.setattr(measure, "points", lambda _metric, _part, _original, answers: by_file[answers])

    def write(self, name: str, state: State, *_rest: object) -> judge.Emitted:
        if isinstance(self.own, SkerryError):
            raise self.own
        return judge.Emitted(name, state, b"own", Answers(0.0), None, 0.0)

    def convert(self, _model: object, _x: object, _say: object, *, static: bool) -> Converted:
        self.asked += 1
        return BOTH if static else Converted(b"weights", None, "not asked for")

    def writer(self, *, ranged: bool = True) -> Writer:
        original: Any = types.SimpleNamespace(select=None, stripped=b"what came in")
        bench: Any = self
        return Writer(bench, original, nothing, Store(self.kept.get, self.kept.__setitem__), ranged=ranged)


def test_what_our_own_writer_can_is_never_asked_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    writer = bench.writer()
    assert [one.file for one in writer.family("calibrated", State(Model()))] == [b"own"]
    bench.own = FormatError(REFUSAL)  # a smaller network of the same run: it is left out
    with pytest.raises(FormatError, match="Tanh"):
        writer.write("trained 1", State(Model()))
    assert (bench.asked, writer.second) == (0, False)


def test_a_refused_graph_comes_back_from_the_safest_to_the_boldest(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, own=FormatError(REFUSAL))
    writer = bench.writer()
    weights, static = writer.family("calibrated", State(Model(), notes=("before",)))
    assert (weights.name, weights.file) == ("calibrated, float activations", b"weights")
    assert (static.name, static.file) == ("calibrated", b"static")
    assert static.state.choices == {"writer": STATIC}
    assert static.state.notes[0] == "before"
    assert REFUSAL in static.state.notes[1]
    assert writer.second
    bench.own = None
    assert writer.write("trained 1", State(Model())).file == b"static", "one run has one writer"


def test_what_is_trained_is_written_in_the_way_that_kept_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Bench(monkeypatch, own=FormatError(REFUSAL), drops=(0.5, 2.0)).writer()
    writer.family("calibrated", State(Model()))
    assert writer.write("trained 1", State(Model())).file == b"weights"


def test_the_same_graph_is_converted_once_even_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, own=FormatError(REFUSAL))
    bench.writer().family("calibrated", State(Model()))
    bench.writer().family("calibrated", State(Model()))
    assert bench.asked == 1


def test_made_up_inputs_tell_no_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, own=FormatError(REFUSAL))
    assert [one.file for one in bench.writer(ranged=False).family("calibrated", State(Model()))] == [b"weights"]


def test_a_recipe_that_was_written_elsewhere_is_written_there_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.planned = types.SimpleNamespace(choices={"writer": WEIGHTS})  # type: ignore[assignment]
    assert bench.writer().write("calibrated", State(Model())).file == b"weights"


@pytest.mark.parametrize("error", [MissingExtra("LiteRT is not installed"), SkerryError("the .tflite agrees in 3 %")])
def test_only_a_refusal_is_asked_elsewhere(error: SkerryError, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, own=error)
    with pytest.raises(type(error)):
        bench.writer().family("calibrated", State(Model()))
    assert bench.asked == 0
