"""Graphs that our own LiteRT writer refuses, by the real litert-torch in its environment. Run by hand: SKERRY_CONVERTERS=1."""

import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress import compress, interpreter
from compress.converters import litert
from compress.passes.canonicalise import canonicalise
from skills import ort

pytestmark = [
    pytest.mark.converters,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.environ.get("SKERRY_CONVERTERS") != "1", reason="run by hand: SKERRY_CONVERTERS=1"),
]
Build = Callable[[str], Any]
CACHE = os.environ.get("XDG_CACHE_HOME", str(Path(pwd.getpwuid(os.getuid()).pw_dir, ".cache")))


@pytest.fixture(autouse=True)
def _real_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environments are kept from one run to the next."""
    monkeypatch.setenv("XDG_CACHE_HOME", CACHE)


@pytest.mark.parametrize(
    ("kind", "refused"), [("transposed", "ConvTranspose"), ("silu", "Sigmoid"), ("lstm", "Transpose")]
)
def test_what_our_writer_refuses_is_written_and_answers_as_the_original(
    kind: str, refused: str, small_net: Build, tmp_path: Path
) -> None:
    net = small_net(kind)
    (tmp_path / "m.onnx").write_bytes(net.model.SerializeToString())
    report = compress(tmp_path / "m.onnx", net.data, tmp_path / "out", device="arm64-litert", max_drop=3.0)
    assert report.verdict != "not_reached"
    (said,) = [note for note in report.details.notes if "litert-torch" in note]
    assert refused in said
    session = interpreter.session((tmp_path / "out" / "model.tflite").read_bytes())
    assert [port.name for port in (*session.inputs, *session.outputs)] == ["x", "logits"]
    got = session.run({"x": net.x})["logits"]
    want = ort.session(net.model.SerializeToString()).run({"x": net.x})["logits"]
    assert (got.argmax(1) == want.argmax(1)).mean() > 0.97
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.97


@pytest.mark.parametrize("kind", ["residual", "transformer"])
def test_layers_of_the_same_shape_keep_their_own_weights(kind: str, small_net: Build) -> None:
    net = small_net(kind)
    model = canonicalise(net.model)
    found = litert.convert(
        model, net.x[:100], lambda _said: None, static=True
    )  # the float file is held against onnxruntime
    want = ort.session(model.SerializeToString()).run({"x": net.x})["logits"]
    for file in (found.weights, found.static):
        assert file is not None
        got = interpreter.session(file).run({"x": net.x})["logits"]
        assert ((got - want) ** 2).mean() < 0.05 * want.var()


def test_a_recipe_writes_it_again(small_net: Build, tmp_path: Path) -> None:
    net = small_net("silu")
    (tmp_path / "m.onnx").write_bytes(net.model.SerializeToString())
    compress(tmp_path / "m.onnx", net.data, tmp_path / "out", device="arm64-litert", max_drop=3.0)
    compress(tmp_path / "m.onnx", net.data, tmp_path / "again", recipe=tmp_path / "out" / "recipe.yaml")
    files = [(tmp_path / folder / "model.tflite").read_bytes() for folder in ("out", "again")]
    assert files[0] == files[1]
