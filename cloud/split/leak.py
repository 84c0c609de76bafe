"""How much of the input a cut gives away: a decoder is trained to rebuild inputs from the tensors that leave.

For each cut a small convolutional decoder (pictures) and a ridge regression (everything) learn on three quarters of the
inputs, and the better one is judged on the rest: by structural similarity for pictures, else by explained variance. A
positive control must succeed, else nothing can be said: the same decoder on the shallowest tensor of the model. This is a
measure of risk: somebody with more data, or with the weights, may do better (He et al., ACSAC 2019).
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from cloud.split.ssim import ssim
from skills.errors import MissingExtra
from skills.split_plan import Leak

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

LEAST_INPUTS = 200
MOST_INPUTS = 512
MAX_LEAK = 0.3  # of structural similarity or explained variance: above it an input counts as recoverable
CONTROL = 0.6  # what the decoder must reach on the shallowest tensor
ABOVE_FLOOR = (
    0.05  # a picture that looks like all others is likened by their mean: that much more must be learnt from a cut
)
SIDE = 32  # pictures are rebuilt at most this large: enough to know what is on them
WIDE = 48
CUT_S = (
    20.0  # of processor time for one cut; not flat by then means inconclusive, unless the input is recoverable already
)
WALL = 6.0  # how many times as long it may take by the clock, on a machine that is busy otherwise
PATIENCE, GAIN = 6, 0.005
BATCH = 32
RIDGES = (1e-3, 1e-1, 1e1, 1e3)
MAX_FEATURES = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True)
class Rebuilt:
    """How well held-out inputs were rebuilt, and whether the decoder's held-out loss was flat at the end."""

    value: float
    flat: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What is to be rebuilt: pictures (N, C, H, W) from 0 to 1, or rows of numbers; and how likeness is measured."""

    values: "Array"
    measure: Literal["ssim", "explained variance"]
    floor: float  # what answering the mean input gives


def prepared(array: "Array") -> "Array":
    """Return a live tensor as the audit keeps it: maps larger than what is rebuilt are shrunk to that, in half precision."""
    import numpy as np

    small = np.asarray(array, np.float32)
    if small.ndim == 4:
        small = shrunk(small, SIDE)
    return np.clip(small, -6e4, 6e4).astype(np.float16)


def audit(
    inputs: "Array",
    cuts: Mapping[str, Sequence["Array"]],
    control: Sequence["Array"],
    *,
    picture: bool,
    seed: int = 0,
    cut_s: float = CUT_S,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[dict[str, Leak], dict[str, Any]]:
    """Return what each cut gives away, and the facts of the audit.

    `inputs` are (N, C, H, W) pictures from 0 to 1 if `picture`, else anything; `cuts` and `control` hold the live tensors
    of the same inputs, in the same order; none where those of a cut cannot be compared, and then nothing is said of it.

    Raises:
        MissingExtra: pictures need torch, which is not installed.
    """
    target, count = _target(inputs, picture=picture), len(inputs)
    facts: dict[str, Any] = {
        "inputs": count, "least_inputs": LEAST_INPUTS, "threshold": MAX_LEAK, "control_threshold": CONTROL,
        "floor": round(target.floor, 4), "seconds_per_cut": cut_s, "seed": seed, "measure": target.measure,
    }  # fmt: skip
    if count < LEAST_INPUTS:
        facts["why"] = f"only {count} inputs, an audit needs {LEAST_INPUTS}"
        return {name: Leak("inconclusive", target.measure, 0.0, count, flat=False) for name in cuts}, facts
    proof = rebuild(control, target, seed, cut_s)
    facts |= {"control": round(proof.value, 4)}
    if proof.value < CONTROL:
        facts["why"] = (
            f"the positive control failed: from the shallowest tensor the decoder reaches {proof.value:.2f} "
            f"{target.measure}, it must reach {CONTROL:g} to be believed anywhere"
        )
    found = {}
    for done, (name, tensors) in enumerate(cuts.items()):
        progress(done, len(cuts))
        if not tensors:
            found[name] = Leak("inconclusive", target.measure, 0.0, count, flat=False)
            facts.setdefault("why", "what crosses there has other sizes for some inputs, which no decoder takes")
            continue
        found[name] = _verdict(rebuild(tensors, target, seed, cut_s), target, count, believed=proof.value >= CONTROL)
    progress(len(cuts), len(cuts))
    return found, facts


def _verdict(rebuilt: Rebuilt, target: Target, count: int, *, believed: bool) -> Leak:
    verdict: Literal["private", "recoverable", "inconclusive"] = "private"
    if rebuilt.value > max(MAX_LEAK, target.floor + ABOVE_FLOOR):
        verdict = "recoverable"
    elif not believed or not rebuilt.flat:
        verdict = "inconclusive"
    return Leak(verdict, target.measure, round(min(max(rebuilt.value, -1.0), 1.0), 4), count, rebuilt.flat)


def rebuild(tensors: Sequence["Array"], target: Target, seed: int, cut_s: float) -> Rebuilt:
    """Train on three quarters of the inputs, return the better decoder's likeness on the rest."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(target.values))
    train, held = order[: 3 * len(order) // 4], order[3 * len(order) // 4 :]
    best = Rebuilt(_likeness(target, held, ridge(_rows(tensors), target.values, train, held)), flat=True)
    if target.measure == "ssim":
        made, flat = _decoder(tensors, target.values, train, held, seed, cut_s)
        value = _likeness(target, held, made)
        best = Rebuilt(max(best.value, value), flat)
    return best


def ridge(rows: "Array", values: "Array", train: "Array", held: "Array") -> "Array":
    """Return held-out values from a ridge regression in its dual form; how much to shrink is chosen within `train`."""
    import numpy as np

    x = rows.astype(np.float64)
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6) / np.sqrt(x.shape[1])
    y = values.reshape(len(values), -1).astype(np.float64)
    mean = y[train].mean(0)
    gram = x @ x.T
    inner, outer = train[: 4 * len(train) // 5], train[4 * len(train) // 5 :]

    def solve(fit: "Array", ask: "Array", shrink: float) -> "Array":
        own = gram[np.ix_(fit, fit)]
        weights = np.linalg.solve(own + (shrink * np.trace(own) / len(fit) + 1e-9) * np.eye(len(fit)), y[fit] - mean)
        return np.asarray(gram[np.ix_(ask, fit)] @ weights + mean)

    shrink = min(RIDGES, key=lambda one: float(((solve(inner, outer, one) - y[outer]) ** 2).sum()))
    return solve(train, held, shrink).reshape(len(held), *values.shape[1:])


def _target(inputs: "Array", *, picture: bool) -> Target:
    import numpy as np

    if picture:
        values = shrunk(np.asarray(inputs, np.float32), SIDE)
        mean = np.broadcast_to(values.mean(0, keepdims=True), values.shape)
        return Target(values, "ssim", ssim(values, mean))
    rows = np.asarray(inputs, np.float32).reshape(len(inputs), -1)
    return Target((rows - rows.mean(0)) / (rows.std(0) + 1e-6), "explained variance", 0.0)


def shrunk(pictures: "Array", side: int) -> "Array":
    """Return pictures (N, C, H, W) whose longer side is at most `side`, each pixel the mean of those it stands for."""
    import numpy as np

    for axis in (2, 3):
        size = pictures.shape[axis]
        if size > side:
            edges = np.linspace(0, size, side + 1).round().astype(int)
            sums = np.add.reduceat(pictures, edges[:-1], axis=axis)
            shape = [1] * pictures.ndim
            shape[axis] = side
            pictures = sums / np.diff(edges).reshape(shape)
    return np.ascontiguousarray(pictures, np.float32)


def _likeness(target: Target, held: "Array", made: "Array") -> float:
    import numpy as np

    right = target.values[held]
    if target.measure == "ssim":
        return ssim(right, np.clip(made, 0, 1))
    left = float(((right - made) ** 2).sum())
    return 1 - left / max(float(((right - right.mean(0)) ** 2).sum()), 1e-12)


def _rows(tensors: Sequence["Array"]) -> "Array":
    import numpy as np

    flat = np.concatenate([np.asarray(one, np.float32).reshape(len(one), -1) for one in tensors], axis=1)
    return flat[:, :: -(-flat.shape[1] // MAX_FEATURES)]


def _decoder(
    tensors: Sequence["Array"], values: "Array", train: "Array", held: "Array", seed: int, cut_s: float
) -> "tuple[Array, bool]":
    """Train a small convolutional decoder until its held-out loss is flat; return its best pictures, and whether it got flat."""
    try:
        import torch
        from torch import nn
    except ImportError:
        raise MissingExtra("auditing pictures needs torch: pip install 'skerry[compress]'") from None
    import numpy as np

    chance = torch.Generator().manual_seed(seed)
    grid = (max(values.shape[2] // 8, 1), max(values.shape[3] // 8, 1))
    maps, flats = [], []
    for one in tensors:
        array = np.asarray(one, np.float32)
        maps += [torch.from_numpy(shrunk(array, SIDE))] if array.ndim == 4 and min(array.shape[2:]) > 1 else []
        flats += [array.reshape(len(array), -1)] if not (array.ndim == 4 and min(array.shape[2:]) > 1) else []
    size = max(((int(one.shape[2]), int(one.shape[3])) for one in maps), default=grid)
    given = [nn.functional.interpolate(one, size, mode="nearest") for one in maps]
    rows = torch.from_numpy(_rows(flats)) if flats else None
    features = torch.cat(given, 1) if given else None
    features = None if features is None else _standard(features, train, (0, 2, 3))
    rows = None if rows is None else _standard(rows, train, (0,))
    torch.set_num_threads(1)  # the nets are so small that more threads only wait for each other
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _Net(nn, features, rows, grid, values.shape[1:])
    layers = net.modules
    steps = torch.optim.Adam([weight for layer in layers for weight in layer.parameters()], 2e-3)
    wanted = torch.from_numpy(np.ascontiguousarray(values))
    spent, until, best, since = time.process_time() + cut_s, time.monotonic() + WALL * cut_s, float("inf"), 0
    made = np.broadcast_to(values[train].mean(0), values[held].shape)
    ask, learn = torch.from_numpy(held), torch.from_numpy(train)
    while time.process_time() < spent and time.monotonic() < until:
        for part in learn[torch.randperm(len(learn), generator=chance)].split(BATCH):
            if time.process_time() > spent or time.monotonic() > until:
                break
            steps.zero_grad()
            loss = nn.functional.mse_loss(net.run(part), wanted[part])
            loss.backward()
            steps.step()
        with torch.no_grad():
            answer = net.run(ask)
            left = float(nn.functional.mse_loss(answer, wanted[ask]))
        since = 0 if left < best * (1 - GAIN) else since + 1
        if left < best:
            best, made = left, answer.numpy().copy()
        if since >= PATIENCE:
            return made, True
    return made, False


class _Net:
    """A few convolutions and doublings from the tensors of a cut to a picture."""

    def __init__(self, nn: Any, features: Any, rows: Any, grid: tuple[int, int], shape: Sequence[int]) -> None:
        self._nn, self._features, self._rows, self._grid, self._shape = nn, features, rows, grid, tuple(shape)
        start = grid if features is None else tuple(features.shape[2:])
        self._dense = None if rows is None else nn.Linear(rows.shape[1], WIDE * grid[0] * grid[1])
        width = (0 if features is None else features.shape[1]) + (0 if rows is None else WIDE)
        self._first = nn.Conv2d(width, WIDE, 3, padding=1)
        doublings = 0
        while max(start[0], 1) << (doublings + 1) <= shape[1]:
            doublings += 1
        self._more = [nn.Conv2d(WIDE, WIDE, 3, padding=1) for _ in range(doublings + 1)]
        self._last = nn.Conv2d(WIDE, shape[0], 3, padding=1)
        self.modules = [self._first, *self._more, self._last, *([self._dense] if self._dense else [])]

    def run(self, which: Any) -> Any:
        """Return the pictures of the inputs `which`."""
        functional = self._nn.functional
        given = [] if self._features is None else [self._features[which]]
        if self._dense is not None:
            dense = functional.relu(self._dense(self._rows[which])).view(len(which), WIDE, *self._grid)
            given.append(functional.interpolate(dense, given[0].shape[2:]) if given else dense)
        import torch

        now = functional.relu(self._first(torch.cat(given, 1)))
        for at, layer in enumerate(self._more):
            now = functional.relu(layer(now))
            if at < len(self._more) - 1:
                now = functional.interpolate(now, scale_factor=2, mode="nearest")
        now = functional.interpolate(now, self._shape[1:], mode="bilinear", align_corners=False)
        return torch.sigmoid(self._last(now))


def _standard(values: Any, train: "Array", axes: tuple[int, ...]) -> Any:
    import torch

    some = values[torch.from_numpy(train)]
    return (values - some.mean(axes, keepdim=True)) / (some.std(axes, keepdim=True) + 1e-5)
