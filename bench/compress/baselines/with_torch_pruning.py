"""torch-pruning, a short fine-tune on the labels, then onnxruntime's tuned static int8.

python with_torch_pruning.py '{"net": N, "weights": W, "model": M, "data": D, "out": FOLDER, "speed_up": 1.7, "cpu_minutes": 5}'

Channels go by group magnitude, ranked over the whole net, until the net has `speed_up` times fewer multiply-accumulates, as
in the tool's own benchmark. The fine-tune ends after so many minutes of one core's time, however busy the machine is.
"""

import json
import math
import sys
import time
from pathlib import Path

import nets
import numpy as np
import torch
import torch_pruning
from torch import nn
from with_onnxruntime import scores, tuned

BATCH = 128
RATE = {"resnet20": 0.02, "resnet56": 0.02, "imu": 0.001}
STEPS = 200  # pruning goes in so many small steps


def prune(module, example, speed_up):
    """Prune in place and return the share of multiply-accumulates and of parameters that are left."""
    before = torch_pruning.utils.count_ops_and_params(module, example)
    pruner = torch_pruning.pruner.BasePruner(
        module, example, importance=torch_pruning.importance.GroupMagnitudeImportance(p=2), global_pruning=True,
        pruning_ratio=1.0, max_pruning_ratio=0.9, iterative_steps=STEPS, ignored_layers=_heads(module), round_to=4,
    )  # fmt: skip
    after = before
    while after[0] * speed_up > before[0] and pruner.current_step < STEPS:
        pruner.step()
        after = torch_pruning.utils.count_ops_and_params(module, example)
    return after[0] / before[0], after[1] / before[1]


def _heads(module):
    return [item for item in module.modules() if isinstance(item, nn.Linear)]


def augmented(x, order):
    """Return a batch of images shifted by up to 4 pixels and mirrored at random; anything else as it is."""
    if x.ndim != 4:
        return x
    x = nn.functional.pad(x, (4, 4, 4, 4))
    down, right = (int(torch.randint(0, 9, (), generator=order)) for _ in range(2))
    x = x[:, :, down : down + 32, right : right + 32]
    return torch.where(torch.rand(len(x), 1, 1, 1, generator=order) < 0.5, x.flip(3), x)


def fine_tune(module, x, y, rate, cpu_seconds):
    """Train with SGD and a cosine schedule over the given time, and return the number of epochs that it was."""
    order = torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    module.train().to(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)
    start, seen = time.process_time(), 0
    while True:
        for rows in torch.randperm(len(x), generator=order).split(BATCH)[:-1]:
            spent = (time.process_time() - start) / cpu_seconds
            if spent >= 1:
                module.eval()
                return seen / len(x)
            optimiser.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * spent)) / 2
            loss = nn.functional.cross_entropy(module(augmented(x[rows], order)), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            seen += len(rows)


def main():
    given = json.loads(sys.argv[1])
    begin, out = time.perf_counter(), Path(given["out"])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with np.load(given["data"]) as data:
        calibrate, x, y = data["calibrate_x"], torch.from_numpy(data["train_x"]), torch.from_numpy(data["train_y"])
    module = nets.make(given["net"], given.get("weights"))
    nets.check_same(module, calibrate[:8], scores(given["model"], calibrate[:8]))
    macs, parameters = prune(module, torch.from_numpy(calibrate[:1]), given["speed_up"])
    epochs = fine_tune(module, x, y, RATE[given["net"]], given["cpu_minutes"] * 60)
    nets.export(module, calibrate, out / "pruned.onnx")
    notes = {"macs": round(macs, 3), "parameters": round(parameters, 3), "epochs": round(epochs, 2)}
    notes |= tuned(out / "pruned.onnx", calibrate, out / "model.onnx")
    (out / "result.json").write_text(json.dumps(notes | {"seconds": round(time.perf_counter() - begin, 1)}))


if __name__ == "__main__":
    main()
