"""A skill that names a plan of its stages: what must fit between the two, before it is built, published or accepted."""

import dataclasses
import datetime as dt
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.authoring import check_skill
from cloud.database import Database
from cloud.journal import open_journal
from cloud.registry import Registry
from cloud.split.check import check_plan
from skills import bundle as bundles
from skills import signing
from skills.bundle import build_bundle, load_folder, open_bundle, parts_for
from skills.coding import Live
from skills.desired import ObjectRef
from skills.errors import FormatError, NotFound, TrustError
from skills.files import sha256_file
from skills.manifest import load_skill
from skills.resolve import Choice
from skills.split_plan import Plan, Policy, load_plan, plan_hash
from skills.stages import check_placement, check_stages, load_stage, pack, unpack

NOW = 1_800_000_000.0


@pytest.fixture
def folder(placed_skill: Any, tmp_path: Path) -> Path:
    shutil.copytree(placed_skill.folder, tmp_path / "shapes")
    return tmp_path / "shapes"


def plan_of(folder: Path) -> Plan:
    return load_plan((folder / "split.yaml").read_text())


def test_a_bundle_carries_the_plan_and_all_that_its_stages_need(folder: Path, tmp_path: Path) -> None:
    assert not check_skill(folder).missing
    built = build_bundle(folder, tmp_path / "shapes.skb")
    assert open_bundle(tmp_path / "shapes.skb").bundle == built
    assert set(built.splits["split.yaml"]) == {"stages.py", "net.onnx", "scale.txt"}
    device = {part.path for part in parts_for(built, Choice({"net": built.skill.models["net"].variants[0]}))}
    assert device == {"stages.py", "net.onnx", "scale.txt", "split.yaml", "probe.npz"}
    assert not check_plan(folder).faults


@pytest.mark.parametrize("file", ["stages.py", "net.onnx", "scale.txt"])
def test_a_file_that_changed_since_it_was_planned_is_named(folder: Path, file: str) -> None:
    (folder / file).write_bytes((folder / file).read_bytes() + b"\n")
    with pytest.raises(FormatError, match=f"{file} has sha256 .* plan again"):
        load_folder(folder)
    assert any(file in fault for fault in check_plan(folder).faults)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("name: crop,", "name: cut,", "places crop, classify, shapes has cut, classify"),
        ("assets: [scale.txt]", "assets: []", "disagree on the file scale.txt"),
        ("shape: [-1, 4]", "shape: [-1, 9]", "disagree on the output 'logits'"),
        ("dtype: INT64", "dtype: INT32", "disagree on the input 'order'"),
        ("file: net.onnx", "split: split.yaml", "model 'net' is split, and so is the skill"),
        ("placement: split.yaml", "placement: other.yaml", "placement"),
    ],
)
def test_a_manifest_that_does_not_fit_the_plan_is_one_sentence(folder: Path, old: str, new: str, sentence: str) -> None:
    text = (folder / "skill.yaml").read_text()
    assert old in text
    (folder / "skill.yaml").write_text(text.replace(old, new))
    with pytest.raises(FormatError, match=sentence):
        load_folder(folder)


def test_a_placement_that_is_not_there_is_said(folder: Path) -> None:
    (folder / "split.yaml").unlink()
    with pytest.raises(NotFound, match="names split.yaml, which is not there"):
        load_folder(folder)


Change = Callable[[Plan], Plan]
CHANGES: dict[str, Change] = {
    "0 stages": lambda plan: dataclasses.replace(plan, stages=()),
    "no stock tail": lambda plan: dataclasses.replace(plan, policy=Policy(tail="stock")),
    "no model among the plan's parts": lambda plan: dataclasses.replace(
        plan, stages=tuple(dataclasses.replace(one, model="") for one in plan.stages)
    ),
    "hands on another message": lambda plan: dataclasses.replace(
        plan, stages=(dataclasses.replace(plan.stages[0], message=plan.inputs), plan.stages[1])
    ),
    "other tensors than the message": lambda plan: dataclasses.replace(
        plan,
        cuts=tuple(
            dataclasses.replace(cut, tensors=cut.tensors[:1], codings=()) if cut.name == "c1" else cut
            for cut in plan.cuts
        ),
    ),
    "something else than the plan's outputs": lambda plan: dataclasses.replace(
        plan, outputs=(dataclasses.replace(plan.outputs[0], shape=(1, 5)),)
    ),
    "it is in stages.py": lambda plan: dataclasses.replace(
        plan, segments=tuple(dataclasses.replace(one, file="other.py") for one in plan.segments)
    ),
    "which is not its model": lambda plan: dataclasses.replace(
        plan, stages=tuple(dataclasses.replace(one, model="scale.txt") for one in plan.stages)
    ),
}


@pytest.mark.parametrize("sentence", CHANGES)
def test_a_plan_that_does_not_fit_is_refused_in_one_sentence(folder: Path, sentence: str) -> None:
    skill = load_skill((folder / "skill.yaml").read_text(), "skill.yaml")
    plan = plan_of(folder)
    hashes = {path: sha256_file(folder / path) for path in plan.files()}
    check_placement(skill, plan, hashes)
    with pytest.raises(FormatError, match=sentence):
        check_placement(skill, CHANGES[sentence](plan), hashes)


def test_the_hash_of_a_plan_stands_for_all_that_a_tail_runs_of_it(folder: Path) -> None:
    plan = plan_of(folder)
    check_stages(plan)
    seen = {plan_hash(plan)}
    for changed in (
        dataclasses.replace(plan, parts=plan.parts[:1]),
        dataclasses.replace(plan, parts=(dataclasses.replace(plan.parts[0], sha256="0" * 64), *plan.parts[1:])),
        dataclasses.replace(plan, segments=(dataclasses.replace(plan.segments[0], sha256="0" * 64), plan.segments[1])),
        dataclasses.replace(plan, stages=(dataclasses.replace(plan.stages[0], name="main"), plan.stages[1])),
        dataclasses.replace(plan, stages=(dataclasses.replace(plan.stages[0], model="x"), plan.stages[1])),
    ):
        seen.add(plan_hash(changed))
    assert len(seen) == 6
    elsewhere = dataclasses.replace(plan, stages=tuple(dataclasses.replace(one, place="device") for one in plan.stages))
    assert plan_hash(elsewhere) in seen


def test_code_whose_hash_does_not_fit_is_not_even_begun(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\ndef crop(): pass\n"
    )
    with pytest.raises(TrustError, match="the plan says 000000000000…"):
        load_stage(tmp_path, "code.py", "crop", "0" * 64)
    assert not (tmp_path / "ran").exists()
    assert callable(load_stage(tmp_path, "code.py", "crop", sha256_file(tmp_path / "code.py")))
    assert (tmp_path / "ran").exists()


KINDS = (Live("a", "FP32", (-1, 2)), Live("b", "INT64", (1,)))


@settings(deadline=None)
@given(
    shapes=st.recursive(st.none() | st.integers() | st.text(max_size=3), st.lists, max_leaves=8),
    body=st.binary(max_size=64),
)
def test_any_bytes_as_a_message_give_its_type_or_the_documented_error(shapes: Any, body: bytes) -> None:
    try:
        found = unpack(KINDS, shapes, memoryview(body))
    except FormatError:
        return
    assert [str(array.dtype) for array in found.values()] == ["float32", "int64"]


def test_a_message_comes_out_as_it_went_in() -> None:
    message = {"b": np.array([7]), "a": np.arange(6, dtype=np.float32).reshape(3, 2)}
    shapes, body = pack(KINDS, message)
    for name, array in unpack(KINDS, shapes, memoryview(bytearray(body))).items():
        np.testing.assert_array_equal(array, message[name])


async def test_the_controller_lays_out_the_stages_of_a_release_and_refuses_one_whose_plan_does_not_fit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(f"sqlite:///{tmp_path / 'x.db'}")
    registry = Registry(tmp_path / "data", database, open_journal(None), lambda: NOW)
    publisher = signing.load_key(tmp_path / "data" / "keys" / "publisher.pem")
    build_bundle(folder, tmp_path / "good.skb")
    (folder / "stages.py").write_bytes((folder / "stages.py").read_bytes() + b"\n")
    monkeypatch.setattr(bundles, "check_placement", lambda *_: None)  # as somebody who builds by other means
    build_bundle(folder, tmp_path / "bad.skb")

    async def release(file: Path) -> None:
        opened = open_bundle(file)
        for sha256, data in {**opened.objects, opened.digest: opened.manifest_bytes}.items():
            await registry.put(sha256, body(data))
        ref = ObjectRef(opened.digest, len(opened.manifest_bytes))
        now = dt.datetime.fromtimestamp(NOW, dt.UTC)
        targets = signing.add_release(registry.role("targets"), "skills/shapes/1.0.0.json", ref, publisher, now)
        await registry.accept(opened.digest, targets)

    async def body(data: bytes) -> AsyncIterator[bytes]:
        yield data

    with pytest.raises(FormatError, match="stages.py has sha256"):
        await release(tmp_path / "bad.skb")
    assert not list((tmp_path / "data" / "tails").iterdir())
    await release(tmp_path / "good.skb")
    name = plan_hash(plan_of(folder))
    assert {path.name for path in (tmp_path / "data" / "tails" / name).iterdir()} == {
        "split.yaml", "stages.py", "net.onnx", "scale.txt",
    }  # fmt: skip
    database.close()
