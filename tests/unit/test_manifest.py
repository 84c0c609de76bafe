"""skill.yaml and the choice of a variant."""

import dataclasses
import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from skills.errors import FormatError
from skills.manifest import Skill, check_path, load_skill
from skills.resolve import Capabilities, Choice, Misfit, resolve
from skills.wire import json_schema

SKILL = """
name: digits
version: 1.0.0
inputs: [{name: image, dtype: UINT8, shape: [-1, 16, 16]}]
outputs: [{name: label, dtype: INT64, shape: [-1]}]
models:
  net:
    variants:
      - {name: int8, runtime: onnxruntime, runtime_min: "1.20", file: models/int8.onnx, isa: [avx2], ram_mb: 40}
      - {name: lite, runtime: litert, file: models/int8.tflite, arch: [aarch64], ram_mb: 30}
      - {name: float, runtime: onnxruntime, file: models/float.onnx, ram_mb: 80}
stages: [{name: classify, model: net, code: classify.py}]
"""
BOARD = Capabilities("aarch64", 512, 1000, "0.1.0", runtimes={"onnxruntime": "1.31.1", "litert": "2.3.0"})


def test_the_first_fitting_variant_in_the_authors_order_is_taken() -> None:
    skill = load_skill(SKILL, "skill.yaml")
    pc = dataclasses.replace(BOARD, arch="x86_64", isa=("avx2",))
    for device, wanted in ((pc, "int8"), (BOARD, "lite"), (dataclasses.replace(pc, isa=()), "float")):
        choice = resolve(skill, device)
        assert isinstance(choice, Choice)
        assert choice.variants["net"].name == wanted


def test_where_nothing_fits_every_variant_says_why() -> None:
    small = dataclasses.replace(BOARD, ram_mb=16)
    answer = resolve(load_skill(SKILL, "skill.yaml"), small)
    assert isinstance(answer, Misfit)
    assert answer.reasons == (
        "net/int8: needs the instruction set avx2",
        "net/lite: needs 30 MiB of memory, 16 MiB are offered",
        "net/float: needs 80 MiB of memory, 16 MiB are offered",
    )


def test_a_runtime_that_is_too_old_does_not_fit() -> None:
    old = dataclasses.replace(BOARD, isa=("avx2",), runtimes={"onnxruntime": "1.9.0"})
    choice = resolve(load_skill(SKILL, "skill.yaml"), old)
    assert isinstance(choice, Choice)
    assert choice.variants["net"].name == "float"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("models:", "modles:", "did you mean 'models'?"),
        ("model: net", "model: nat", "stage 'classify' uses the model 'nat', the skill has net"),
        ("version: 1.0.0", "version: one", "expected a version like 1.2.3"),
        ("name: lite", "name: int8", "two entries called 'int8'"),
        ("models/int8.onnx", "../int8.onnx", "is not allowed"),
        (", file: models/float.onnx", "", "must have either 'file' or 'split'"),
    ],
)
def test_a_faulty_manifest_is_one_sentence_that_names_the_fault(old: str, new: str, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        load_skill(SKILL.replace(old, new), "skill.yaml")
    assert said in str(caught.value)
    assert "skill.yaml line" in str(caught.value)


@given(st.text(max_size=30))
def test_no_path_that_is_let_through_leaves_its_folder(path: str) -> None:
    try:
        check_path(path)
    except FormatError:
        return
    folder = Path("/folder")
    assert (folder / path).resolve().is_relative_to(folder)


def test_the_schema_accepts_what_the_decoder_accepts() -> None:
    jsonschema.validate(json.loads(json.dumps(yaml.safe_load(SKILL))), json_schema(Skill))
