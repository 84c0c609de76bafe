"""What `skerry compress` makes of the reference models: size, speed and accuracy, each against the float original.

    SKERRY_REFERENCE=../shared/data python bench/reference_models.py [--only NAME ...] [--json]

The reference folder brings the models, the data and a `load.py` that reads them. Speed is interleaved with the original on
onnxruntime, one thread; a drop is in percentage points on samples that the search never saw.
"""

import argparse
import importlib.util
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from compress import compress

REFERENCE = Path(os.environ.get("SKERRY_REFERENCE", Path(__file__).parents[2] / "shared" / "data"))
MODELS = {
    "ResNet-20, CIFAR": "cifar10jpeg/resnet20_cifar10jpeg.onnx",
    "ResNet-56, CIFAR": "cifar10jpeg/resnet56_cifar10jpeg.onnx",
    "EfficientNet-Lite0, ImageNet sample": "imagenet/efficientnet_lite0.onnx",
    "DS-CNN, keywords": "mlperf_tiny/kws_dscnn.onnx",
    "watch IMU CNN": "watch_imu/har_watch_cnn.onnx",
}


def data_of(name: str, load: Any) -> dict[str, Any]:
    """Return the arrays that `compress` is given for a model."""
    if "CIFAR" in name:
        x, y = load.cifar("test5000")
        x_train, y_train = load.cifar("train10000")
        return {"x": x, "y": y, "x_train": x_train, "y_train": y_train}
    if "IMU" in name:
        (x, y), (x_train, y_train) = load.imu(test=True), load.imu(test=False)
        return {"x": x, "y": y, "x_train": x_train, "y_train": y_train}
    x, y = load.imagenet() if "ImageNet" in name else load.keywords()
    return {"x": x, "y": y}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    spec = importlib.util.spec_from_file_location("load", REFERENCE / "load.py")
    if spec is None or spec.loader is None or not (REFERENCE / "load.py").is_file():
        parser.error(f"no load.py in {REFERENCE}: set SKERRY_REFERENCE")
    load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    found = {}
    for name in given.only:
        with tempfile.TemporaryDirectory(prefix="skerry-bench-") as folder:
            begin = time.perf_counter()
            report = compress(REFERENCE / MODELS[name], data_of(name, load), Path(folder) / "out")
            found[name] = {**report.to_json(), "wall_s": round(time.perf_counter() - begin, 1)}
    if given.json:
        print(json.dumps({"machine": platform.platform(), "models": found}, indent=2))
        return
    print("| model | file | package | speed | drop, points (95 %) | verdict | s |\n|---|---|---|---|---|---|---|")
    for name, row in found.items():
        low, high = row["drop_ci95"]
        print(
            f"| {name} | {row['ratio_file']:.2f}× | {row['ratio_package']:.2f}× | {row['speedup']:.2f}× "
            f"| {row['drop']:+.2f} ({low:+.2f} … {high:+.2f}) | {row['verdict']} | {row['wall_s']:.0f} |"
        )


if __name__ == "__main__":
    main()
