"""When the compression bench takes an earlier result of ours: only where all that it was made from is as it was."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "compress"


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    beside = {path.stem for path in BENCH.glob("[a-z]*.py")}
    for name in beside:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("candidates")
    for name in beside:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["run.py", "profiles/x86-vnni.yaml", "converters/litert.txt"])
def test_code_profiles_and_pins_count(candidates: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / "compress" / name
    path.parent.mkdir(parents=True)
    path.write_text("channel_block: 16")
    before = candidates.digest(candidates.makers(tmp_path))
    assert candidates.digest(candidates.makers(tmp_path)) == before
    path.write_text("channel_block: 8")
    assert candidates.digest(candidates.makers(tmp_path)) != before


@pytest.mark.parametrize("name", ["torch", "onnxruntime", "onnx", "isa"])
def test_versions_of_what_computes_count(candidates: Any, tmp_path: Path, name: str) -> None:
    found = candidates.makers(tmp_path)
    assert candidates.digest(found) != candidates.digest(found | {name: "another"})
    assert found[name]
