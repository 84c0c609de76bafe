"""The three nets of the bench, their data, and the plans that `cloud.split` makes of them."""

import dataclasses
import importlib.util
import io
import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloud.split.export import commented
from cloud.split.plan import split
from skills import codec
from skills.files import sha256_file, write_atomic
from skills.network import Link
from skills.split_plan import Millis, Plan, load_plan

Array = NDArray[Any]
LINKS = tuple(Link(mbit, rtt) for mbit in (1.0, 5.0, 20.0, 100.0) for rtt in (5.0, 50.0))
SLOWDOWNS = (5.0, 10.0, 20.0)
PLANNED = 10.0  # the device that a plan is made for; the times of the others follow in proportion
GATE = 256
SAMPLES = 12
TURNS = (5, 0, 8, 3, 11, 6, 1, 9, 4, 7, 2, 10)  # any few in a row are spread over all twelve


@dataclasses.dataclass(frozen=True, slots=True)
class Net:
    """A net and the inputs it is measured on; `max_drop` is the budget of every coding, in points."""

    name: str
    title: str
    model: str
    read: Callable[[Any, Path], tuple[Array, Array | None]]
    max_drop: float = 1.0


def cifar(load: Any, _: Path) -> tuple[Array, Array | None]:
    """Return labelled test images for the residual net, of every class: they lie class after class."""
    x, y = load.cifar("test5000")
    apart = len(x) // GATE
    return x[::apart][:GATE], y[::apart][:GATE]


def imagenet(load: Any, _: Path) -> tuple[Array, Array | None]:
    """Return labelled photos for the mobile net."""
    x, y = load.imagenet()
    return x[:GATE], y[:GATE]


def photos(_: Any, reference: Path) -> tuple[Array, Array | None]:
    """Return unlabelled photos of the detector's size, people first."""
    from PIL import Image

    found = [
        np.asarray(_fitted(Image.open(path))) for path in sorted(reference.glob("mlperf_tiny/photos_person/*.jpg"))
    ]
    pack = np.load(reference / "imagenet" / "imagenet_sample_even500.npz")
    raw, at = pack["jpeg"].tobytes(), pack["offsets"]
    some = itertools.islice(itertools.pairwise(at), 52)
    found += [np.asarray(_fitted(Image.open(io.BytesIO(raw[start:stop])))) for start, stop in some]
    x = (np.stack(found).astype(np.float32) - 127) / 128
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)), None


def _fitted(image: Any) -> Any:
    return image.convert("RGB").resize((320, 240))


NETS = (
    Net("resnet56", "ResNet-56, 32×32", "cifar10jpeg/resnet56_cifar10jpeg.onnx", cifar),
    Net("efficientnet", "EfficientNet-Lite0, 224×224", "imagenet/efficientnet_lite0.onnx", imagenet),
    # Without labels the drop is the relative error of scores and boxes, which a JPEG of any quality moves by some percent.
    Net("ultraface", "UltraFace RFB, 320×240", "face/ultraface_RFB-320.onnx", photos, max_drop=8.0),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Planned:
    """A net with its plan for one device (`plan.slowdown`) in `folder`, and a few inputs to ask about."""

    net: Net
    folder: Path
    plan: Plan
    samples: tuple[Mapping[str, Array], ...]
    seconds: float


def planned(net: Net, reference: Path, work: Path, code: str, *, quick: bool) -> Planned:
    """Plan a net for a device `PLANNED` times slower than this machine, or take the plan that the same `code` made.

    Raises:
        FileNotFoundError: the reference folder has no load.py.
    """
    import time

    x, y = net.read(_loader(reference), reference)
    model = reference / net.model
    folder = work / "plans" / f"{net.name}-{sha256_file(model)[:8]}-{code[:8]}{'-quick' if quick else ''}"
    start, most = time.monotonic(), 16 if quick else 64
    if not (folder / "split.yaml").is_file():
        count = 24 if quick else GATE
        data = {"x": x[:count]} | ({"y": y[:count]} if y is not None else {})
        rounds = 15 if quick else 30
        split(
            model, data, slowdown=PLANNED, links=LINKS, max_drop=net.max_drop, out=folder, rounds=rounds,
            most_samples=most, most_gate=count,
        )  # fmt: skip
    plan = load_plan((folder / "split.yaml").read_text())
    return Planned(net, folder, plan, _typical(plan, x[:most]), time.monotonic() - start)


def _typical(plan: Plan, x: Array) -> tuple[Mapping[str, Array], ...]:
    """Return twelve inputs whose sizes on the wire are spread as those of all `x`, large and small ones in turn.

    A plan is made for the median of all of them; of twelve that happen to lie in front the median may be an eighth off.
    """
    cut = plan.cut("input")
    coding = next(one for one in cut.codings if one.kind == "jpeg")
    samples = [{plan.inputs[0].name: x[at : at + 1]} for at in range(len(x))]
    ranked = sorted(samples, key=lambda one: len(codec.encode(coding, cut.tensors, one)))
    return tuple(ranked[(2 * at + 1) * len(x) // (2 * SAMPLES)] for at in TURNS)


def for_device(one: Planned, slowdown: float) -> Planned:
    """Return the same plan for a device that is slower or faster: what the device takes is in proportion, all else is as it was.

    The tail knows a plan by what is in it, not by its costs, so one tail serves all of them.
    """
    share = slowdown / PLANNED
    cuts = tuple(
        dataclasses.replace(
            cut,
            device_ms=Millis(cut.device_ms.p50 * share, cut.device_ms.p90 * share),
            codings=tuple(dataclasses.replace(coding, encode_ms=coding.encode_ms * share) for coding in cut.codings),
        )
        for cut in one.plan.cuts
    )
    replies = tuple(dataclasses.replace(reply, decode_ms=reply.decode_ms * share) for reply in one.plan.replies)
    plan = dataclasses.replace(one.plan, cuts=cuts, replies=replies, slowdown=slowdown)
    folder = one.folder.with_name(f"{one.folder.name}-x{slowdown:g}")
    if not (folder / "segments").is_dir():
        shutil.copytree(one.folder / "segments", folder / "segments")
    write_atomic(folder / "split.yaml", commented(plan).encode())
    return dataclasses.replace(one, folder=folder, plan=plan)


def _loader(reference: Path) -> Any:
    path = reference / "load.py"
    spec = importlib.util.spec_from_file_location("load", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no load.py in {reference}: set SKERRY_REFERENCE")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
