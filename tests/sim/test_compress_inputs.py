"""Every form in which data and models may come: folders of images, a user's code, `.pt2`, and what goes wrong with each."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compress import compress, data, model
from compress.images import ImageFolder, Preprocessing
from compress.passes.canonicalise import CANONICALISE
from compress.run import run
from skills import ort
from skills.errors import FormatError, NotFound, SkerryError, UsageError
from skills.ort import Port
from skills.wire import decode_yaml, encode_yaml

YAML = "size: [8, 6]\nmean: [127]\nstd: [128]\nscale: 1\n"


def one_line(error: SkerryError) -> bool:
    return "\n" not in str(error) and "Traceback" not in str(error) and len(str(error)) < 420


def folder(
    at: Path, yaml: str = YAML, names: tuple[str, ...] = ("cat/a", "cat/b", "dog/c"), size: tuple[int, int] = (6, 8)
) -> Path:
    """Write a folder of pictures, each of one shade: 10, 20, 30 … in the order of `names`; `size` is (width, height)."""
    at.mkdir(exist_ok=True)
    (at / "data.yaml").write_text(yaml)
    for shade, name in enumerate(names, 1):
        path = at / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (10 * shade, 0, 255)).save(path)
    return at


def test_class_folders_of_images_become_inputs_and_labels(tmp_path: Path) -> None:
    found = data.load(folder(tmp_path / "d"))
    assert found.x.shape == (3, 3, 8, 6)
    assert found.x.dtype == np.float32
    assert found.x[:, 0, 0, 0] * 128 + 127 == pytest.approx([10, 20, 30])
    assert found.x[:, 2].min() == 1
    assert found.y is not None
    assert found.y.tolist() == [0, 0, 1]
    assert found.preprocessing == Preprocessing((8, 6), scale=1, mean=(127.0,), std=(128.0,))


def test_train_and_test_folders_are_training_data_and_what_is_reported_on(tmp_path: Path) -> None:
    found = data.load(
        folder(tmp_path / "d", names=("train/cat/a", "train/dog/b", "train/dog/c", "test/cat/d", "test/dog/e"))
    )
    assert found.x_train is not None
    assert found.y_train is not None
    assert (len(found.x), len(found.x_train)) == (2, 3)
    assert found.y_train.tolist() == [0, 1, 1]
    assert found.x_train[0, 0, 0, 0] * 128 + 127 == pytest.approx(10)


def test_pictures_without_class_folders_have_no_labels(tmp_path: Path) -> None:
    found = data.load(folder(tmp_path / "d", names=("a", "b")))
    assert len(found.x) == 2
    assert found.y is None


def test_numbered_class_folders_name_their_own_label(tmp_path: Path) -> None:
    found = data.load(folder(tmp_path / "d", names=("2/a", "10/b")))
    assert found.y is not None
    assert found.y.tolist() == [2, 10]


def test_classes_in_data_yaml_set_the_order_of_labels(tmp_path: Path) -> None:
    found = data.load(folder(tmp_path / "d", YAML + "classes: [fox, dog, cat]\nmetric: macro_f1\n"))
    assert found.y is not None
    assert found.y.tolist() == [1, 2, 2]
    assert found.metric == "macro_f1"


@pytest.mark.parametrize(
    ("rules", "shape", "first"),
    [
        ("layout: NHWC", (8, 6, 3), [10, 0, 255]),
        ("layout: NHWC\ncolour: BGR", (8, 6, 3), [255, 0, 10]),
        ("colour: L", (1, 8, 6), [32]),
        ("dtype: uint8\nlayout: NHWC", (8, 6, 3), [10, 0, 255]),
    ],
)
def test_layout_colour_and_type_are_as_data_yaml_says(
    rules: str, shape: tuple[int, ...], first: list[int], tmp_path: Path
) -> None:
    x = data.load(folder(tmp_path / "d", f"size: [8, 6]\nscale: 1\n{rules}\n")).x
    assert x.shape[1:] == shape
    assert x[0].ravel()[: len(first)] == pytest.approx(first, abs=1)
    assert x.dtype == ("uint8" if "uint8" in rules else "float32")


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ("resize: short_side", (0, 40)),  # 40 x 80 to 20 x 40, the middle 20: a quarter is cut on each side
        ("resize: stretch", (0, 80)),
        ("resize: none", (30, 50)),
        ("crop: 0.5", (30, 50)),
    ],
)
def test_the_middle_of_a_picture_is_kept_as_the_resize_rule_says(
    rules: str, kept: tuple[int, int], tmp_path: Path
) -> None:
    ramp = np.broadcast_to(np.arange(80, dtype=np.uint8)[None, :, None] * 3, (40, 80, 3))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "data.yaml").write_text(f"size: [20, 20]\nscale: 1\nfilter: box\n{rules}\n")
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "d" / "a.png")
    row = data.load(tmp_path / "d").x[0, 0, 10] / 3
    lowest, highest = {"short_side": (20, 60)}.get(rules.removeprefix("resize: "), kept)
    assert row[0] == pytest.approx(lowest, abs=3)
    assert row[-1] == pytest.approx(highest, abs=3)


def test_preprocessing_is_the_same_as_by_hand(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 300, 3), np.uint8)
    (tmp_path / "d").mkdir()
    Image.fromarray(pixels).save(tmp_path / "d" / "a.png")
    (tmp_path / "d" / "data.yaml").write_text(
        "size: [224, 224]\nresize: none\nmean: [0.485, 0.456, 0.406]\nstd: [0.229, 0.224, 0.225]\n"
    )
    by_hand = (pixels[16:240, 38:262] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.allclose(data.load(tmp_path / "d").x[0], by_hand.transpose(2, 0, 1), atol=1e-5)


def test_preprocessing_survives_being_written_and_read() -> None:
    rules = Preprocessing((224, 192), crop=0.875, colour="BGR", mean=(1.0, 2.0, 3.0), filter="bicubic")
    assert decode_yaml(Preprocessing, encode_yaml(rules), "recipe.yaml") == rules
    folder_rules = decode_yaml(ImageFolder, encode_yaml(rules), "data.yaml")
    assert folder_rules.preprocessing() == rules


@pytest.mark.parametrize(
    ("yaml", "sentence"),
    [
        (YAML + "colr: RGB\n", r"data.yaml line 5: unknown key 'colr', did you mean 'colour'\?"),
        ("mean: [0.5]\n", "lacks the key 'size'"),
        ("size: [8]\n", r"line 1: 'size' has 1 entries, expected 2"),
        ("size: [8, 6]\nlayout: HWC\n", r"line 2: 'layout' is 'HWC', expected one of 'NCHW', 'NHWC'"),
        ("size: [8, 6]\nmean: [1, 2]\n", "mean has 2 entries, RGB has 3 channels"),
        ("size: [8, 6]\nstd: [0]\n", "std holds a zero"),
        ("size: [8, 6]\ndtype: uint8\nmean: [3]\n", "dtype uint8 gives the pixels as they are"),
        ("size: [8, 6]\nresize: none\ncrop: 0.5\n", "resize none cuts out exactly 'size'"),
        ("size: [16, 6]\nresize: none\n", r"the image .*a.png is 8 x 6, expected at least 16 x 6 without resizing"),
        (YAML + "classes: [dog]\n", "classes does not list the class folder 'cat'"),
        ("size: [8, 6", "data.yaml line 2: not YAML"),
    ],
)
def test_a_wrong_data_yaml_is_one_sentence(yaml: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=sentence) as caught:
        data.load(folder(tmp_path / "d", yaml))
    assert one_line(caught.value)


def test_an_image_that_cannot_be_read_is_named_by_its_path(tmp_path: Path) -> None:
    at = folder(tmp_path / "d")
    (at / "dog" / "z.jpg").write_bytes(b"no picture")
    with pytest.raises(FormatError, match=r"the image .*d/dog/z.jpg cannot be read: cannot identify") as caught:
        data.load(at)
    assert one_line(caught.value)
    whole = (at / "cat" / "a.png").read_bytes()
    (at / "cat" / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match=r"the image .*d/cat/a.png cannot be read"):
        data.load(at)


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    at = folder(tmp_path / "d")
    (at / "eel").mkdir()
    with pytest.raises(FormatError, match=r"d/eel has no image in it: expected .jpg, .jpeg, .png"):
        data.load(at)


def test_an_image_beside_class_folders_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"d/a.png is in no class folder, .*d has 1 of them"):
        data.load(folder(tmp_path / "d", names=("cat/b", "a")))


def test_folders_of_folders_that_are_not_train_and_test_are_named(tmp_path: Path) -> None:
    at = folder(tmp_path / "d", names=("train/cat/a", "val/cat/b"))
    with pytest.raises(FormatError, match=r"d/train has no image in it, only folders \(cat\)"):
        data.load(at)


def test_a_folder_without_data_yaml_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(
        NotFound, match="has no data.yaml that says how its images become inputs: it needs at least size"
    ):
        data.load(tmp_path)


def test_more_images_than_fit_in_memory_are_refused_before_one_is_read(tmp_path: Path) -> None:
    at = folder(tmp_path / "d", "size: [8192, 8192]\n", tuple(f"cat/{n}" for n in range(6)), size=(1, 1))
    sentence = (
        r"has 6 images, 4.5 GiB as inputs of float32 \[3, 8192, 8192\]: the limit is 4 GiB, 5 images of this size"
    )
    with pytest.raises(FormatError, match=sentence):
        data.load(at)


FEED = """
import numpy as np
X, Y = np.arange(40, dtype=np.float32).reshape(10, 4), np.arange(10)
def plain():
    yield X[:5]
    yield X[5:]
def pairs():
    return [(X[:5], Y[:5]), (X[5:], Y[5:])]
def whole():
    return X, Y
def both():
    yield {"x": X, "y": Y, "groups": list("aabbccddee")}
    yield {"x": X[:3] + 1, "y": Y[:3], "groups": list("fgh"), "split": "train"}
def score(outputs, y):
    return (outputs[:, 0] > y) * 1.0
both.metric = score
def mapped():
    return {"x": X, "y": Y}, "macro_f1"
class Loader:
    metric = "mse"
    def __iter__(self):
        yield X, X
def failing():
    yield X
    raise RuntimeError("the disk with the data is not mounted\\nmore")
def refusing():
    raise KeyError("DATA_ROOT")
def changing():
    yield X
    yield X[:, :3]
def empty():
    return iter(())
def number():
    return 7
def strings():
    yield "x"
def misspelt():
    yield {"x": X, "labels": Y}
def misplaced():
    yield {"x": X, "split": "validation"}
def halves():
    yield X, Y
    yield X
def endless():
    while True:
        yield X
nothing = 3
"""


@pytest.fixture
def feed(tmp_path: Path) -> Callable[[str], str]:
    (tmp_path / "feed.py").write_text(FEED)
    return lambda name: f"{tmp_path / 'feed.py'}:{name}"


@pytest.mark.parametrize(
    ("name", "labelled", "metric"),
    [
        ("plain", False, None),
        ("pairs", True, None),
        ("whole", True, None),
        ("both", True, "score"),
        ("mapped", True, "macro_f1"),
        ("Loader", True, "mse"),
    ],
)
def test_data_may_come_from_code(name: str, labelled: bool, metric: str | None, feed: Callable[[str], str]) -> None:
    found = data.load(feed(name))
    assert np.array_equal(found.x, np.arange(40, dtype=np.float32).reshape(10, 4))
    assert (found.y is not None) == labelled
    assert getattr(found.metric, "__name__", found.metric) == metric


def test_batches_of_code_say_their_split_and_groups(feed: Callable[[str], str]) -> None:
    found = data.load(feed("both"))
    assert found.x_train is not None
    assert found.groups is not None
    assert found.groups_train is not None
    assert len(found.x_train) == 3
    assert "".join(found.groups) == "aabbccddee"
    assert "".join(found.groups_train) == "fgh"


def test_a_path_object_may_name_code_too(feed: Callable[[str], str]) -> None:
    assert len(data.load(Path(feed("plain"))).x) == 10


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        (
            "failing",
            FormatError,
            r"feed.py:failing raised RuntimeError: the disk with the data is not mounted \(batch 1\)",
        ),
        ("refusing", FormatError, r"feed.py:refusing raised KeyError: 'DATA_ROOT'"),
        ("changing", FormatError, r"x of batch 1 is float32 \[10, 3\], the first one is float32 \[N, 4\]"),
        ("empty", FormatError, r"feed.py:empty gave no batch"),
        ("number", FormatError, r"feed.py:number returned int, expected batches: x, \(x, y\) or a mapping"),
        ("strings", FormatError, "batch 0 is str, expected x"),
        ("misspelt", FormatError, "batch 0 has the keys x, labels and split 'test', expected x, y, groups and split"),
        ("misplaced", FormatError, r"batch 0 has the keys x and split 'validation', expected .*\(test or train\)"),
        ("halves", FormatError, r"y has shape \(10,\) and dtype int64, expected 20 rows of numbers"),
        ("nothing", NotFound, "has no function 'nothing'"),
        ("absent", NotFound, "has no function 'absent'"),
    ],
)
def test_code_that_gives_no_data_is_named(
    name: str, kind: type[SkerryError], sentence: str, feed: Callable[[str], str]
) -> None:
    with pytest.raises(kind, match=sentence) as caught:
        data.load(feed(name))
    assert one_line(caught.value)


def test_code_that_never_ends_is_stopped_at_the_limit(
    feed: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.feed.MAX_INPUT_BYTES", 1 << 12)
    with pytest.raises(FormatError, match=r"feed.py:endless gave more than .* in 26 batches: end it earlier"):
        data.load(feed("endless"))


@pytest.mark.parametrize(
    ("reference", "kind", "sentence"),
    [
        ("no_such_module_here:batches", NotFound, "there is no module 'no_such_module_here'"),
        ("nowhere.py:batches", NotFound, "there is no file nowhere.py"),
        ("nowhere.npz", NotFound, "there is no data file nowhere.npz"),
        (":", UsageError, "neither a file, nor file.py:callable, nor package.module:callable"),
    ],
)
def test_data_that_is_not_there_is_not_found(reference: str, kind: type[SkerryError], sentence: str) -> None:
    with pytest.raises(kind, match=re.escape(sentence)):
        data.load(reference)


def test_an_npz_may_name_its_metric_and_its_groups(tmp_path: Path) -> None:
    x = np.zeros((30, 4), np.float32)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(30) % 2, groups=np.repeat(list("abc"), 10), metric="roc_auc")
    found = data.load(tmp_path / "d.npz")
    assert found.metric == "roc_auc"
    assert found.groups is not None
    assert found.groups[10] == "b"
    assert data.load(tmp_path / "d.npz", "top1").metric == "top1"


@pytest.mark.parametrize(
    ("port", "least", "most"),
    [
        (Port("x", "float32", (-1, 3, 4)), -6, 6),
        (Port("x", "uint8", (1, 9)), 0, 255),
        (Port("x", "int64", (-1, 9)), 0, 1),
    ],
)
def test_without_data_inputs_are_made_up_and_say_so(port: Port, least: float, most: float) -> None:
    made = data.synthetic(port, 0)
    assert made.synthetic
    assert made.y is None
    assert made.x.shape[1:] == port.shape[1:]
    assert str(made.x.dtype) == port.dtype
    assert least <= made.x.min() < made.x.max() <= most
    data.check_fit(made, port)


def test_without_data_an_input_of_free_size_is_named() -> None:
    with pytest.raises(FormatError, match=r"'x' takes \[N, 3, N, N\]: give data"):
        data.synthetic(Port("x", "float32", (-1, 3, -1, -1)), 0)


@functools.cache
def program(kind: str) -> bytes:
    """Return the bytes of a small `.pt2`."""
    import io

    import torch

    class Shuffle(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x.view(x.size(0), 2, 72).transpose(1, 2).reshape(x.size(0), 144)

    class Two(torch.nn.Module):
        def forward(self, x: Any, y: Any) -> Any:
            return x + y

    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(8, 4),
    )  # fmt: skip
    modules: dict[str, Any] = {"shuffle": Shuffle(), "two": Two()}
    x = torch.ones(2, 1, 12, 12)
    given = (x, x) if kind == "two" else (x,)
    free = None if kind == "fixed" else tuple({0: torch.export.Dim("n")} for _ in given)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(modules.get(kind, net).eval(), given, dynamic_shapes=free), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["net", "fixed", "shuffle"])
def test_an_exported_program_becomes_onnx_and_keeps_its_batch(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.pt2").write_bytes(program(kind))
    capfd.readouterr()
    x = np.random.default_rng(0).standard_normal((40, 1, 12, 12)).astype(np.float32)
    source = model.load(tmp_path / "m.pt2", None, x)
    assert capfd.readouterr() == ("", "")
    assert source.name == "m.pt2"
    assert source.bytes_input == len(program(kind))
    session = ort.session(source.model.SerializeToString())
    assert session.inputs[0].shape == ((2 if kind == "fixed" else -1), 1, 12, 12)


def test_an_exported_program_needs_no_data_to_become_onnx(tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(program("net"))
    assert model.load(tmp_path / "m.pt2", None, None).model.graph.node


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"nonsense", r"m.pt2 is not a .pt2 that torch.export can load"),
        (None, r"m.pt2 does not take the data: .*"),
        ("two", r"m.pt2 has 2 inputs \(x, y\), compression takes models with one"),
    ],
)
def test_a_program_that_cannot_be_used_is_one_sentence(
    content: bytes | str | None, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "m.pt2").write_bytes(content if isinstance(content, bytes) else program(content or "net"))
    with pytest.raises(FormatError, match=sentence) as caught:
        model.load(tmp_path / "m.pt2", None, np.zeros((20, 1, 5), np.float32))
    assert one_line(caught.value)


def test_a_torch_module_without_data_cannot_be_exported() -> None:
    with pytest.raises(UsageError, match="exported by running it: give data, or an .onnx or .pt2 file"):
        model.load("a_module:make", None, None)


def test_a_factory_that_raises_is_named(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def make():\n    raise ValueError('no weights here')\n")
    with pytest.raises(FormatError, match=r"f.py:make raised ValueError: no weights here"):
        model.load(f"{tmp_path / 'f.py'}:make", None, np.zeros((20, 1), np.float32))
    (tmp_path / "g.py").write_text("1 / 0\n")
    with pytest.raises(FormatError, match=r"g.py cannot be imported: ZeroDivisionError"):
        model.load(f"{tmp_path / 'g.py'}:make", None, np.zeros((20, 1), np.float32))


def test_a_folder_of_images_is_compressed_on(small_net: Callable[[str], Any], tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(small_net("plain").model.SerializeToString())
    at = tmp_path / "d"
    at.mkdir()
    (at / "data.yaml").write_text("size: [12, 12]\ncolour: L\nmean: [0.5]\nstd: [0.25]\n")
    for name, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 14, 12), np.uint8)):
        Image.fromarray(pixels).save(at / f"{name}.png")
    report = compress(tmp_path / "m.onnx", at, tmp_path / "out", device="x86-avx2", max_drop=50)
    assert report.metric_name == "agreement"
    assert report.n_report == 24


def test_the_verdict_is_about_the_metric_that_was_asked_for(small_net: Callable[[str], Any], tmp_path: Path) -> None:
    def half_right(outputs: Any, y: Any) -> Any:
        return (1 + (outputs.argmax(axis=1) == y)) / 2

    net = small_net("plain")
    (tmp_path / "m.onnx").write_bytes(net.model.SerializeToString())
    given = {**net.data, "metric": half_right, "groups": np.arange(1000) // 10}
    report = compress(tmp_path / "m.onnx", given, tmp_path / "out", device="x86-avx2", max_drop=50)
    assert report.metric_name == "half_right"
    assert report.baseline.metric > 0.9
    assert report.n_report == 600


def test_a_metric_that_fails_ends_the_run_before_the_search(small_net: Callable[[str], Any], tmp_path: Path) -> None:
    net = small_net("plain")
    (tmp_path / "m.onnx").write_bytes(net.model.SerializeToString())

    def broken(outputs: Any, y: Any) -> Any:
        raise RuntimeError("no annotations")

    stages: list[str] = []
    with pytest.raises(FormatError, match="the metric broken raised RuntimeError: no annotations"):
        compress(
            tmp_path / "m.onnx", {**net.data, "metric": broken}, tmp_path / "out",
            progress=lambda stage, *_: stages.append(stage),
        )  # fmt: skip
    assert stages == ["reading the model and the data"]


def test_the_detectors_metric_of_the_docs_marks_each_box(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "compression.md").read_text()
    (code,) = [part.split("```")[0] for part in page.split("```python\n") if part.startswith("# boxes.py")]
    np.savez(tmp_path / "boxes.npz", x=np.zeros((20, 3), np.float32), y=np.tile(np.float32([0, 0, 2, 2]), (20, 1)))
    (tmp_path / "boxes.py").write_text(code.replace("boxes.npz", str(tmp_path / "boxes.npz")))
    found = data.load(f"{tmp_path / 'boxes.py'}:samples")
    assert callable(found.metric)
    guesses = np.float32([[0, 0, 2, 2], [1, 0, 3, 2], [5, 5, 6, 6], [2, 2, 1, 1]])
    assert found.metric(guesses, found.y[:4]) == pytest.approx([1, 1 / 3, 0, 0])


def test_a_teacher_from_a_factory_and_the_profile_have_their_hashes(
    small_net: Callable[[str], Any], tmp_path: Path
) -> None:
    net = small_net("plain")
    (tmp_path / "m.onnx").write_bytes(net.model.SerializeToString())
    (tmp_path / "nets.py").write_text(
        "import torch\n\n\ndef teacher():\n    torch.manual_seed(1)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 4))\n"
    )
    run(
        tmp_path / "m.onnx", net.data, tmp_path / "out", device="x86-avx2", max_drop=90, passes=(CANONICALISE,),
        teacher=f"{tmp_path / 'nets.py'}:teacher",
    )  # fmt: skip
    parents = json.loads((tmp_path / "out" / "lineage.json").read_text())["parents"]
    assert {"model", "profile", "teacher"} <= parents.keys()
    assert all(len(digest) == 64 for digest in parents.values())
