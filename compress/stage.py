"""One rung of training as a value: what it removed, how narrow it stored, how it trained; and the same in a recipe."""

import dataclasses
from collections.abc import Mapping

from compress.channels import Shrink
from compress.recipe import RecipeGroup, RecipeTraining
from compress.train import Settings


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """What one rung did, complete enough to do it again."""

    shrink: Shrink
    bits: Mapping[str, float]  # layer → width, for those narrower than 8
    settings: Settings
    views: int
    seconds: float = 0.0


def write(at: int, stage: Stage) -> RecipeTraining:
    """Return the stage of rung number `at` as a recipe has it."""
    settings = stage.settings
    ended = settings.ends()
    return RecipeTraining(
        f"rung {at + 1}", ended, settings.batch, settings.rate,
        planned=settings.steps if ended < settings.steps else None, views=stage.views,
        temperature=settings.temperature, labels=settings.labels, decay=settings.decay, threads=settings.threads,
        seed=settings.seed, bits={node: float(width) for node, width in stage.bits.items()}, branches=stage.shrink.without,
        groups=tuple(RecipeGroup(number, tuple(kept)) for number, kept in sorted(stage.shrink.keep.items())),
    )  # fmt: skip


def read(row: RecipeTraining) -> Stage:
    """Return the stage that a recipe's row stands for."""
    settings = Settings(
        row.steps if row.planned is None else row.planned, row.rate, row.batch, row.temperature, row.labels, row.decay,
        row.threads, row.seed, stop=None if row.planned is None else row.steps,
    )  # fmt: skip
    return Stage(Shrink({group.group: group.kept for group in row.groups}, row.branches), row.bits, settings, row.views)
