"""Do again what a recipe says: whether it fits the model, and what it says that went in."""

from collections.abc import Mapping, Sequence
from typing import Any

from compress.channels import branches, groups
from compress.graph import with_biases
from compress.passes.place import find_layers
from compress.pipeline import Pass
from compress.recipe import Recipe, RecipeTraining
from compress.stage import Stage, read
from skills.errors import FormatError

TRAIN = "train"  # stands among a recipe's passes where training was


def check(recipe: Recipe, model: Any) -> None:
    """Hold a recipe against the model that it is to be used on, rewritten by its passes before channels are removed.

    Raises:
        FormatError: it names a layer, group of channels or residual branch that is not there, or leaves a layer out.
    """
    layers = {layer.node for layer in find_layers(model)}
    for name in (*(layer.name for layer in recipe.layers), *(name for row in recipe.training for name in row.bits)):
        if name not in layers:
            raise FormatError(
                f"the recipe is for another model: it names the layer '{name}', which this one does not have"
            )
    missing = sorted(layers - {layer.name for layer in recipe.layers})
    if missing and recipe.layers and not recipe.training:
        raise FormatError(f"the recipe is for another model: it says nothing of the layer '{missing[0]}'")
    if recipe.training:
        _check_removed(recipe.training, with_biases(model))


def _check_removed(rows: Sequence[RecipeTraining], model: Any) -> None:
    sizes, adds = [group.size for group in groups(model)], {branch.add for branch in branches(model)}
    for row in rows:
        for group in row.groups:
            if group.group >= len(sizes) or max(group.kept) >= sizes[group.group]:
                raise FormatError(
                    f"the recipe is for another model: it keeps unit {max(group.kept)} of channel group {group.group}, "
                    "which this one does not have"
                )
        for name in row.branches:
            if name not in adds:
                raise FormatError(f"the recipe is for another model: '{name}' is no residual branch of this one")


def stages(recipe: Recipe) -> tuple[Stage, ...]:
    """Return the stages of training in order."""
    return tuple(map(read, recipe.training))


def before_training(recipe: Recipe, passes: Sequence[Pass]) -> list[Pass]:
    """Return the passes that come before training, or all where there is none, in the recipe's order.

    Raises:
        FormatError: the recipe names a pass that there is none of, or passes and training do not fit.
    """
    named = {step.name: step for step in passes}
    for name in recipe.passes:
        if name not in named and name != TRAIN:
            raise FormatError(f"the recipe asks for the pass '{name}'; there are {', '.join(named)}")
    if (TRAIN in recipe.passes) != bool(recipe.training):
        raise FormatError(f"the recipe has {len(recipe.training)} stages of training and the passes {recipe.passes}")
    before = recipe.passes[: recipe.passes.index(TRAIN)] if recipe.training else recipe.passes
    return [named[name] for name in before]


def differences(recipe: Recipe, inputs: Mapping[str, str]) -> tuple[str, ...]:
    """Return a sentence that says which inputs are not those the recipe was made with, if there are any."""
    names = sorted((recipe.inputs.keys() | inputs.keys()) - {"recipe"})
    others = [name for name in names if recipe.inputs.get(name) != inputs.get(name)]
    return (f"The recipe was made with other inputs, so the bytes differ: {', '.join(others)}.",) if others else ()
