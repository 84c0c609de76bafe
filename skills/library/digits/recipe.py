"""Rebuild the digits skill from scikit-learn's 1,797 handwritten digits: train, compress, verify, write golden outputs.

    python recipe.py --out FOLDER [--json] [--calibration wrong]

FOLDER becomes a complete skill folder: models/, probe.npz, the control code, and beside them heldout.npz and the
reports of both compressions. `--calibration wrong` makes the classic mistake, calibrating on inputs scaled by 1/16
once more: the model loads and runs, and answers wrongly.
"""

import argparse
import dataclasses
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from compress.report import Report

HERE = Path(__file__).parent
CODE = ("skill.yaml", "classify.py", "recipe.py")
HELD_OUT = 600  # of 1,797: enough to prove a drop of at most a point
EPOCHS = 8
BATCH = 32
LEARNING_RATE = 3e-3
MAX_DROP = 1.0
TIME_BUDGET_S = 45.0  # enough for two rungs of training on two cores
GOLDEN = 16
DEVICE = "x86-avx2"  # 7-bit weights run right on every x86 and on aarch64
LITERT_DEVICE = "arm64-litert"

Calibration = Literal["right", "wrong"]
Progress = Callable[[str, float, str], None]  # what is being done, how far (0..1), the best so far in words
Array = NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Trained:
    """A float net as ONNX, the data with its split, and how it does on the held-out digits (a fraction)."""

    onnx: bytes
    x: Array  # held-out pictures as the net takes them
    y: Array
    x_train: Array
    y_train: Array
    image: Array  # held-out pictures as the skill takes them
    accuracy: float


@dataclasses.dataclass(frozen=True, slots=True)
class Built:
    """Everything that the recipe made; the models as bytes, and the report of each compression."""

    trained: Trained
    onnx: bytes
    tflite: bytes
    report: "Report"
    litert_report: "Report"


def quiet(_stage: str, _share: float, _best: str) -> None:
    """Say nothing."""


def digits(seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """Return pictures (N x 8 x 8, 0..16) and labels to train on, then those held out; the split is fixed by `seed`."""
    from sklearn.datasets import load_digits

    pack = load_digits()
    order = np.random.default_rng(seed).permutation(len(pack.target))
    image, label = pack.images[order].astype(np.uint8), pack.target[order].astype(np.int64)
    return image[HELD_OUT:], label[HELD_OUT:], image[:HELD_OUT], label[:HELD_OUT]


def network() -> Any:
    """Return the untrained net: 32 and 64 channels, one residual block, 111,338 weights."""
    import torch
    from torch import nn

    def layer(into: int, out: int, *, relu: bool = True) -> list[Any]:
        found: list[Any] = [nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)]
        return [*found, nn.ReLU()] if relu else found

    class Residual(nn.Module):  # type: ignore[misc, unused-ignore]
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.body = nn.Sequential(*layer(channels, channels), *layer(channels, channels, relu=False))

        def forward(self, x: Any) -> Any:
            return torch.relu(x + self.body(x))

    return nn.Sequential(
        *layer(1, 32), nn.MaxPool2d(2), *layer(32, 64), Residual(64), nn.MaxPool2d(2), *layer(64, 64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def train(progress: Progress = quiet, seed: int = 0, epochs: int = EPOCHS) -> Trained:
    """Train the net (some seconds on two cores) and export it to ONNX."""
    import torch

    from compress.model import export

    prepare = _control_code().prepare
    image, label, held_image, held_label = digits(seed)
    x, held_x = prepare(image), prepare(held_image)
    # One thread: the net is too small to gain by two, and torch's threads spin for minutes where other programs want the cores.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    chance = np.random.default_rng(seed)
    net = network()
    optimiser = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=0.05)
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
    accuracy = 0.0
    for epoch in range(epochs):
        net.train()
        order = chance.permutation(len(x))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            loss = torch.nn.functional.cross_entropy(
                net(torch.from_numpy(_shifted(x[rows], chance))), torch.from_numpy(label[rows]), label_smoothing=0.05
            )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
        net.eval()
        with torch.no_grad():
            accuracy = float((net(torch.from_numpy(held_x)).argmax(1).numpy() == held_label).mean())
        progress("training", (epoch + 1) / epochs, f"{accuracy:.1%} of {len(held_x)} held-out digits right")
    model = export(net, "the digits net", None, held_x)
    return Trained(model, held_x, held_label, x, label, held_image, accuracy)


def shrink(
    trained: Trained,
    out: Path,
    progress: Progress = quiet,
    calibration: Calibration = "right",
    device: str = DEVICE,
    seed: int = 0,
) -> "Report":
    """Compress within one point on the held-out digits into the folder `out`; see `compress.compress`."""
    from compress import compress

    source = out.with_name(out.name + ".fp32.onnx")
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_bytes(trained.onnx)
    x_train = trained.x_train if calibration == "right" else trained.x_train / np.float32(16)
    data = {"x": trained.x, "y": trained.y, "x_train": x_train, "y_train": trained.y_train}
    try:
        return compress(
            source, data, out, device=device, max_drop=MAX_DROP, seed=seed, progress=progress, time_budget=TIME_BUDGET_S
        )
    finally:
        source.unlink()


def build(out: Path, progress: Progress = quiet, calibration: Calibration = "right", seed: int = 0) -> Built:
    """Make `out` a complete skill folder."""
    trained = train(progress, seed)
    return assemble(trained, out, progress, calibration, seed)


def assemble(
    trained: Trained, out: Path, progress: Progress = quiet, calibration: Calibration = "right", seed: int = 0
) -> Built:
    """Compress a trained net for both runtimes and write the skill folder."""
    report = shrink(trained, out / "reports" / "onnxruntime", progress, calibration, DEVICE, seed)
    litert_report = shrink(trained, out / "reports" / "litert", progress, calibration, LITERT_DEVICE, seed)
    small = (out / "reports" / "onnxruntime" / "model.onnx").read_bytes()
    lite = (out / "reports" / "litert" / "model.tflite").read_bytes()
    models = out / "models"
    models.mkdir(exist_ok=True)
    (models / "digits-int8.onnx").write_bytes(small)
    (models / "digits-fp32.onnx").write_bytes(trained.onnx)
    (models / "digits-int8.tflite").write_bytes(lite)
    np.savez_compressed(out / "heldout.npz", image=trained.image, y=trained.y)
    _write_probe(trained, out)
    for name in CODE:
        if out.resolve() != HERE.resolve():
            shutil.copyfile(HERE / name, out / name)
    return Built(trained, small, lite, report, litert_report)


def _write_probe(trained: Trained, out: Path) -> None:
    """Golden outputs come from the float net, for the pictures that it is surest of, at least one of each digit."""
    from skills import ort

    session = ort.session(trained.onnx)
    code = _control_code()
    answer = code.classify({"image": trained.image}, lambda x: session.run({"x": x}))
    sure = np.argsort(-answer["confidence"], kind="stable")
    sure = sure[answer["digit"][sure] == trained.y[sure]]
    first = [int(sure[answer["digit"][sure] == digit][0]) for digit in range(10)]
    rest = [int(row) for row in sure if int(row) not in first]
    rows = sorted(first + rest[: GOLDEN - len(first)])
    np.savez_compressed(
        out / "probe.npz",
        **{"in.image": trained.image[rows], **{f"out.{name}": value[rows] for name, value in answer.items()}},
    )


def _control_code() -> Any:
    """Load classify.py by path: a skill's folder is no package."""
    spec = importlib.util.spec_from_file_location("digits_classify", HERE / "classify.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(HERE / "classify.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _shifted(x: Array, chance: np.random.Generator) -> Array:
    """Move each picture by up to one of its own pixels (two of the net's) in each direction."""
    moved = np.zeros_like(x)
    size = x.shape[-1]
    for row, (down, right) in enumerate(chance.integers(-2, 3, (len(x), 2))):
        moved[row, :, max(0, down) : size + min(0, down), max(0, right) : size + min(0, right)] = x[
            row, :, max(0, -down) : size - max(0, down), max(0, -right) : size - max(0, right)
        ]
    return moved


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe as a program; returns the exit code."""
    from skills.errors import SkerryError

    parser = argparse.ArgumentParser(description="Rebuild the digits skill: train, compress, verify.")
    parser.add_argument("--out", type=Path, required=True, help="the skill folder to make")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end and no progress")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--calibration", choices=("right", "wrong"), default="right", help="wrong: a model that fails its probe"
    )
    given = parser.parse_args(arguments)
    last = ""

    def show(stage: str, share: float, best: str) -> None:
        nonlocal last
        line = f"{stage}: {best}" if best else stage
        if line != last:
            print(f"[{share:4.0%}] {line}", flush=True)
            last = line

    try:
        built = build(given.out, quiet if given.json else show, given.calibration, given.seed)
    except SkerryError as error:
        print(f"recipe.py: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("recipe.py: interrupted", file=sys.stderr)
        return 130
    reports = {"onnxruntime": built.report.to_json(), "litert": built.litert_report.to_json()}
    if given.json:
        print(json.dumps({"accuracy": built.trained.accuracy, "n_held_out": len(built.trained.y), "reports": reports}))
        return 0
    for name, report in (("onnxruntime", built.report), ("litert", built.litert_report)):
        low, high = report.drop_ci95
        print(
            f"{name}: {report.baseline.metric:.2%} -> {report.result.metric:.2%} of {report.n_report} held-out digits, drop "
            f"{report.drop:+.2f} points (95 % {low:+.2f} to {high:+.2f}, {report.verdict}); {report.ratio_file:.1f}x smaller, "
            f"{report.speedup:.2f}x as fast as float onnxruntime"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
