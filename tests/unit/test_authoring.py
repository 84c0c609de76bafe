"""Beginning, checking and building a skill."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from cloud import authoring
from cloud.authoring import build_skill, check_skill, new_skill, templates
from cloud.recipes import run_recipe
from cloud.trial import try_skill
from skills.errors import DeadlineExceeded, FormatError, NotFound, SkerryError, StorageError, UsageError

MANIFEST = """\
name: tiny
version: 1.0.0
inputs: [{name: x, dtype: FP32, shape: [-1]}]
outputs: [{name: y, dtype: FP32, shape: [-1]}]
models: {net: {variants: [{name: plain, runtime: onnxruntime, file: models/net.onnx}]}}
stages: [{name: run, model: net, code: run.py}]
recipe: recipe.py
"""
MODEL = bytes.fromhex(  # y = Identity(x)
    "08083a390a100a017812017922084964656e746974791201675a100a0178120b0a09080112050a0312016e62100a0179"
    "120b0a09080112050a0312016e42040a00100d"
)
RECIPE = f"""\
import pathlib, sys
import numpy as np
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
(out / "models").mkdir(parents=True)
(out / "models" / "net.onnx").write_bytes({MODEL!r})
(out / "skill.yaml").write_text("name: other")
np.savez(out / "probe.npz", **{{"in.x": np.zeros(1, np.float32), "out.y": np.zeros(1, np.float32)}})
print("trained")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "skill.yaml").write_text(MANIFEST)
    (folder / "run.py").write_text("def run(inputs, model):\n    return model(x=inputs['x'])\n")
    (folder / "recipe.py").write_text(RECIPE)
    return folder


@pytest.mark.parametrize("template", templates())
def test_a_new_skill_is_a_ready_one_under_its_own_name(tmp_path: Path, template: str) -> None:
    skill = new_skill("mine", tmp_path / "mine", template)
    checked = check_skill(tmp_path / "mine")
    assert (skill.name, skill.version) == ("mine", "0.1.0")
    assert checked.skill == skill
    assert checked.missing  # its recipe makes them


@pytest.mark.parametrize("name", ["Mine", "1st", "", "a b", "-x"])
def test_a_name_that_no_skill_may_have_makes_no_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be called"):
        new_skill(name, tmp_path / "new", "digits")
    assert not list(tmp_path.glob("new*"))


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        new_skill("mine", tmp_path / "mine", "digits")


def test_a_full_disk_leaves_no_half_made_skill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(authoring.shutil, "copytree", full)
    with pytest.raises(StorageError, match="no space left"):
        new_skill("mine", tmp_path / "mine", "digits")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_disk_that_fills_up_while_copying_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = str(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def full(*_: object, **__: object) -> None:
        raise shutil.Error([("a/recipe.py", "b/recipe.py", reason), ("a/skill.yaml", "b/skill.yaml", reason)])

    monkeypatch.setattr(authoring.shutil, "copytree", full)
    with pytest.raises(StorageError, match="no space left") as caught:
        new_skill("mine", tmp_path / "mine", "digits")
    assert "[" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_what_is_missing_is_made_by_the_recipe_and_nothing_else_is_touched(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert check_skill(folder).missing == ("probe.npz", "models/net.onnx")
    bundle = build_skill(folder, tmp_path / "tiny.skb", said.append)
    assert "trained" in said
    assert {part.path for part in bundle.parts} >= {"run.py", "models/net.onnx", "probe.npz"}
    assert (folder / "skill.yaml").read_text() == MANIFEST
    assert not list(folder.glob("**/__pycache__"))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["home", "tiny", "tiny.skb"]


def test_a_recipe_that_fails_says_its_own_last_words(folder: Path, tmp_path: Path) -> None:
    (folder / "recipe.py").write_text("import sys; print('recipe.py: no data here', file=sys.stderr); sys.exit(66)")
    with pytest.raises(NotFound, match="the recipe failed: no data here"):
        build_skill(folder, tmp_path / "tiny.skb")
    (folder / "recipe.py").write_text("1 / 0")
    with pytest.raises(SkerryError, match="ZeroDivisionError"):
        build_skill(folder, tmp_path / "tiny.skb")
    assert not (tmp_path / "tiny.skb").exists()


def test_control_code_is_checked_without_being_run(folder: Path) -> None:
    (folder / "run.py").write_text("raise SystemExit('never')\ndef walk(inputs, model): ...\n")
    with pytest.raises(FormatError, match=r"has no function run\(inputs, model\), it has walk"):
        check_skill(folder)
    (folder / "run.py").write_text("def run(inputs, model)\n")
    with pytest.raises(FormatError, match=r"run.py line 1"):
        check_skill(folder)


@pytest.mark.parametrize("path", ["run.py", "recipe.py"])
def test_code_that_is_missing_is_never_left_to_the_recipe(folder: Path, path: str) -> None:
    (folder / path).unlink()
    with pytest.raises(NotFound, match=f"names {path}, which is not there, and which no recipe makes"):
        check_skill(folder)


def test_a_model_that_its_runtime_cannot_load_is_named_and_nothing_is_packed(folder: Path, tmp_path: Path) -> None:
    build_skill(folder, tmp_path / "tiny.skb")
    (tmp_path / "tiny.skb").unlink()
    (folder / "models" / "net.onnx").write_text("junk")
    with pytest.raises(FormatError, match="cannot load .*tiny/models/net.onnx"):
        try_skill(folder)
    with pytest.raises(FormatError, match="cannot load .*tiny/models/net.onnx"):
        build_skill(folder, tmp_path / "tiny.skb")
    assert not (tmp_path / "tiny.skb").exists()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "def run(inputs, model):\n    print('noise')\n    return {'y': inputs['x'] + 2}\n",
            "net=plain: output 'y' is off by 2",
        ),
        ("import absent\ndef run(inputs, model): ...\n", "No module named 'absent'"),
        ("import os\ndef run(inputs, model): os._exit(5)\n", "net=plain: the probe ended its process with exit code 5"),
    ],
)
def test_a_probe_that_fails_is_said_and_does_not_hold_a_build_back(
    folder: Path, tmp_path: Path, code: str, said: str
) -> None:
    warnings: list[str] = []
    (folder / "run.py").write_text(code)
    build_skill(folder, tmp_path / "tiny.skb", warn=warnings.append)
    assert len(warnings) == 1
    assert said in warnings[0]
    assert (tmp_path / "tiny.skb").is_file()


def test_a_variant_for_another_machine_is_loaded_but_not_probed(folder: Path, tmp_path: Path) -> None:
    (folder / "skill.yaml").write_text(MANIFEST.replace("{name: plain,", "{name: plain, arch: [abacus],"))
    (folder / "run.py").write_text("def run(inputs, model):\n    return {}\n")
    warnings: list[str] = []
    build_skill(folder, tmp_path / "tiny.skb", warn=warnings.append)
    assert "models/net.onnx was loaded but not probed: it is made for abacus" in warnings[0]


def test_golden_data_must_name_every_input_and_output(folder: Path) -> None:
    np.savez(folder / "probe.npz", **{"in.x": np.zeros(1)})
    with pytest.raises(FormatError, match=r"lacks the array out.y, it has in.x"):
        check_skill(folder)


def test_a_folder_that_is_no_skill_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is no skill"):
        check_skill(tmp_path)
    with pytest.raises(NotFound, match="is not a folder"):
        check_skill(tmp_path / "absent")


def test_a_recipe_that_never_ends_is_ended(folder: Path) -> None:
    (folder / "recipe.py").write_text(
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    with pytest.raises(DeadlineExceeded, match="longer than 0.5 s"):
        run_recipe(folder, "recipe.py", ("probe.npz",), deadline_s=0.5)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["home", "tiny"]
