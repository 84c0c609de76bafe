"""Down to a compiled model for an Ethos-U55, by the real Vela in its environment. Run by hand with SKERRY_CONVERTERS=1."""

import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress import compress, interpreter
from skills import ort

pytestmark = [
    pytest.mark.converters,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.environ.get("SKERRY_CONVERTERS") != "1", reason="run by hand: SKERRY_CONVERTERS=1"),
]
Build = Callable[[str], Any]


@pytest.fixture(autouse=True)
def _real_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environments are kept from one run to the next."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path(pwd.getpwuid(os.getuid()).pw_dir, ".cache")))


@pytest.mark.parametrize("kind", ["plain", "residual", "depthwise"])
def test_the_npu_runs_every_operator_and_the_plain_file_lies_beside(
    kind: str, small_net: Build, tmp_path: Path
) -> None:
    net = small_net(kind)
    (tmp_path / "m.onnx").write_bytes(net.model.SerializeToString())
    report = compress(tmp_path / "m.onnx", net.data, tmp_path / "out", device="ethos-u55", max_drop=3.0)
    npu = report.details.npu
    assert npu is not None
    assert npu.share == 1.0
    assert npu.cycles > 0
    assert 0 < npu.sram_kib < 2048
    got = interpreter.session((tmp_path / "out" / "model.tflite").read_bytes()).run({"x": net.x})["logits"]
    want = ort.session(net.model.SerializeToString()).run({"x": net.x})["logits"]
    assert (got.argmax(1) == want.argmax(1)).mean() > 0.97
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.97
    assert b"ethos-u" in (tmp_path / "out" / "model_vela.tflite").read_bytes()
