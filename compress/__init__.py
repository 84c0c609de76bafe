"""The workshop: a trained model goes in, the smallest and fastest one that keeps its accuracy comes out, measured.

`compress()` is the whole room's door; everything heavy is imported behind it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from skills.errors import MissingExtra

if TYPE_CHECKING:
    from compress.report import Report

TIME_BUDGET_S = 1800.0  # what training stops at unless said otherwise; what needs none ends sooner

Goal = Literal["size", "latency", "both"]
Progress = Callable[[str, float, str], None]  # what is being done, how far (0..1), the best so far in words


def compress(
    model: object,
    data: object,
    out: Path,
    device: str = "auto",
    max_drop: float = 1.0,
    goal: Goal = "both",
    seed: int = 0,
    progress: Progress | None = None,
    weights: Path | None = None,
    *,
    time_budget: float | None = None,
    teacher: object | None = None,
    recipe: Path | None = None,
    resume: bool = False,
    metric: str | Callable[..., Any] | None = None,
) -> "Report":
    """Compress `model` for `device` within `max_drop` percentage points, and write the folder `out`.

    `model` is an `.onnx` or `.pt2` file, the text `file.py:factory` or `package.module:factory` (with `weights`, a state-dict
    file, if it needs one) or a torch module; `data` an `.npz` file, a folder of class folders with a `data.yaml`, the text
    `file.py:callable`, or a mapping with `x` and, if known, `y`, `x_train`, `y_train`, `groups`, `groups_train`. Without
    labels the metric is agreement with the original; with None as data only the weights are compressed.

    `time_budget` is in seconds (None: `TIME_BUDGET_S`, half an hour). `teacher` is a more accurate model with the same input
    and output, to learn from in place of the original. `recipe` is the `recipe.yaml` of an earlier result: what it says is
    done again, nothing is searched; its budget, goal and seed count, and its target where `device` is "auto". `metric` goes
    before the one that the data names: a name from `compress.metrics.METRICS` or a function of (outputs, y).

    `out` appears whole at the end or not at all; an earlier result there is replaced, what else was put into it
    meanwhile stays. Until then the best so far lies in the hidden folder `.OUT.work` beside it, which stays when the run is
    interrupted: with `resume` the next one goes on there.

    Returns the report even when the budget was missed (`report.verdict == "not_reached"`, `report.reached()` raises):
    the best model found is in `out` all the same.

    Raises:
        UsageError: an argument makes no sense, or `out` holds something that is not an earlier result or cannot be renamed.
        Refused: another run is at work on `out`.
        NotFound: a file, module or profile does not exist.
        FormatError: the model or the data is not what it should be; the sentence says what was found.
        StorageError: the disk is full or refuses; `out` is as it was, unless the sentence says that it is written.
        MissingExtra: a package that the model or the device needs is not installed.
    """
    try:
        from compress.folder import only_run
        from compress.run import run
    except ImportError as error:
        if (error.name or "compress").partition(".")[0] in ("compress", "skills"):
            raise
        raise MissingExtra(f"compression needs {error.name}: pip install 'skerry[compress]'") from None
    asked: dict[str, Any] = {
        "time_budget": time_budget, "teacher": teacher, "recipe": recipe, "resume": resume, "metric": metric,
    }  # fmt: skip
    given = {name: value for name, value in asked.items() if value is not None and value is not False}
    with only_run(Path(out)):
        return run(model, data, out, device, max_drop, goal, seed, progress, weights, **given)
