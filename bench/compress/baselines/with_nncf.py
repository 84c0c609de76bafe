"""NNCF's post-training quantization of an ONNX model, as it comes or with its accuracy control.

python with_nncf.py '{"model": M, "data": D, "out": FOLDER, "accuracy_control": false, "max_drop": 1.0}'
"""

import json
import sys
import time
from pathlib import Path

import nncf
import numpy as np
import onnx
from with_onnxruntime import scores


def main():
    given = json.loads(sys.argv[1])
    begin, out = time.perf_counter(), Path(given["out"])
    model = onnx.load(given["model"])
    if model.opset_import[0].version < 13:
        model = onnx.version_converter.convert_version(model, 13)
    name = model.graph.input[0].name
    with np.load(given["data"]) as data:
        calibrate, select, labels = data["calibrate_x"], data["select_x"], data["select_y"]
    calibration = nncf.Dataset(range(len(calibrate)), lambda at: {name: calibrate[at : at + 1]})
    if given["accuracy_control"]:
        notes = {"max_drop": given["max_drop"], "validated_on": len(select)}

        def validate(candidate, rows):
            rows = list(rows)
            right = scores(candidate.SerializeToString(), select[rows]).argmax(axis=1) == labels[rows]
            return float(right.mean()), [float(one) for one in right]

        quantized = nncf.quantize_with_accuracy_control(
            model, calibration, nncf.Dataset(range(len(select))), validate, max_drop=given["max_drop"] / 100,
            drop_type=nncf.DropType.ABSOLUTE, subset_size=len(calibrate),
        )  # fmt: skip
    else:
        notes = {}
        quantized = nncf.quantize(model, calibration, subset_size=len(calibrate))
    onnx.save(quantized, out / "model.onnx")
    (out / "result.json").write_text(json.dumps(notes | {"seconds": round(time.perf_counter() - begin, 1)}))


if __name__ == "__main__":
    main()
