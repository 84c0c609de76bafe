"""What is measured beside each other: our result, and what the other tools make of the same model from the same data."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import environments
from environments import Environment, EnvironmentFailed
from judge import BUDGET, TUNED
from rows import Prepared, Row, digest

from compress.lineage import ground

HERE = Path(__file__).parent
PRUNED = (1.15, 1.3, 1.7, 2.3)  # times fewer multiply-accumulates
FINE_TUNE_MINUTES = {"resnet56": 4, "resnet20-taught": 2, "imu": 0.1}  # of one core, for each of them
# Nothing of what is measured here is told to the tools' makers.
QUIET = {"OMP_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1", "NNCF_CI": "1"}
OURS = (".py", ".yaml", ".txt")
STEP_S = 3600  # no single step takes longer


@dataclasses.dataclass(frozen=True, slots=True)
class Baseline:
    """A tool with its settings: `script` runs in `environment`, knows nothing of us, and leaves a `model.onnx`."""

    name: str
    title: str
    environment: Environment
    script: str
    settings: Mapping[str, Any]
    uses: tuple[str, ...] = ()  # further files in baselines/ whose change makes an earlier result worthless


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """What a tool left: a file with notes, or the reason why there is none."""

    name: str
    title: str
    model: Path | None
    notes: Mapping[str, Any]
    failure: str = ""


def baselines(row: Row) -> tuple[Baseline, ...]:
    """Return the tools that this row's data allows."""

    def with_onnxruntime(name: str, title: str, *, tuned: bool) -> Baseline:
        return Baseline(name, title, environments.ONNXRUNTIME, "with_onnxruntime.py", {"tuned": tuned})

    def with_nncf(name: str, title: str, *, control: bool) -> Baseline:
        settings = {"accuracy_control": control, "max_drop": BUDGET}
        return Baseline(name, title, environments.NNCF, "with_nncf.py", settings, ("with_onnxruntime.py",))

    torch = ("nets.py", "with_onnxruntime.py")
    autotune = Baseline(
        "neural-compressor", "neural-compressor autotune", environments.NEURAL_COMPRESSOR, "with_neural_compressor.py",
        {"max_drop": BUDGET}, torch,
    )  # fmt: skip
    pruned = [
        Baseline(
            f"torch-pruning-{times:g}", f"torch-pruning {times:g}× + onnxruntime tuned", environments.TORCH_PRUNING,
            "with_torch_pruning.py", {"speed_up": times, "cpu_minutes": FINE_TUNE_MINUTES[row.name]}, torch,
        )
        for times in PRUNED if row.trains
    ]  # fmt: skip
    return (
        with_onnxruntime("onnxruntime", "onnxruntime static, default", tuned=False),
        with_onnxruntime(TUNED, "onnxruntime static, tuned", tuned=True),
        with_nncf("nncf", "NNCF", control=False),
        with_nncf("nncf-control", "NNCF, accuracy control", control=True),
        autotune,
        *pruned,
    )


def make(
    baseline: Baseline, row: Row, prepared: Prepared, reference: Path, work: Path, say: Callable[[str], None]
) -> Made:
    """Return what the tool makes of the row, from an earlier run where nothing has changed since."""
    scripts = [HERE / "baselines" / name for name in (baseline.script, *baseline.uses)]
    given = {"net": row.net, **baseline.settings}
    inputs: dict[str, Any] = {"data": prepared.key, "settings": given, "pins": baseline.environment.key}
    inputs["model"] = reference / row.model
    weights = reference / row.weights if row.weights else None
    inputs |= {path.name: path for path in (*scripts, weights) if path}
    folder = work / "made" / row.name / f"{baseline.name}-{digest(inputs)}"
    if not any((folder / name).is_file() for name in ("result.json", "failure.json")):
        say(f"{row.name}: {baseline.title}")
        paths = {"model": reference / row.model, "weights": weights, "data": prepared.parts, "out": folder}
        given |= {name: str(path) for name, path in paths.items() if path}
        _run(baseline, given, folder, work)
    return _made(baseline, folder)


def earlier(baseline: Baseline, row: Row, work: Path) -> Made | None:
    """Return the newest thing that the tool left for this row, whatever has changed since."""
    folders = sorted(
        (work / "made" / row.name).glob(f"{baseline.name}-{'?' * 16}/*.json"), key=lambda path: path.stat().st_mtime
    )
    return _made(baseline, folders[-1].parent) if folders else None


def _made(baseline: Baseline, folder: Path) -> Made:
    if (folder / "result.json").is_file():
        notes = json.loads((folder / "result.json").read_text())
        model = folder / "model.onnx"
        return Made(baseline.name, baseline.title, model if model.is_file() else None, notes, notes.get("failure", ""))
    failure = json.loads((folder / "failure.json").read_text())["reason"]
    return Made(baseline.name, baseline.title, None, {}, failure)


def _run(baseline: Baseline, given: Mapping[str, Any], folder: Path, work: Path) -> None:
    """Run the tool; `result.json`, which it writes last, says that it is done, `failure.json` why it never will be."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        interpreter = environments.python(baseline.environment, work)
        script = HERE / "baselines" / baseline.script
        with (folder / "log.txt").open("w") as log:
            subprocess.run(
                [str(interpreter), str(script), json.dumps(given)], stdout=log, stderr=subprocess.STDOUT, check=True,
                timeout=STEP_S, cwd=folder, env=os.environ | QUIET,
            )  # fmt: skip
    except EnvironmentFailed as error:
        reason = f"its environment cannot be installed: {error}"
    except subprocess.TimeoutExpired:
        reason = f"not done after {STEP_S // 60} minutes"
    except subprocess.CalledProcessError:
        lines = [line for line in (folder / "log.txt").read_text().splitlines() if line.strip()]
        reason = lines[-1].strip()[:400] if lines else "it died without a word"
    else:
        return
    (folder / "failure.json").write_text(json.dumps({"reason": reason}))


def makers(packages: Path) -> dict[str, Any]:
    """Return what our result comes from beside its inputs: our code, profiles and pins, and the versions of what they call."""
    found = [path for name in ("compress", "skills") for path in (packages / name).rglob("*") if path.suffix in OURS]
    versions = ground() | {"torch": metadata.version("torch")}
    return {str(path.relative_to(packages)): path for path in found} | versions


def ours(
    row: Row, prepared: Prepared, reference: Path, work: Path, time_budget: str, say: Callable[[str], None]
) -> Path:
    """Return the folder that the plain command writes for this row; one that was cut short goes on where it was.

    Raises:
        RuntimeError: the command failed.
    """
    inputs = makers(HERE.parents[1]) | {"model": reference / row.model, "data": prepared.key, "budget": time_budget}
    if row.teacher:
        inputs["teacher"] = reference / row.teacher
    folder = work / "ours" / row.name / digest(inputs)
    out = folder / "out"
    if not (folder / "done").is_file():
        say(f"{row.name}: skerry compress, {time_budget}")
        folder.mkdir(parents=True, exist_ok=True)
        skerry = Path(sys.executable).with_name("skerry")
        command = [str(skerry), "compress", str(reference / row.model), "--data", str(prepared.given), "-o", str(out)]
        command += ["--max-drop", f"{BUDGET:g}", "--time-budget", time_budget, "--resume"]
        command += ["--teacher", str(reference / row.teacher)] if row.teacher else []
        with (folder / "log.txt").open("a") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        if code not in (0, 3):  # 3: the budget was missed, and the best that was found is there
            raise RuntimeError(f"skerry compress ended with {code}, see {folder / 'log.txt'}")
        (folder / "done").touch()
    return out


def our_earlier(row: Row, work: Path) -> Path | None:
    """Return the newest folder that the plain command wrote for this row, whatever has changed since."""
    done = sorted((work / "ours" / row.name).glob("*/done"), key=lambda path: path.stat().st_mtime)
    return done[-1].parent / "out" if done else None
