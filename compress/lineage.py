"""`lineage.json`: from what, with what and how a compressed model was made."""

import dataclasses
import platform
import sys
from collections.abc import Mapping
from typing import Literal

import numpy as np

from compress.data import Data, Splits, present
from skills import ort
from skills.files import sha256_hex


@dataclasses.dataclass(frozen=True, slots=True)
class Lineage:
    """`parents` are hashes of all that went in; `rows` those of which of the data's rows each split has."""

    model_sha256: str
    parents: Mapping[str, str]  # model, teacher, recipe, profile, data.x, data.y, … -> sha256
    tools: Mapping[str, str]
    seed: int
    device: str
    splits: Mapping[str, int]  # split -> how many samples
    rows: Mapping[str, str] = dataclasses.field(default_factory=dict)  # split -> sha256, see `Splits.hashes`
    trained_on: str = ""  # what training computed on, and in which numbers; empty where nothing was trained
    format: Literal["lineage/v1"] = "lineage/v1"


def lineage(
    model_sha256: str,
    parents: Mapping[str, str],
    splits: Splits | None,
    seed: int,
    device: str,
    converters: Mapping[str, str] | None = None,
    trained_on: str = "",
) -> Lineage:
    """Return the lineage of the model with this hash; `splits` is None where there was no data.

    `converters` are the versions of tools that ran in an environment of their own.
    """
    counts = {} if splits is None else {name: len(part) for name, part in splits.parts().items()}
    rows = {} if splits is None else splits.hashes()
    return Lineage(model_sha256, parents, tools() | dict(converters or {}), seed, device, counts, rows, trained_on)


def parents(data: Data, **files: str | None) -> dict[str, str]:
    """Return the hashes of what went in: `files` by name (those that are None are left out), and each array of the data.

    An array's hash is that of its dtype and shape as NumPy writes them, a zero byte, and its values row by row.
    """
    found = {name: digest for name, digest in files.items() if digest is not None}
    if not data.synthetic:
        for name, array in present(data).items():
            head = f"{array.dtype.str} {array.shape}".encode() + b"\0"
            found[f"data.{name}"] = sha256_hex(head + np.ascontiguousarray(array).tobytes())
    return found


def tools() -> dict[str, str]:
    """Return the versions of everything that had a hand in it, those of packages only if they were really imported."""
    known = ground()
    for name in ("torch", "ai_edge_litert", "neural_compressor", "PIL"):
        if name in sys.modules:
            known[name] = str(getattr(sys.modules[name], "__version__", ""))
    return known


def ground() -> dict[str, str]:
    """Return the versions of what every run uses: the same in each process of an installation."""
    import onnx

    import skills

    return ort.versions() | {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnx": onnx.__version__,
        "skerry": getattr(skills, "__version__", ""),
    }
