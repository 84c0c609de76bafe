import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def judge():
    path = Path(__file__).parents[2] / "bench" / "compress" / "judge.py"
    spec = importlib.util.spec_from_file_location("bench_judge", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def entry(judge, name, file, lost=0.0, speed=None):
    return judge.Entry(name, name, file, file, 0.9, judge.Interval(lost, lost - 0.5, lost + 0.5), speed=speed)


def test_a_baseline_outside_the_budget_need_not_be_beaten_in_size(judge):
    ours = entry(judge, "ours", 100)
    assert judge.smallest(ours, [entry(judge, "tiny", 50, lost=1.1), entry(judge, "big", 200)]).holds
    assert not judge.smallest(ours, [entry(judge, "tiny", 50, lost=1.0)]).holds
    assert judge.smallest(ours, [entry(judge, "tiny", 50, lost=1.1)]).holds is None


def test_a_result_outside_the_budget_is_never_the_smallest(judge):
    assert not judge.smallest(entry(judge, "ours", 100, lost=1.2), [entry(judge, "big", 200)]).holds


def test_a_baseline_is_covered_by_a_smaller_point_whose_interval_reaches_no_loss(judge):
    baseline = entry(judge, "other", 200)
    near, far = judge.Interval(0.4, -0.1, 0.9), judge.Interval(0.4, 0.1, 0.7)
    assert judge.covered([(baseline, [(100, near)])]).holds
    assert not judge.covered([(baseline, [(100, far)])]).holds
    assert not judge.covered([(baseline, [(200, near)])]).holds


def test_pruning_asks_for_more_speed_and_nothing_may_fall_below_float(judge):
    tuned = entry(judge, judge.TUNED, 200, speed=2.0)
    ours = entry(judge, "ours", 100, speed=2.1)
    assert judge.fast_enough(ours, [tuned], pruned=False).holds
    assert not judge.fast_enough(ours, [tuned], pruned=True).holds
    slow = entry(judge, judge.TUNED, 200, speed=0.8)
    assert not judge.fast_enough(entry(judge, "ours", 100, speed=0.9), [slow], pruned=False).holds
