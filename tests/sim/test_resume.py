"""What an interrupted run leaves beside OUT, and that the next one goes on there; the time that it took counts."""

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress import folder, graph, kept, profiles
from compress.data import Data
from compress.emit import emit
from compress.measure import answers
from compress.metrics import choose
from compress.passes.bias import BIAS
from compress.passes.canonicalise import CANONICALISE
from compress.passes.place import PLACE
from compress.passes.ranges import RANGES
from compress.passes.weight_only import in_blocks
from compress.pipeline import Bench, Pass, State, apply
from compress.run import PASSES, run
from compress.scheme import Scheme
from compress.splits import split
from compress.weights import Blocks
from compress.work import ENDING_S, Work, ending
from skills import ort

Build = Callable[[str], Any]
SIZE = 16  # inputs of a block
CHILD = """
import os, signal, sys
import numpy as np
from pathlib import Path
from compress import ladder, train
from compress.run import run

ladder.steps = lambda at, *_: 0 if at else 40
train.KEPT_EVERY_S = -1.0
said = []

def progress(stage, _share, _best):
    said.append(stage)
    if sum(one.startswith("training, ") and one.endswith(": training") for one in said) == 20:
        os.kill(os.getpid(), signal.SIGKILL)

with np.load("data.npz") as data:
    run(Path("model.onnx"), dict(data), Path("out"), device="x86-avx2", max_drop=90.0, progress=progress)
"""


@pytest.mark.timeout(300)
def test_a_run_killed_in_the_middle_of_training_goes_on_to_the_bytes_of_an_uninterrupted_one(
    small_net: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = small_net("plain")
    data = {"x": net.x[:200], "y": net.y[:200], "x_train": net.x[200:700], "y_train": net.y[200:700]}
    (tmp_path / "model.onnx").write_bytes(net.model.SerializeToString())
    np.savez(tmp_path / "data.npz", **data)
    (tmp_path / "child.py").write_text(CHILD)
    ended = subprocess.run([sys.executable, "child.py"], cwd=tmp_path, timeout=280, check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.work" / "best" / "model.onnx").is_file()

    monkeypatch.setattr(
        "compress.ladder.steps", lambda *_, **__: 0
    )  # the plan of the first rung is there, none comes after it
    monkeypatch.setattr("compress.run.result", lambda families, *_: families[-1][-1])  # the trained one
    said: list[str] = []
    report = run(
        tmp_path / "model.onnx", data, tmp_path / "out", device="x86-avx2", max_drop=90.0, resume=True,
        progress=lambda stage, _share, _best: said.append(stage),
    )  # fmt: skip
    assert 15 < sum(one.startswith("training, ") and one.endswith(": training") for one in said) <= 21
    assert not {step.title for step in PASSES} & set(said)  # nothing was searched again
    assert not (tmp_path / ".out.work").exists()
    assert any(moment.what == "trained 1" for moment in report.details.trail)
    resumed = (tmp_path / "out" / "model.onnx").read_bytes()
    run(tmp_path / "model.onnx", data, tmp_path / "whole", recipe=tmp_path / "out" / "recipe.yaml")
    assert (tmp_path / "whole" / "model.onnx").read_bytes() == resumed


def test_passes_that_were_done_are_not_done_again(small_net: Build, tmp_path: Path) -> None:
    net, calls = small_net("plain"), list[str]()
    (tmp_path / "model.onnx").write_bytes(net.model.SerializeToString())

    def counted(step: Pass) -> Pass:
        def act(state: State, bench: Bench) -> State:
            calls.append(step.name)
            return step.run(state, bench)

        return Pass(step.name, step.title, act, step.keeps_function)

    def interrupt(stage: str, _share: float, _best: str) -> None:
        if stage == "looking at the report part":
            raise KeyboardInterrupt

    asked: dict[str, Any] = {"device": "x86-avx2", "max_drop": 3.0, "passes": [counted(step) for step in PASSES[:5]]}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "model.onnx", net.data, tmp_path / "out", progress=interrupt, **asked)
    assert calls == [step.name for step in PASSES[:5]]
    calls.clear()
    run(tmp_path / "model.onnx", net.data, tmp_path / "out", resume=True, **asked)
    assert calls == []
    run(tmp_path / "model.onnx", net.data, tmp_path / "out", resume=True, **asked)
    assert calls == [step.name for step in PASSES[:5]]  # nothing is kept of a run that ended


def exact(outputs: Any, y: Any) -> Any:
    return outputs.argmax(axis=1) == y


def lenient(outputs: Any, y: Any) -> Any:
    return np.abs(outputs.argmax(axis=1) - y) < 2


@pytest.mark.parametrize(("before", "after"), [("top1", "macro_f1"), (None, "agreement"), (exact, lenient)])
def test_passes_that_were_done_for_another_metric_are_done_again(
    before: Any, after: Any, small_net: Build, tmp_path: Path
) -> None:
    net, calls = small_net("plain"), list[str]()
    (tmp_path / "model.onnx").write_bytes(net.model.SerializeToString())

    def act(state: State, bench: Bench) -> State:
        calls.append(bench.metric.name)
        return state

    def interrupt(stage: str, _share: float, _best: str) -> None:
        if stage == "looking at the report part":
            raise KeyboardInterrupt

    steps = [CANONICALISE, RANGES, Pass("look", "looking", act), PLACE]
    asked: dict[str, Any] = {"device": "x86-avx2", "max_drop": 3.0, "passes": steps, "progress": interrupt}
    for metric, resume in ((before, False), (before, True), (after, True)):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "model.onnx", net.data, tmp_path / "out", metric=metric, resume=resume, **asked)
    assert len(calls) == 2
    assert calls[0] != calls[1]


def test_what_was_kept_for_other_inputs_is_not_used(small_net: Build, tmp_path: Path) -> None:
    first = Work(tmp_path / "out", 0.0, 100.0, lambda *_: None)
    first.open("one", resume=False)
    first.put("key", b"value")
    folder.write_folder(folder.best_folder(tmp_path / "out"), {"model.onnx": b"the best of the first"})
    for about, resume, found in (("one", True, b"value"), ("two", True, None), ("one", False, None)):
        later = Work(tmp_path / "out", 0.0, 100.0, lambda *_: None)
        later.open(about, resume=resume)
        assert later.get("key") == found
        assert ["nothing to resume" in said for said in later.left_out] == ([True] if about == "two" else [])
        assert folder.best_folder(tmp_path / "out").is_dir() == (found is not None)


def test_the_time_that_an_interrupted_run_took_counts_against_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("compress.work.time.monotonic", lambda: now[0])
    first = Work(tmp_path / "out", 1000.0, 100.0, lambda *_: None)
    first.open("this", resume=False)
    assert first.left() == 100.0 - ENDING_S
    now[0] += 30.0
    first.say("working", 0.5)  # from time to time it is written down
    now[0] = 5.0  # another day
    second = Work(tmp_path / "out", 5.0, 100.0, lambda *_: None)
    second.open("this", resume=True)
    assert second.left() == pytest.approx(70.0 - ENDING_S)
    assert second.spent() == pytest.approx(0.3)
    now[0] += 200.0
    assert second.left() == 0.0
    assert second.spent() == 1.0


def test_what_is_kept_for_the_end_grows_with_the_report_part_and_never_below_the_least() -> None:
    assert ending(8, 600, 1e-4) == ENDING_S
    assert ending(14, 10_000, 1e-3) == pytest.approx(140.0)
    assert ending(14, 20_000, 1e-3) == pytest.approx(280.0)


def bench_of(net: Any) -> Bench:
    splits = split(Data(net.x, net.y), 0)
    session = ort.session(net.model.SerializeToString())
    calibrate, select = (answers(session, part.x) for part in (splits.calibrate, splits.select))
    metric = choose(Data(net.x, net.y), calibrate, splits.calibrate.x)
    return Bench(profiles.find("x86-avx2"), splits, metric, calibrate, select, 1.0, "both", lambda *_: None)


def file_of(state: State, scheme: Scheme) -> bytes:
    return emit(state.model, scheme, state.seen()).SerializeToString()


@pytest.mark.parametrize("kind", ["plain", "gru"])
def test_a_state_that_was_kept_gives_the_same_file(kind: str, small_net: Build) -> None:
    net = small_net(kind)
    bench = bench_of(net)
    state = State(net.model, notes=("a note",), harm={"layer": {4: 0.5, 1.6: 1.5}}, choices={"guard": "int8"})
    for step in (CANONICALISE, RANGES, PLACE, BIAS):
        state = apply([step], state, lambda _step: bench)
        again = kept.unpack(kept.pack(state), bench.profile)
        assert (again.notes, again.harm, again.choices, again.passes) == (
            state.notes, state.harm, state.choices, state.passes,
        )  # fmt: skip
        if state.scheme is not None:
            assert (again.planned().layers, again.planned().ranges) == (state.scheme.layers, state.scheme.ranges)
            assert file_of(again, again.planned()) == file_of(state, state.scheme)


def test_layers_in_blocks_and_other_schemes_are_kept_too(small_net: Build) -> None:
    net = small_net("transformer")
    bench = bench_of(net)
    state = apply([CANONICALISE, RANGES, PLACE], State(net.model), lambda _step: bench)
    values, scheme = graph.arrays(state.model), state.planned()
    blocks = {}
    for layer in scheme.layers:
        if layer.op in ("MatMul", "Gemm") and layer.count // layer.shape[layer.axis] % SIZE == 0:
            weight = np.moveaxis(values[layer.weight], layer.axis, 0)
            scales = np.abs(weight.reshape(len(weight), -1, SIZE)).max(axis=2).astype(np.float32) / 7
            codes = np.rint(weight / np.repeat(scales, SIZE, axis=1)).astype(np.int8)
            blocks[layer.node] = Blocks(codes, scales, SIZE)
    narrow = scheme.with_bits({layer.node: 4 for layer in scheme.layers})
    state = dataclasses.replace(state, scheme=in_blocks(state, bench, blocks), safer=(scheme,), bolder=(narrow, scheme))
    again = kept.unpack(kept.pack(state), bench.profile)
    assert again.planned().blocks.keys() == blocks.keys() != set()
    assert again.planned().bits_before == dict.fromkeys(blocks, 8)
    assert file_of(again, again.planned()) == file_of(state, state.planned())
    assert [file_of(again, one) for one in again.safer] == [file_of(state, one) for one in state.safer] != []
    assert [file_of(again, one) for one in again.bolder] == [file_of(state, one) for one in state.bolder]
