"""Bundles: what a folder becomes, and that no changed byte gets through."""

import dataclasses
import io
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skills import zstd
from skills.bundle import build_bundle, decode_bundle, open_bundle, parts_for, unpack_part
from skills.errors import FormatError, NotFound, TrustError
from skills.files import sha256_hex
from skills.resolve import Capabilities, Choice, resolve

SKILL = """
name: echo
version: 1.0.0
inputs: [{name: x, dtype: FP32, shape: [-1]}]
outputs: [{name: y, dtype: FP32, shape: [-1]}]
models:
  net:
    variants:
      - {name: small, runtime: onnxruntime, file: small.onnx, ram_mb: 10}
      - {name: large, runtime: onnxruntime, file: large.onnx, ram_mb: 90}
stages: [{name: run, model: net, code: run.py}]
assets: [labels.txt]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "echo"
    folder.mkdir()
    (folder / "skill.yaml").write_text(SKILL)
    for name in ("run.py", "probe.npz", "labels.txt"):
        (folder / name).write_text(name)
    (folder / "small.onnx").write_bytes(bytes(range(256)) * 2000)
    (folder / "large.onnx").write_bytes(b"\0" * 100)
    return folder


def test_a_bundle_opens_to_what_went_in(folder: Path, tmp_path: Path) -> None:
    bundle = build_bundle(folder, tmp_path / "echo.skb")
    opened = open_bundle(tmp_path / "echo.skb")
    assert opened.bundle == bundle == decode_bundle(opened.manifest_bytes, "x")
    for part in bundle.parts:
        assert unpack_part(part, opened.objects[part.wire_sha256]) == (folder / part.path).read_bytes()


def test_the_same_folder_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    build_bundle(folder, tmp_path / "a.skb")
    build_bundle(folder, tmp_path / "b.skb")
    assert (tmp_path / "a.skb").read_bytes() == (tmp_path / "b.skb").read_bytes()


def test_a_device_needs_only_its_own_variant(folder: Path, tmp_path: Path) -> None:
    bundle = build_bundle(folder, tmp_path / "echo.skb")
    choice = resolve(bundle.skill, Capabilities("x86_64", 50, 10, "0.1.0", runtimes={"onnxruntime": "1.31"}))
    assert isinstance(choice, Choice)
    assert {part.path for part in parts_for(bundle, choice)} == {"run.py", "probe.npz", "labels.txt", "small.onnx"}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(min_value=0), st.integers(1, 255))
def test_no_flipped_byte_of_a_bundle_goes_unnoticed_or_unnamed(
    folder: Path, tmp_path: Path, at: int, flip: int
) -> None:
    path = tmp_path / "echo.skb"
    if not path.exists():
        build_bundle(folder, path)
        path.with_suffix(".whole").write_bytes(path.read_bytes())
    whole = path.with_suffix(".whole").read_bytes()
    data = bytearray(whole)
    data[at % len(data)] ^= flip
    path.write_bytes(data)
    try:
        opened = open_bundle(path)
    except (FormatError, TrustError) as error:
        assert str(error)
        return
    path.write_bytes(whole)
    assert opened.manifest_bytes == open_bundle(path).manifest_bytes  # only the ZIP's own fields were touched


@pytest.mark.parametrize(
    ("missing", "said"),
    [("skill.yaml", "is no skill"), ("run.py", "names run.py, which is not there"), (".", "is not a folder")],
)
def test_a_folder_that_is_no_skill_is_one_sentence(folder: Path, tmp_path: Path, missing: str, said: str) -> None:
    if missing == ".":
        folder = folder / "nowhere"
    else:
        (folder / missing).unlink()
    with pytest.raises(NotFound, match=said):
        build_bundle(folder, tmp_path / "echo.skb")
    assert not (tmp_path / "echo.skb").exists()


def test_no_part_is_a_file_and_the_folder_of_another_part(folder: Path, tmp_path: Path) -> None:
    bundle = build_bundle(folder, tmp_path / "echo.skb")
    inside = dataclasses.replace(bundle.parts[0], path="run.py/more/x.py")
    beside = dataclasses.replace(bundle.parts[0], path="run.pyc/x.py")
    assert dataclasses.replace(bundle, parts=(*bundle.parts, beside))
    with pytest.raises(FormatError, match=r"the part run\.py is a file and the folder of the part run\.py/more/x\.py"):
        dataclasses.replace(bundle, parts=(*bundle.parts, inside))


def test_something_else_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "x.skb").write_bytes(b"PK not a zip")
    with pytest.raises(FormatError, match="is no bundle"):
        open_bundle(tmp_path / "x.skb")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("bundle.json", "{}")
    (tmp_path / "x.skb").write_bytes(buffer.getvalue())
    with pytest.raises(FormatError, match="lacks the key"):
        open_bundle(tmp_path / "x.skb")


@given(st.binary(max_size=2000), st.integers(0, 2000))
def test_decompression_never_yields_more_than_its_limit(data: bytes, limit: int) -> None:
    wire = zstd.compress(data, 3)
    try:
        assert zstd.decompress(wire, limit) == data
        assert len(data) <= limit
    except FormatError:
        assert len(data) > limit


@given(st.binary(max_size=300))
def test_any_bytes_as_a_wire_form_give_the_documented_error(folder_bytes: bytes) -> None:
    try:
        zstd.decompress(folder_bytes, 1000)
    except FormatError as error:
        assert "compressed data" in str(error)


def test_a_bomb_stops_at_the_announced_size() -> None:
    with pytest.raises(FormatError, match="unpacks to more"):
        zstd.decompress(zstd.compress(bytes(50 << 20), 3), 1000)
    assert sha256_hex(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_manifest_whose_splits_no_variant_names_is_refused(folder: Path, tmp_path: Path) -> None:
    bundle = build_bundle(folder, tmp_path / "echo.skb")
    with pytest.raises(FormatError, match=r"disagree on the split plan other\.yaml"):
        dataclasses.replace(bundle, splits={"other.yaml": ("small.onnx",)})
