"""onnxruntime on the CPU, through its one door on the ground."""

from pathlib import Path

from edge_agent.runtimes import LoadedModel
from skills import ort


def warm() -> str:
    """Import onnxruntime and return its version."""
    return ort.version()


def load(path: Path) -> LoadedModel:
    """Load a model with one thread."""
    return ort.session(path, threads=1)
