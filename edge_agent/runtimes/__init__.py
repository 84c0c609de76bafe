"""Model runtimes behind one Protocol. A vendor's runtime is one more module here, and the only door to that vendor's code."""

import importlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from skills.errors import MissingExtra

if TYPE_CHECKING:
    from numpy.typing import NDArray

DISTRIBUTIONS = {"onnxruntime": ("onnxruntime",), "litert": ("ai-edge-litert", "tflite-runtime")}


class LoadedModel(Protocol):
    """A model that is ready to run; it belongs to one process and one thread."""

    def run(self, feeds: Mapping[str, "NDArray[Any]"]) -> dict[str, "NDArray[Any]"]:
        """Run once; outputs by name.

        Raises:
            FormatError: the arrays do not fit the model.
        """


class Runtime(Protocol):
    """What each module in this package offers."""

    def warm(self) -> str:
        """Import the runtime and return its version.

        Raises:
            MissingExtra: it is not installed.
        """

    def load(self, path: Path) -> LoadedModel:
        """Load a model file with one thread.

        Raises:
            FormatError: the runtime cannot load it.
        """


def door(name: str) -> Runtime:
    """Return the runtime called `name`."""
    return cast("Runtime", importlib.import_module(f"edge_agent.runtimes.{name}"))


def warm(name: str) -> str | None:
    """Import a runtime and return its version, or None when it is not there."""
    try:
        return door(name).warm()
    except (MissingExtra, ImportError):
        return None


def installed(allowed: tuple[str, ...]) -> dict[str, str]:
    """Return the version of each allowed runtime that is installed, without importing any."""
    found = {}
    for name in allowed:
        for distribution in DISTRIBUTIONS.get(name, ()):
            try:
                found[name] = importlib.metadata.version(distribution)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return found
