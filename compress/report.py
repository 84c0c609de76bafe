"""What compression reports: the checked form of `report.json`, and beside it what the pictures are drawn from."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from skills.errors import NotReached
from skills.wire import Doc, Limits, to_plain


@dataclasses.dataclass(frozen=True, slots=True)
class Baseline:
    """The model that came in. `metric` is a fraction; sizes in bytes; times in milliseconds for one input."""

    metric: float
    bytes_input: Annotated[int, Doc("what the user gave")]
    bytes_file: Annotated[int, Doc("the same without metadata and dead initializers")]
    bytes_package: Annotated[int, Doc("that file in zstd level 19")]
    latency_ms_p50: float
    latency_ms_p90: float
    load_ms: float


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """The model that came out."""

    metric: float
    bytes_file: int
    bytes_package: int
    latency_ms_p50: float
    latency_ms_p90: float
    load_ms: float


@dataclasses.dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer for the report's pictures: how it computes, how wide it is stored, and what the runtime made of it."""

    name: str
    op: str
    compute: str
    bits: float
    weights: int
    bytes_before: int
    bytes_after: int
    kernel: str = ""
    reason: str = ""
    harm: float | None = None  # distance to the original's answers when this layer alone is stored in 4 bits


@dataclasses.dataclass(frozen=True, slots=True)
class Details:
    """What `report.json` has no key for: it is shown in `report.html` and kept in `recipe.yaml` and `lineage.json`."""

    model: str
    model_file: Literal["model.onnx", "model.tflite"]
    max_drop: float
    goal: str
    seed: int
    layers: tuple[LayerRow, ...]
    kernels: Mapping[str, int]  # operators of the optimised graph, counted
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    samples: Mapping[str, int]  # split -> how many


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """`report.json`: the keys are a public contract, `details` is not among them."""

    metric_name: Annotated[str, Doc("one of compress/metrics.py, or the name of the user's own function")]
    verdict: Literal["proven", "within_budget_unproven", "not_reached"]
    drop: Annotated[float, Doc("percentage points, positive = worse")]
    drop_ci95: Annotated[tuple[float, float], Doc("paired 95 % interval of the drop")]
    n_report: Annotated[int, Limits(min=1)]
    baseline: Baseline
    result: Result
    ratio_file: float
    ratio_package: float
    speedup: float
    device: str
    threads: int
    batch: int
    seconds: float
    details: Details

    def to_json(self) -> dict[str, object]:
        """Return exactly the keys of `report.json`, all of them."""
        keys = [field.name for field in dataclasses.fields(self) if field.name != "details"]
        values = {key: getattr(self, key) for key in keys}
        values["baseline"], values["result"] = dataclasses.asdict(self.baseline), dataclasses.asdict(self.result)
        plain: dict[str, object] = to_plain(values)
        return plain

    def reached(self) -> None:
        """Return if the budget was kept.

        Raises:
            NotReached: it was not; the best model found is written all the same.
        """
        if self.verdict == "not_reached":
            raise NotReached(
                f"the best model found loses {self.drop:.2f} points of {self.metric_name}, "
                f"the budget is {self.details.max_drop:g}: it is written, and marked as not reached"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class RecipeLayer:
    """What was done to one layer."""

    name: str
    compute: Literal["int8", "float"]
    bits: float


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """`recipe.yaml`: what compression did, in the order in which it did it."""

    device: str
    max_drop: float
    goal: str
    seed: int
    passes: tuple[str, ...]
    correct_bias: bool
    layers: tuple[RecipeLayer, ...]
    format: Literal["recipe/v1"] = "recipe/v1"


@dataclasses.dataclass(frozen=True, slots=True)
class Lineage:
    """`lineage.json`: from what, with what and how `model_sha256` was made."""

    model_sha256: str
    parents: Mapping[str, str]  # what went in -> its sha256
    tools: Mapping[str, str]
    seed: int
    device: str
    splits: Mapping[str, int]
    format: Literal["lineage/v1"] = "lineage/v1"
