"""What stays out of a process, and who may not share our names. Each check runs in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "torch", "onnx", "onnxruntime", "numpy", "grpc", "google.protobuf", "sqlalchemy", "fastapi", "uvicorn", "httpx", "typer",
    "rich", "tuf", "pydantic", "PIL", "ai_edge_litert", "sklearn", "skimage",
}  # fmt: skip
GROUND = (
    "errors", "wire", "files", "manifest", "resolve", "bundle", "signing", "desired", "report", "topics", "messaging", "mqtt",
    "mqtt_fake", "coding", "network", "split_plan", "split", "zstd", "ort", "codec", "oip", "profile", "timer", "units",
    "strangers",
)  # fmt: skip


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", GROUND)
def test_a_ground_module_imports_nothing_heavy(module: str) -> None:
    assert not loaded_by(f"import skills.{module}") & HEAVY


def test_the_supervisor_carries_no_heavy_package() -> None:
    # cryptography and paho are its own; everything else waits in the zygote, the trust check or the link.
    assert not loaded_by("import edge_agent.__main__, edge_agent.agent, edge_agent.serve, skills.mqtt") & HEAVY


def test_the_command_line_starts_without_the_workshop_and_the_controller() -> None:
    assert not loaded_by("import cloud.cli") & (HEAVY - {"typer", "rich"})


def test_a_plan_is_made_without_torch() -> None:
    assert "torch" not in loaded_by("import compress.passes.canonicalise, cloud.split.plan")


def test_telemetry_of_onnxruntime_is_off_before_it_is_imported() -> None:
    code = (
        "import os; os.environ.pop('ORT_DISABLE_TELEMETRY', None); from skills import ort; ort.versions(); "
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["1"]


def test_a_namesake_that_owns_one_of_our_packages_is_named_and_refused(tmp_path: Path) -> None:
    info = tmp_path / "cloud_toys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cloud-toys\nVersion: 1.0\n")
    (info / "RECORD").write_text("cloud/__init__.py,,\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); from skills import strangers; strangers.check()"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "the distribution 'cloud-toys' owns the package 'cloud'" in done.stderr
