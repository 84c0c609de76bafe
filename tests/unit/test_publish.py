"""Publishing: uploads what is lacking, signs here, hands in."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from cloud.publish import publish
from cloud.views import ReleaseView
from skills import signing
from skills.bundle import build_bundle
from skills.errors import NotFound
from skills.files import sha256_hex

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MANIFEST = """\
name: tiny
version: 1.0.0
inputs: [{name: x, dtype: FP32, shape: [-1]}]
outputs: [{name: y, dtype: FP32, shape: [-1]}]
models: {net: {variants: [{name: plain, runtime: onnxruntime, file: net.onnx}]}}
stages: [{name: run, model: net, code: run.py}]
"""


class Shelf:
    """A controller that takes everything and remembers it."""

    def __init__(self) -> None:
        self.key = signing.new_key()
        self.objects: dict[str, bytes] = {}
        self.targets = signing.new_targets(self.key, NOW)

    def metadata(self, role: str) -> bytes:
        assert role == "targets"
        return self.targets

    def has_object(self, sha256: str) -> bool:
        return sha256 in self.objects

    def put_object(self, sha256: str, data: bytes) -> None:
        assert sha256_hex(data) == sha256
        self.objects[sha256] = data

    def release(self, manifest_sha256: str, targets: bytes) -> ReleaseView:
        self.targets = targets
        return ReleaseView(1, "tiny", "1.0.0", manifest_sha256, len(self.objects[manifest_sha256]), "", 0.0)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "skill.yaml").write_text(MANIFEST)
    (folder / "run.py").write_text("def run(inputs, model): ...\n")
    (folder / "net.onnx").write_bytes(b"model")
    np.savez(folder / "probe.npz", **{"in.x": np.zeros(1), "out.y": np.zeros(1)})
    build_bundle(folder, tmp_path / "tiny.skb")
    return tmp_path / "tiny.skb"


def test_a_release_is_signed_here_and_lists_the_manifest(bundle: Path, tmp_path: Path) -> None:
    shelf = Shelf()
    signing.save_key(shelf.key, tmp_path / "key.pem")
    done = publish(shelf, bundle, tmp_path / "key.pem", now=lambda: NOW)
    listed = signing.list_releases(shelf.targets)
    assert listed["skills/tiny/1.0.0.json"].sha256 == done.release.manifest_sha256
    assert done.uploaded_bytes == sum(len(data) for data in shelf.objects.values())
    assert done.known_bytes == 0


def test_what_the_controller_has_is_not_sent_again(bundle: Path, tmp_path: Path) -> None:
    shelf = Shelf()
    signing.save_key(shelf.key, tmp_path / "key.pem")
    first = publish(shelf, bundle, tmp_path / "key.pem", now=lambda: NOW)
    again = publish(shelf, bundle, tmp_path / "key.pem", now=lambda: NOW)
    assert (again.uploaded_bytes, again.known_bytes) == (0, first.uploaded_bytes)


def test_without_a_key_nothing_is_sent(bundle: Path, tmp_path: Path) -> None:
    shelf = Shelf()
    with pytest.raises(NotFound, match="--key"):
        publish(shelf, bundle, tmp_path / "absent.pem")
    assert not shelf.objects
