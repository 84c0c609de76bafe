"""onnxruntime's own static int8: as it comes, or as an expert would set it for x86.

python with_onnxruntime.py '{"model": M, "data": D, "out": FOLDER, "tuned": true}'
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

BATCH = 16
HISTOGRAM_SAMPLES = 128  # Entropy and Percentile hold every activation of every sample in memory
WAYS = (
    ("MinMax", CalibrationMethod.MinMax, {}),
    ("Entropy", CalibrationMethod.Entropy, {}),
    ("Percentile 99.99", CalibrationMethod.Percentile, {"CalibPercentile": 99.99}),
    ("Percentile 99.999", CalibrationMethod.Percentile, {"CalibPercentile": 99.999}),
)


class Reader(CalibrationDataReader):
    """Feeds `x` in batches."""

    def __init__(self, name, x, batch):
        self.feeds = iter([{name: x[at : at + batch]} for at in range(0, len(x), batch)])

    def get_next(self):
        return next(self.feeds, None)


def session(model):
    """Load a model on one CPU thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def scores(model, x):
    """Return the first output for all of `x`."""
    loaded = session(model)
    name = loaded.get_inputs()[0].name
    return np.concatenate([loaded.run(None, {name: x[at : at + 64]})[0] for at in range(0, len(x), 64)])


def divergence(p, q):
    """Return the mean Kullback-Leibler divergence of two sets of class scores."""

    def log_softmax(z):
        z = z.astype(np.float64) - z.max(axis=1, keepdims=True)
        return z - np.log(np.exp(z).sum(axis=1, keepdims=True))

    p, q = log_softmax(p), log_softmax(q)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def default(model, x, out):
    """Quantize with every default: S8S8 QDQ, one scale a tensor, MinMax."""
    name = session(model).get_inputs()[0].name
    quantize_static(str(model), str(out), Reader(name, x, BATCH))
    return {"calibration": "MinMax", "weights": "S8 per tensor", "activations": "S8"}


def tuned(model, x, out):
    """Quantize U8S8 QDQ per channel after pre-processing; the calibration nearest to the float net on `x` is kept."""
    name = session(model).get_inputs()[0].name
    wanted = scores(model, x)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared.onnx")
        quant_pre_process(str(_new_opset(model, Path(folder, "new.onnx"))), str(prepared))
        best = None
        for way, method, extra in WAYS:
            streams = method is CalibrationMethod.MinMax
            some = x if streams else x[:HISTOGRAM_SAMPLES]
            batch = BATCH if streams else len(some)  # the histograms need batches of one size
            path = Path(folder, f"{way}.onnx")
            quantize_static(
                str(prepared), str(path), Reader(name, some, batch), per_channel=True, activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8, calibrate_method=method, extra_options=extra,
            )  # fmt: skip
            found[way] = divergence(wanted, scores(path, x))
            if best is None or found[way] < found[best]:
                best = way
                Path(out).write_bytes(path.read_bytes())
    return {"calibration": best, "weights": "S8 per channel", "activations": "U8", "divergence": found}


def _new_opset(model, path):
    """Write `model` in opset 13 or later, which per-channel scales need."""
    loaded = onnx.load(model)
    version = next(item.version for item in loaded.opset_import if item.domain in ("", "ai.onnx"))
    if version < 13:
        loaded = onnx.version_converter.convert_version(loaded, 13)
    onnx.save(loaded, path)
    return path


def main():
    given = json.loads(sys.argv[1])
    begin, out = time.perf_counter(), Path(given["out"])
    with np.load(given["data"]) as data:
        x = data["calibrate_x"]
    notes = (tuned if given["tuned"] else default)(given["model"], x, out / "model.onnx")
    (out / "result.json").write_text(json.dumps(notes | {"seconds": round(time.perf_counter() - begin, 1)}))


if __name__ == "__main__":
    main()
