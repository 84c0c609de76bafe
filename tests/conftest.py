"""What all tests share: where the reference models are, and a clean environment."""

import os
import random
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from skills.bundle import BundleFile

ROOT = Path(__file__).parent.parent
IN_CI = os.environ.get("CI") == "true"


def reference_folder() -> Path:
    return Path(os.environ.get("SKERRY_REFERENCE", ROOT.parent / "shared" / "data"))


@pytest.fixture
def reference() -> Path:
    """The folder of reference models and data; where it is absent a test is listed as not run, and fails in CI."""
    folder = reference_folder()
    if not folder.is_dir():
        message = f"the reference models are not at {folder} (set SKERRY_REFERENCE)"
        if IN_CI:
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the home of the person who runs it."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "SKERRY_URL", "SKERRY_TOKEN", "SKERRY_CA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def small_bundle(tmp_path: Path) -> "Callable[..., BundleFile]":
    """Build a bundle of the skill `tiny`, whose model is only bytes: for whoever delivers and never runs it."""
    from skills.bundle import build_bundle, open_bundle

    def build(
        version: str, model_bytes: int = 100_000, code: str = "def run(inputs, model):\n    return model(**inputs)\n"
    ) -> BundleFile:
        folder = tmp_path / f"tiny-{version}"
        folder.mkdir(exist_ok=True)
        folder.joinpath("model.onnx").write_bytes(random.Random(version).randbytes(model_bytes))  # noqa: S311 - no secret
        folder.joinpath("run.py").write_text(code)
        folder.joinpath("probe.npz").write_bytes(b"probe")
        folder.joinpath("skill.yaml").write_text(TINY_SKILL.format(version=version))
        build_bundle(folder, folder / "tiny.skb")
        return open_bundle(folder / "tiny.skb")

    return build


@pytest.fixture
def csr() -> "Callable[[], str]":
    """Make a new device key each time and return a certificate request for it."""
    return lambda: make_csr()[0]


@pytest.fixture
def new_csr() -> "Callable[[], tuple[str, bytes]]":
    """Make a new device key each time and return (certificate request, private key), both PEM."""
    return make_csr


def make_csr() -> tuple[str, bytes]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "whatever")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return request.public_bytes(Encoding.PEM).decode(), pem


TINY_SKILL = """\
format: skill/v1
name: tiny
version: {version}
inputs: [{{name: x, dtype: FP32, shape: [-1, 4]}}]
outputs: [{{name: y, dtype: FP32, shape: [-1, 2]}}]
models:
  tiny: {{variants: [{{name: float, runtime: onnxruntime, file: model.onnx}}]}}
stages: [{{name: run, model: tiny, code: run.py}}]
"""
