"""What compression reports: the checked form of `report.json`, and beside it what the pictures are drawn from."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from skills.errors import NotReached
from skills.wire import Doc, Limits, to_plain

DataLevel = Literal["none", "unlabelled", "calibration", "training"]
"""No data at all; inputs without labels; labelled inputs too few to train on; training data."""


@dataclasses.dataclass(frozen=True, slots=True)
class Baseline:
    """The model that came in. `metric` is a fraction; sizes in bytes; times in milliseconds for one input."""

    metric: float
    bytes_input: Annotated[int, Doc("what the user gave")]
    bytes_file: Annotated[int, Doc("the same without metadata and dead initializers, if that is less")]
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
    harm: Mapping[float, float] = dataclasses.field(default_factory=dict)
    """Width -> distance to the original's answers (KL, see `measure.divergence`) with this layer alone stored so."""


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """A model that was measured on the report part: one trade of size for accuracy. Sizes in bytes, drops as in `Report`."""

    name: str
    bytes_file: int
    bytes_package: int
    drop: float
    drop_ci95: tuple[float, float]
    drop_select: float | None = None
    latency_ms_p50: float | None = None
    chosen: bool = False
    file: str = ""  # inside the result folder; empty where the file was not kept
    least_runtime: str = ""  # as in `Details`
    over: float | None = (
        None  # drop on all parts of the data together, of a file that was passed over for it (`judge.doubted`)
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Moment:
    """What was found so many minutes after the start."""

    minutes: float
    ratio_file: float
    drop_select: float | None
    what: str


@dataclasses.dataclass(frozen=True, slots=True)
class NpuEstimate:
    """What Arm's Vela expects of a model on an Ethos-U: an estimate for one input, not a measurement. Memory in KiB."""

    accelerator: str
    system_config: str
    memory_mode: str
    time_ms: float
    cycles: int
    sram_kib: float
    flash_kib: float
    on_npu: int  # operators
    on_cpu: int
    left_on_cpu: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Return the share of operators that the NPU runs, 0..1."""
        return self.on_npu / max(1, self.on_npu + self.on_cpu)


@dataclasses.dataclass(frozen=True, slots=True)
class Details:
    """What `report.json` has no key for: it is shown in `report.html` and kept in `recipe.yaml` and `lineage.json`.

    `pieces_before` and `pieces_after` are `pieces.pieces` of the two files; `kernels` counts the optimised graph's operators.
    """

    model: str
    model_file: Literal["model.onnx", "model.tflite"]
    max_drop: float
    goal: Literal["size", "latency", "both"]
    seed: int
    layers: tuple[LayerRow, ...]
    kernels: Mapping[str, int]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    samples: Mapping[str, int]  # split -> how many
    data_level: DataLevel = "calibration"
    unit: str = "percentage points"  # of drops; of an unbounded metric: per cent of its value before
    pareto: tuple[Point, ...] = ()
    trail: tuple[Moment, ...] = ()
    time_budget: float | None = None  # seconds
    pieces_before: Mapping[str, int] = dataclasses.field(default_factory=dict)
    pieces_after: Mapping[str, int] = dataclasses.field(default_factory=dict)
    bytes_plain: int | None = None  # the same network as a plain int8 file
    weights: tuple[int, int] | None = None  # trained numbers before and after
    macs: tuple[int, int] | None = None  # multiplications for one input, before and after
    samples_for_proof: int | None = None  # None: none would prove it
    least_runtime: str = ""  # as "onnxruntime 1.23"
    npu: NpuEstimate | None = None
    timed_on: str = ""  # the architecture that the times were taken on, where it is not the target's


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

    @property
    def inputs_made_up(self) -> bool:
        """Return whether there was no data: every figure of accuracy is then of made-up inputs and says nothing of real ones."""
        return self.details.data_level == "none"

    def to_json(self) -> dict[str, object]:
        """Return exactly the keys of `report.json`, all of them."""
        keys = [field.name for field in dataclasses.fields(self) if field.name != "details"]
        values = {key: getattr(self, key) for key in keys}
        values["baseline"], values["result"] = dataclasses.asdict(self.baseline), dataclasses.asdict(self.result)
        values["inputs_made_up"], values["warnings"] = self.inputs_made_up, self.details.warnings
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
