"""What cutting a model costs: its segments one after the other beside the whole, in turns, one thread.

    python -P bench/segments.py PLAN_FOLDER MODEL.onnx

Prints the milliseconds of both, least and median, and the ratio of the medians.
"""

import sys
from pathlib import Path

import numpy as np

from cloud.tail.pace import example
from skills import ort
from skills.split_plan import load_plan

ROUNDS = 200


def main() -> None:
    folder, model = Path(sys.argv[1]), Path(sys.argv[2])
    plan = load_plan((folder / "split.yaml").read_text())
    chain = ort.chain([folder / one.file for one in plan.segments], [live.name for live in plan.outputs])
    whole, feeds = ort.session(model), example(plan, chain, 0, np.random.default_rng(0))
    times = ort.interleaved({"segments": lambda: chain.run(feeds), "whole": lambda: whole.run(feeds)}, ROUNDS)
    for name, timing in times.items():
        print(f"{name}: least {timing.best_ms:.2f} ms, median {timing.p50_ms:.2f} ms")
    print(f"{len(plan.segments)} segments ÷ whole: {times['segments'].p50_ms / times['whole'].p50_ms:.3f}")


if __name__ == "__main__":
    main()
