"""The split planner: where to cut a model between device and cloud, with an honest verdict when cutting does not pay."""

from cloud.split.plan import SplitReport, split
from cloud.split.verdict import LINKS

__all__ = ["LINKS", "SplitReport", "split"]
