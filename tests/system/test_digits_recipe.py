"""The ready skill `digits`: its recipe, run as a user runs it, and its control code on every runtime."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import skills
from compress import interpreter
from skills import ort
from skills.manifest import load_skill

DIGITS = Path(skills.__file__).parent / "library" / "digits"
LEAST_RATIO, LEAST_SPEEDUP = 6.0, 1.2


def test_the_recipe_makes_a_complete_skill_folder(built_digits: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = built_digits
    skill = load_skill((folder / "skill.yaml").read_text(), "skill.yaml")
    assert [path for path in skill.files() if not (folder / path).is_file()] == []
    assert skill.name == "digits"


def test_the_compressed_digits_keep_the_promises_of_the_demo(built_digits: tuple[Path, dict[str, Any]]) -> None:
    _, told = built_digits
    report = told["reports"]["onnxruntime"]
    assert told["accuracy"] > 0.97
    assert report["drop"] <= 1.0
    assert report["verdict"] != "not_reached"
    assert report["ratio_file"] >= LEAST_RATIO
    # Timed while the rest of the suite may be running: the full promise is held in bench/.
    assert report["speedup"] >= LEAST_SPEEDUP


@pytest.mark.parametrize("file", ["digits-int8.onnx", "digits-int8.tflite", "digits-fp32.onnx"])
def test_every_variant_reproduces_the_golden_digits(file: str, built_digits: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = built_digits
    skill = load_skill((folder / "skill.yaml").read_text(), "skill.yaml")
    golden, answer = answers(folder, file, "probe.npz", "in.image")
    assert len(golden["in.image"]) == 16
    assert (answer["digit"] == golden["out.digit"]).mean() >= skill.probe.agreement
    assert np.abs(answer["confidence"] - golden["out.confidence"]).max() <= skill.probe.tolerance


def test_every_variant_reads_held_out_digits_alike(built_digits: tuple[Path, dict[str, Any]]) -> None:
    folder, told = built_digits
    for file in ("digits-int8.onnx", "digits-int8.tflite", "digits-fp32.onnx"):
        held, answer = answers(folder, file, "heldout.npz", "image")
        assert (answer["digit"] == held["y"]).mean() >= told["accuracy"] - 0.01


def test_a_wrong_calibration_loads_and_runs_and_fails_the_probe(
    built_digits: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = built_digits
    recipe = load_code(DIGITS / "recipe.py")
    held = np.load(folder / "heldout.npz")
    image, label, held_image, held_label = recipe.digits()
    assert (held_image == held["image"]).all()
    prepare = load_code(DIGITS / "classify.py").prepare
    trained = recipe.Trained(
        (folder / "models" / "digits-fp32.onnx").read_bytes(), prepare(held_image), held_label, prepare(image), label,
        held_image, 0.99,
    )  # fmt: skip
    report = recipe.shrink(trained, tmp_path / "wrong", calibration="wrong")
    assert report.verdict == "not_reached"
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "wrong.onnx").write_bytes((tmp_path / "wrong" / "model.onnx").read_bytes())
    (tmp_path / "probe.npz").write_bytes((folder / "probe.npz").read_bytes())
    golden, answer = answers(tmp_path, "wrong.onnx", "probe.npz", "in.image")
    assert (answer["digit"] == golden["out.digit"]).mean() < 0.9


def answers(folder: Path, file: str, arrays: str, name: str) -> tuple[Any, Any]:
    held = np.load(folder / arrays)
    model = (folder / "models" / file).read_bytes()
    session: Any = interpreter.session(model) if file.endswith(".tflite") else ort.session(model)
    code = load_code(DIGITS / "classify.py")
    return held, code.classify({"image": held[name]}, lambda x: session.run({"x": x}))


def load_code(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"digits_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module
