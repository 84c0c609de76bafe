"""`recipe.yaml`: what compression did, complete enough to do it again without searching."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from compress.images import Preprocessing
from compress.scheme import Scheme
from skills.files import read_bytes
from skills.profile import Profile
from skills.wire import Doc, Limits, decode_yaml, encode_yaml

MAX_BYTES = 8 << 20
HEADER = """What `skerry compress` did. The same model and data with --recipe FILE give the same bytes again, without a search;
another model of the same architecture, such as one trained anew, is treated in the same way."""

Sha256 = Annotated[str, Limits(pattern="[0-9a-f]{64}", hint="64 hexadecimal digits")]
WIDTHS = (32, 8, 4, 3, 2, 1.6)
Count = Annotated[int, Limits(min=0)]


@dataclasses.dataclass(frozen=True, slots=True)
class RecipeLayer:
    """How one layer of the graph that is left after shrinking computes and how wide its weights are stored."""

    name: Annotated[str, Doc("its node in the canonicalised graph")]
    compute: Literal["int8", "float"]
    bits: Annotated[float, Doc("as stored; 32: as it came"), Limits(one_of=WIDTHS)]
    bits_before: Annotated[
        float | None,
        Doc("of a layer in blocks: as it was stored when the layers behind it were fitted"),
        Limits(one_of=WIDTHS),
    ] = None


@dataclasses.dataclass(frozen=True, slots=True)
class RecipeGroup:
    """Channels that can only be kept or removed together, of which some were removed."""

    group: Annotated[int, Doc("its number in the order in which compress/channels.py finds groups"), Limits(min=0)]
    kept: Annotated[tuple[Count, ...], Doc("the units that stay, ascending"), Limits(min=1)]


@dataclasses.dataclass(frozen=True, slots=True)
class RecipeTraining:
    """One stage of training, as it was carried out: where the time budget ended it early, these are the steps it came to."""

    stage: Annotated[str, Doc("what it was for, as the pass names it")]
    steps: Count
    batch: Annotated[int, Limits(min=1)]
    rate: Annotated[float, Doc("largest learning rate"), Limits(min=0)]
    planned: Annotated[int | None, Doc("steps that its schedule was laid out for, where those are others")] = None
    views: Annotated[int, Doc("in how many ways each input was shown"), Limits(min=1)] = 1
    temperature: Annotated[float, Doc("by which both sides' scores were divided"), Limits(min=0)] = 1.0
    labels: Annotated[float, Doc("weight of the true labels beside the teacher's answers"), Limits(min=0, max=1)] = 0.0
    decay: Annotated[float, Doc("weight decay"), Limits(min=0)] = 0.0
    threads: Annotated[int, Doc("sums depend on it"), Limits(min=1)] = 1
    seed: Count = 0
    bits: Annotated[Mapping[str, float], Doc("layer -> width that it was trained to, where narrower than 8")] = (
        dataclasses.field(default_factory=dict)
    )
    groups: Annotated[tuple[RecipeGroup, ...], Doc("channels: groups that are not here were kept whole")] = ()
    branches: Annotated[tuple[str, ...], Doc("residual branches removed: the names of their Adds")] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """`recipe.yaml`: what compression did, complete enough to do it again without searching.

    `inputs` are the hashes of what went in, under the names of `lineage.json`. A replay on others is allowed, gives other
    bytes, and says so.
    """

    profile: Annotated[Profile, Doc("the whole target, so that no file beside this one is needed")]
    max_drop: Annotated[float, Doc("budget, percentage points"), Limits(min=0, max=100)]
    goal: Literal["size", "latency", "both"]
    seed: Count
    passes: Annotated[tuple[str, ...], Doc("that ran and whose work was kept, in order")]
    layers: tuple[RecipeLayer, ...]
    choices: Annotated[
        Mapping[str, str], Doc("pass, or `writer` -> the option it settled on, for those that have several")
    ] = dataclasses.field(default_factory=dict)
    training: Annotated[tuple[RecipeTraining, ...], Doc("in order")] = ()
    metric: Annotated[str, Doc("what accuracy means here")] = ""
    preprocessing: Annotated[Preprocessing | None, Doc("how pictures became inputs; absent: inputs were arrays")] = None
    least_runtime: Annotated[str, Doc("least version of the profile's runtime that the file needs")] = ""
    inputs: Annotated[Mapping[str, Sha256], Doc("sha256 of the model, the teacher and each array of the data")] = (
        dataclasses.field(default_factory=dict)
    )
    format: Literal["recipe/v1"] = "recipe/v1"

    def encode(self) -> bytes:
        """Return the bytes of `recipe.yaml`."""
        return encode_yaml(self, HEADER).encode()


def recipe_layers(scheme: Scheme) -> tuple[RecipeLayer, ...]:
    """Return what a recipe says of each layer of a scheme."""
    before = scheme.bits_before
    return tuple(RecipeLayer(item.node, item.compute, item.bits, before.get(item.node)) for item in scheme.layers)


def load_recipe(text: str, source: str) -> Recipe:
    """Check the text of a `recipe.yaml`.

    Raises:
        FormatError: what is wrong, with the line and the nearest right key.
    """
    return decode_yaml(Recipe, text, source)


def read_recipe(path: Path) -> Recipe:
    """Read a `recipe.yaml`.

    Raises:
        NotFound, StorageError: it is not there, cannot be read or is larger than 8 MiB.
        FormatError: as `load_recipe`.
    """
    return load_recipe(read_bytes(path, "the recipe", MAX_BYTES).decode(errors="replace"), str(path))
