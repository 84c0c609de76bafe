"""Real trained nets through the workshop. The bench goes deeper; here it is held that no promise breaks."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from compress import compress

pytestmark = [pytest.mark.reference, pytest.mark.timeout(400)]

BUDGET_S = 90.0  # the bench has an hour


def load(reference: Path) -> Any:
    spec = importlib.util.spec_from_file_location("reference_load", reference / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_resnet20_keeps_its_accuracy_and_is_never_slower(reference: Path, tmp_path: Path) -> None:
    data = load(reference)
    (x, y), (x_train, y_train) = (
        (images[::stride], labels[::stride])  # both sets lie class after class
        for (images, labels), stride in ((data.cifar("test5000"), 2), (data.cifar("train10000"), 10))
    )
    report = compress(
        reference / "cifar10jpeg" / "resnet20_cifar10jpeg.onnx",
        {"x": x, "y": y, "x_train": x_train, "y_train": y_train},
        tmp_path / "out",
        time_budget=BUDGET_S,
    )
    assert report.verdict != "not_reached"
    assert report.drop <= 1.0
    assert report.ratio_file > 5
    assert report.speedup > 0.95
    first, *others = (
        report.details.layers
    )  # a machine may have no fast int8 kernel for three channels: the guard raced it
    assert first.compute == "float" or first.kernel == "QLinearConv"
    assert all(row.kernel.startswith("QLinear") or row.kernel == "QGemm" for row in others)


def test_a_keyword_net_with_depthwise_layers_is_never_slower(reference: Path, tmp_path: Path) -> None:
    x, y = load(reference).keywords()
    report = compress(reference / "mlperf_tiny" / "kws_dscnn.onnx", {"x": x, "y": y}, tmp_path / "out")
    assert report.verdict != "not_reached"
    assert report.ratio_file > 4.5
    assert report.speedup > 0.9


def test_a_watch_net_in_one_dimension_is_small_and_fast(reference: Path, tmp_path: Path) -> None:
    data = load(reference)
    (x, y), (x_train, y_train) = data.imu(test=True), data.imu(test=False)
    report = compress(
        reference / "watch_imu" / "har_watch_cnn.onnx",
        {"x": x, "y": y, "x_train": x_train, "y_train": y_train},
        tmp_path / "out",
        time_budget=BUDGET_S,
    )
    assert report.drop <= 1.0
    assert report.ratio_file > 5
    assert report.speedup > 0.95
