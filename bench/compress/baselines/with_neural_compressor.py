"""neural-compressor's autotune over its static int8 settings for PT2E, the result exported to ONNX.

python with_neural_compressor.py '{"net": N, "weights": W, "model": M, "data": D, "out": FOLDER, "max_drop": 1.0}'
"""

import json
import sys
import time
from pathlib import Path

import nets
import numpy as np
import onnx
import torch
from neural_compressor.common.base_tuning import TuningConfig
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import StaticQuantConfig, autotune
from torchao.quantization.pt2e.constant_fold import constant_fold
from with_onnxruntime import scores

BATCH = 32


def main():
    given = json.loads(sys.argv[1])
    begin, out = time.perf_counter(), Path(given["out"])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with np.load(given["data"]) as data:
        calibrate, select, labels = data["calibrate_x"], data["select_x"], data["select_y"]
    module = nets.make(given["net"], given.get("weights"))
    nets.check_same(module, calibrate[:8], scores(given["model"], calibrate[:8]))
    example = (torch.from_numpy(calibrate[:2]),)
    exported = export(module, example, ({0: torch.export.Dim("n", min=1, max=1024)},))

    def answers(model, x):
        with torch.no_grad():
            return torch.cat([model(torch.from_numpy(x[at : at + BATCH])) for at in range(0, len(x), BATCH)]).numpy()

    def accuracy(model):
        return float((answers(model, select).argmax(axis=1) == labels).mean())

    float_accuracy = accuracy(exported)
    # Its criterion is relative to the float accuracy: this is the same budget in points.
    tolerable = given["max_drop"] / 100 / float_accuracy
    settings = [StaticQuantConfig(act_sym=sym, act_algo=algo) for sym in (False, True) for algo in ("minmax", "kl")]
    best = autotune(
        exported, TuningConfig(config_set=settings, tolerable_loss=tolerable, max_trials=len(settings)), accuracy,
        run_fn=lambda model: answers(model, calibrate), example_inputs=example,
    )  # fmt: skip
    constant_fold(best, lambda node: True)
    notes = {"select_accuracy": [float_accuracy, accuracy(best)]}
    program = torch.onnx.export(best, example, dynamo=True, dynamic_shapes=({0: torch.export.Dim("n")},), verbose=False)
    model = program.model_proto
    for item in (model, model.graph, *model.graph.node):
        del item.metadata_props[:]
    onnx.save(model, out / "model.onnx")
    difference = float(np.abs(scores(out / "model.onnx", calibrate[:8]) - answers(best, calibrate[:8])).max())
    notes |= {"onnx_differs_by": difference, "seconds": round(time.perf_counter() - begin, 1)}
    (out / "result.json").write_text(json.dumps(notes))


if __name__ == "__main__":
    main()
