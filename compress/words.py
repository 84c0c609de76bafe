"""What a report says in words, the same on the page and in the terminal. Pure."""

import math

from compress.report import DataLevel, Report
from skills.units import readable

METRICS = {
    "top1": "right answers", "macro_f1": "macro F1", "mse": "squared error", "psnr": "PSNR", "roc_auc": "ROC AUC",
    "cosine": "likeness to the original's output", "agreement": "same answer as the original",
}  # fmt: skip
SHARES = ("top1", "agreement", "cosine")  # read as per cent; other metrics as plain numbers
VERDICTS = {
    "proven": ("Proven", "even the worse end of the interval is inside the budget"),
    "within_budget_unproven": (
        "Within the budget, not proven", "the drop measured is inside the budget, the interval reaches beyond it",
    ),
    "not_reached": ("Not reached", "the best model found loses more than the budget allows"),
}  # fmt: skip
NAMES = {
    "plain int8": "every layer in 8 bits",
    "calibrated": "made without training, in stored bits that are expected to take at most half of the budget",
    "safer": "as calibrated, but in more bits, to fall back to",
    "bolder": "the same in fewer bits, a higher number for a smaller file",
    "trained": "made smaller and trained as many times as its number says",
    "float activations": "weights as codes, computed in float",
}  # what is in a candidate's name
BEFORE_IT = "the interval is inside the budget, that of a less compressed model looked at before it is not, and proof stops there"
MADE_UP = "Accuracy not known"  # in place of a verdict's title
FITTED = "samples that nothing was fitted to (only which finished candidate is the result was read off them)"
LEVELS: dict[DataLevel, str] = {
    "none": "",  # the verdict says it
    "unlabelled": "",  # a warning says it
    "calibration": "There was no training data, so nothing was trained; with some (x_train), more can be reached.",
    "training": "",
}


def metric_words(report: Report) -> str:
    """Return what was measured; a user's own metric goes by its name."""
    name = METRICS.get(report.metric_name, report.metric_name)
    return f"{name} (made-up inputs)" if report.inputs_made_up else name


def metric_value(report: Report, value: float) -> str:
    """Return one value of the report's metric."""
    return f"{value:.2%}" if report.metric_name in SHARES else f"{value:.4g}"


def points(report: Report, drop: float) -> str:
    """Return a drop without its sign, in its unit."""
    number = f"{abs(drop):.2f}".removesuffix(".00")
    if report.details.unit != "percentage points":
        return f"{number} %"
    return f"{number} point" if number == "1" else f"{number} points"


def lost(report: Report) -> str:
    """Return what became of accuracy: `0.62 points lost`."""
    if report.inputs_made_up:
        return "accuracy not known"
    if abs(report.drop) < 0.005:
        return "nothing lost"
    return f"{points(report, report.drop)} {'lost' if report.drop > 0 else 'won'}"


def names(report: Report) -> str:
    """Return what the names of the candidates in the list mean, of those that are in it."""
    there = [point.name for point in report.details.pareto]
    return "; ".join(f"{name}: {said}" for name, said in NAMES.items() if any(name in one for one in there))


def passed_over(report: Report, over: float) -> str:
    """Return why a file that keeps the budget on the report part was not taken."""
    return f"not taken: over the budget on all parts of the data together ({points(report, over)})"


def times(ratio: float) -> str:
    """Return a speed-up as people say it."""
    return (
        f"{ratio:.1f} times as fast" if ratio >= 1.05 else "as fast" if ratio >= 0.98 else f"{ratio:.2f} times as fast"
    )


def timed(report: Report) -> str:
    """Return how and on what the times were taken."""
    on = report.details.timed_on
    where = f"on this {on} machine, not on {report.device}" if on else report.device
    threads = "1 thread" if report.threads == 1 else f"{report.threads} threads"
    return f"{threads}, batch {report.batch}, {where}"


def headline(report: Report) -> str:
    """Return in one sentence what came in and what came out."""
    before, after = report.baseline, report.result
    return (
        f"{readable(before.bytes_file)} came in, {readable(after.bytes_file)} came out: {report.ratio_file:.1f} times smaller "
        f"and {times(report.speedup)}{'' if report.inputs_made_up else f', {lost(report)}'}."
    )


def title(report: Report) -> str:
    """Return the verdict in a few words; without data there is one only where even made-up inputs are answered otherwise."""
    return MADE_UP if report.inputs_made_up and report.verdict != "not_reached" else VERDICTS[report.verdict][0]


def meaning(report: Report) -> str:
    """Return what the verdict rests on and what would make it firmer."""
    low, high = report.drop_ci95
    if report.inputs_made_up:
        said = sense(report)
        return f"{said[0].upper()}{said[1:]}."
    return (
        f"Measured on {report.n_report:,} {FITTED}, the drop is {report.drop:+.2f} with a 95 % "
        f"interval from {low:+.2f} to {high:+.2f} {report.details.unit}; the budget is {report.details.max_drop:g}: "
        f"{sense(report)}.{proof(report)}"
    )


def sense(report: Report) -> str:
    """Return why the verdict is what it is, without a capital and a full stop."""
    if report.inputs_made_up:
        moved = f"the drop in answers to {report.n_report:,} made-up inputs is {report.drop:+.2f} {report.details.unit}"
        return f"no data was given, so only the weights were compressed; {moved}, which says nothing about real ones"
    if report.verdict == "within_budget_unproven" and report.drop_ci95[1] <= report.details.max_drop:
        return BEFORE_IT
    return VERDICTS[report.verdict][1]


def proof(report: Report) -> str:
    """Return how many samples would prove an unproven drop, as a sentence behind another."""
    if report.verdict != "within_budget_unproven" or report.inputs_made_up:
        return ""
    needed = report.details.samples_for_proof
    if needed is None:
        return " At exactly this drop no number of samples would prove it."
    return f" With about {_round_up(needed):,} samples that behave like these it would be proven."


def _round_up(count: int) -> int:
    """Return a number of samples with two digits that count."""
    step = int(10 ** max(0, len(str(count)) - 2))
    return math.ceil(count / step) * step
