"""Train a student to answer as its teacher does: distillation (Hinton et al. 2015, arXiv 1503.02531)."""

import dataclasses
import io
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from compress.graph import Array
from compress.student import Student
from compress.views import Views
from compress.weights import Codes

WARM_UP = 30  # steps until the full rate
SETTLING = 24  # batches over which the normalisation's statistics are taken in the end
LARGEST_GRADIENT = 5.0
KEPT_EVERY_S = 60.0  # between two checkpoints

Tensor = Any


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How to train. `labels` is the weight of the true labels beside the teacher's answers; `stop` the step at which training
    ended although its schedule was laid out for `steps`: the time was up."""

    steps: int
    rate: float = 8e-4
    batch: int = 128
    temperature: float = 4.0
    labels: float = 0.1
    decay: float = 1e-4
    threads: int = 2
    seed: int = 0
    stop: int | None = None

    def ends(self) -> int:
        """Return how many steps are really made."""
        return self.steps if self.stop is None else min(self.stop, self.steps)


@dataclasses.dataclass(frozen=True, slots=True)
class Trained:
    """The graph with trained weights, the codes of the layers that were rounded, and the mean loss of the last steps."""

    model: Any
    codes: Mapping[str, Codes]
    loss: float
    seconds: float
    steps: int


@dataclasses.dataclass(slots=True)
class Checkpoint:
    """Where a run's state is kept, so that an interrupted one goes on: two functions, and when they were last used."""

    load: Callable[[], bytes | None]
    save: Callable[[bytes], None]


def fit(
    student: Student,
    views: Views,
    labels: Array | None,
    settings: Settings,
    say: Callable[[float], None] = lambda _share: None,
    checkpoint: Checkpoint | None = None,
    left: Callable[[], float] = lambda: math.inf,
) -> Trained:
    """Train for `settings.steps` steps of one cosine of the learning rate, then settle the statistics and fold them.

    `labels` are class numbers of the rows of `views`, or None. Where the seconds that `left` tells are used up, training ends
    early.
    The same arguments give the same weights on the same machine.
    """
    began = time.monotonic()
    torch.manual_seed(settings.seed)
    device = training_device()
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        modules = student.modules().to(device)
        optimizer = torch.optim.AdamW(student.groups(settings.rate, settings.decay))
        start, loss = 0, 0.0
        saved = checkpoint.load() if checkpoint else None
        if saved is not None:
            state = torch.load(io.BytesIO(saved), map_location=device, weights_only=True)
            modules.load_state_dict(state["modules"])
            optimizer.load_state_dict(state["optimizer"])
            start, loss = int(state["step"]), float(state["loss"])
        batches = _Batches(views, labels, settings, device)
        modules.train()
        last = time.monotonic()
        done = start
        for step in range(start, settings.ends()):
            if left() <= 0:
                break
            x, target, truth = batches.at(step)
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * rate(step, settings.steps)
            with torch.autocast(device.type, torch.bfloat16, enabled=half_precision(device.type)):
                answer = student.twin(x)
            found = distance(answer.float(), target, truth, settings, classes=views.classes)
            optimizer.zero_grad(set_to_none=True)
            found.backward()
            torch.nn.utils.clip_grad_norm_(modules.parameters(), LARGEST_GRADIENT)
            optimizer.step()
            loss = found.item() if step == 0 else 0.98 * loss + 0.02 * found.item()
            done = step + 1
            say(done / settings.steps)
            if checkpoint is not None and (time.monotonic() - last > KEPT_EVERY_S or done == settings.ends()):
                checkpoint.save(_state(modules, optimizer, done, loss))
                last = time.monotonic()
        _settle(student, batches, done)
        modules.to("cpu")
        model, codes = student.finish()
    finally:
        torch.set_num_threads(before)
    return Trained(model, codes, loss, time.monotonic() - began, done)


def training_device() -> Any:
    """Return where training computes: an accelerator where torch finds one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training_machine() -> str:
    """Return in words what training computes on, and in which numbers: the bytes depend on both."""
    device = training_device()
    name = f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
    return f"{name}, {'bfloat16' if half_precision(device.type) else 'float32'}"


def half_precision(device: str) -> bool:
    """Return whether training computes in bfloat16: where the machine multiplies it natively, 2 to 3 times as fast."""
    return device == "cuda" or bool(torch.cpu._is_avx512_bf16_supported())  # noqa: SLF001 - there is no public question


def rate(step: int, steps: int) -> float:
    """Return the share of the full learning rate at a step: a short warm-up, then half a cosine down to 0. Pure."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + float(np.cos(np.pi * step / max(1, steps))))


def distance(answer: Tensor, target: Tensor, truth: Tensor | None, settings: Settings, *, classes: bool) -> Tensor:
    """Return the loss: cross-entropy against the teacher's softened classes and the labels, or the squared error.

    Where outputs are no `classes`' scores, the squared error is taken relative to the spread of the teacher's answers.
    """
    if not classes:
        return ((answer - target) ** 2).mean() / target.var().clamp_min(1e-12)
    heat = settings.temperature
    said, wanted = _scores(answer), _scores(target)
    loss = functional.kl_div(
        functional.log_softmax(said / heat, 1), functional.softmax(wanted / heat, 1), reduction="batchmean"
    )
    loss = loss * heat * heat
    if truth is None:
        return loss
    return (1 - settings.labels) * loss + settings.labels * functional.cross_entropy(said, truth)


class _Batches:
    """The batch of every step: rows in an order that depends on seed and epoch alone, each epoch the next view."""

    def __init__(self, views: Views, labels: Array | None, settings: Settings, device: Any) -> None:
        self.views, self.labels, self.settings, self.device = views, labels, settings, device
        self.size = min(settings.batch, len(views.x))
        self.each = max(1, len(views.x) // self.size)
        self.epoch, self.order = -1, np.empty(0, np.int64)

    def at(self, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        epoch, place = divmod(step, self.each)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.settings.seed, epoch]).permutation(len(self.views.x))
        rows = self.order[place * self.size : (place + 1) * self.size]
        view = epoch % self.views.count
        x = torch.from_numpy(np.ascontiguousarray(self.views.inputs(view, rows))).to(self.device)
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        target = torch.from_numpy(self.views.answers(view)[rows]).to(self.device)
        truth = None if self.labels is None else torch.from_numpy(self.labels[rows]).to(self.device)
        return x, target, truth


def _settle(student: Student, batches: _Batches, steps: int) -> None:
    """Take the normalisations' statistics anew, averaged over batches with the final weights."""
    norms = list(student.norms.values())
    with torch.no_grad():
        for at in range(SETTLING if norms else 0):
            for norm in norms:
                norm.momentum = 1 / (at + 1)
            student.twin(batches.at(steps + at)[0])
    for norm in norms:
        norm.eval()


def _state(modules: Any, optimizer: Any, step: int, loss: float) -> bytes:
    buffer = io.BytesIO()
    state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "loss": loss}
    torch.save(state, buffer)
    return buffer.getvalue()


def _scores(values: Tensor) -> Tensor:
    """Return log-odds: a graph that ends in Softmax gives probabilities already."""
    if float(values.detach().min()) >= 0 and bool((values.detach().sum(1) - 1).abs().max() < 0.02):
        return values.clamp_min(1e-9).log()
    return values
