"""What a person may get wrong: one sentence that says what was found, and OUT untouched."""

import errno
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from compress import compress, folder, model
from compress.data import load
from compress.folder import write_folder
from compress.passes.canonicalise import CANONICALISE
from compress.run import run
from skills.errors import FormatError, NotFound, Refused, SkerryError, StorageError, UsageError

Build = Callable[[str], Any]


def written(net: Any, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(net.model.SerializeToString())
    return path


def one_line(error: BaseException) -> bool:
    return bool(str(error)) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: {"x": d["x"][:, :, :9]}, r"takes float32 \[N, 1, 12, 12\], x in the data is float32 \[N, 1, 9, 12\]"),
        (lambda d: {"x": d["x"].astype(np.float64), "y": d["y"]}, r"takes float32 .* x in the data is float64"),
        (lambda d: {"x": (d["x"] * 9).astype(np.uint8), "y": d["y"]}, r"takes float32 .* x in the data is uint8"),
        (lambda d: {"x": d["x"][:, 0], "y": d["y"]}, r"takes float32 \[N, 1, 12, 12\], x in the data is float32 \[N, 12, 12\]"),
        (lambda d: {"x": d["x"], "y": d["y"] + 1}, r"labels in y run from 1 to 4, the model's output has 4 classes \(0 to 3\)"),
        (lambda d: {"x": d["x"], "y": d["y"][:-1]}, r"y has shape \(999,\).* expected 1000 rows of numbers"),
        (
            lambda d: {"x": d["x"], "y": d["y"].astype(np.float32)},
            r"y is float32 \[N\] and the model's first output \[N, 4\]: expected whole-number labels",
        ),
        (lambda d: {"x": np.where(d["x"] > 2.5, np.nan, d["x"]).astype(np.float32)}, r"\d+ of 1000 samples in x hold NaN"),
        (lambda d: {"x": d["x"][:0], "y": d["y"][:0]}, r"x has the shape \(0, 1, 12, 12\): there is no sample in it"),
        (lambda d: {"images": d["x"]}, "has the arrays images, expected x"),
        (lambda d: {"x": d["x"][:5], "y": d["y"][:5]}, "x has 5 samples, expected at least 20"),
        (lambda d: {**d, "y_train": d["y"]}, "has y_train without x_train"),
        (lambda d: {**d, "x_train": d["x"][:, :, :5]}, r"x_train in the data is float32 \[N, 1, 5, 12\]"),
    ],
)  # fmt: skip
def test_data_that_does_not_fit_is_one_sentence_with_both_sides(
    change: Callable[[Mapping[str, Any]], dict[str, Any]], sentence: str, small_net: Build, tmp_path: Path
) -> None:
    net = small_net("plain")
    with pytest.raises(FormatError, match=sentence) as caught:
        compress(written(net, tmp_path), change(net.data), tmp_path / "out")
    assert one_line(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["model.onnx"]


def test_a_missing_model_or_data_file_is_not_found(small_net: Build, tmp_path: Path) -> None:
    net = small_net("plain")
    with pytest.raises(NotFound, match=r"the model .*nowhere.onnx does not exist"):
        compress(tmp_path / "nowhere.onnx", net.data, tmp_path / "out")
    with pytest.raises(NotFound, match=r"no data file .*nowhere.npz"):
        compress(written(net, tmp_path), tmp_path / "nowhere.npz", tmp_path / "out")


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_model_is_one_sentence(damage: str, small_net: Build, tmp_path: Path) -> None:
    net = small_net("plain")
    path = written(net, tmp_path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"not a model at all\n" * 9, "empty": b""}[damage])
    with pytest.raises(FormatError, match="is not an ONNX model that can be read|is not valid ONNX") as caught:
        compress(path, net.data, tmp_path / "out")
    assert one_line(caught.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "is empty"), (b"nonsense", "holds text"), ("a,b\n1,2\n3,é\n".encode(), "holds text"),
        (b"PK\x03\x04 cut short", "is an archive that was cut short"), (b"\x93NUMPY\x01\x00", "is one array without a name"),
        (b"\x80\x04\x95pickle", "is of another kind"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_data_is_one_sentence_of_what_it_holds_and_what_is_expected(
    content: bytes, found: str, tmp_path: Path
) -> None:
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(FormatError, match=f"d.npz is not an .npz file: it {found}.*; expected an .npz") as caught:
        load(tmp_path / "d.npz")
    assert one_line(caught.value)
    assert "pickle" not in str(caught.value)


def test_a_data_file_with_pickles_is_refused(small_net: Build, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}], object))
    with pytest.raises(
        FormatError, match="d.npz is not an .npz file that can be read: x holds Python objects"
    ) as caught:
        compress(written(small_net("plain"), tmp_path), tmp_path / "d.npz", tmp_path / "out")
    assert "allow_pickle" not in str(caught.value)


@pytest.mark.parametrize(("domain", "name"), [("", "Flux"), ("com.acme", "Warp")])
def test_an_operator_that_the_runtime_lacks_is_named(domain: str, name: str, small_net: Build, tmp_path: Path) -> None:
    net = small_net("plain")
    ends = [helper.make_tensor_value_info(at, 1, ["n", 4]) for at in ("x", "y")]
    body = helper.make_graph([helper.make_node(name, ["x"], ["y"], domain=domain)], "g", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", 21), *([helper.make_opsetid(domain, 1)] if domain else [])]
    (tmp_path / "m.onnx").write_bytes(helper.make_model(body, opset_imports=opsets, ir_version=10).SerializeToString())
    with pytest.raises(FormatError, match=f"operators that onnxruntime does not have: .*{name}"):
        compress(tmp_path / "m.onnx", net.data, tmp_path / "out")


def test_a_second_run_on_the_same_folder_leaves_what_the_first_one_keeps(small_net: Build, tmp_path: Path) -> None:
    net = small_net("plain")
    folder.write_folder(folder.best_folder(tmp_path / "out"), {"model.onnx": b"found so far"})
    with folder.only_run(tmp_path / "out"), pytest.raises(Refused, match="is at work on"):
        compress(written(net, tmp_path), net.data, tmp_path / "out")
    assert (tmp_path / ".out.work" / "best" / "model.onnx").read_bytes() == b"found so far"


def test_a_model_with_two_inputs_is_named(small_net: Build, tmp_path: Path) -> None:
    ends = [helper.make_tensor_value_info(at, 1, ["n", 4]) for at in ("a", "b", "y")]
    body = helper.make_graph([helper.make_node("Add", ["a", "b"], ["y"])], "g", ends[:2], ends[2:])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(FormatError, match=r"has 2 inputs \(a, b\)"):
        compress(tmp_path / "m.onnx", small_net("plain").data, tmp_path / "out")


@pytest.mark.parametrize(("metric", "chance"), [("top1", "25.0%"), ("macro_f1", "25.0%"), ("roc_auc", "50.0%")])
def test_a_model_that_only_guesses_is_warned_about(metric: str, chance: str, small_net: Build, tmp_path: Path) -> None:
    net = small_net("plain")
    model, y = net.model, net.y
    if metric == "roc_auc":  # one score a sample: the first class's
        model, y = one_score(model), (y > 1).astype(np.int64)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    shuffled = np.random.default_rng(0).permutation(y)
    said = []
    for labels in (shuffled, y):
        report = run(
            tmp_path / "m.onnx", {"x": net.x, "y": labels}, tmp_path / "out", device="x86-avx2", max_drop=90, metric=metric,
            passes=(CANONICALISE,),
        )  # fmt: skip
        said.append(any(f"guessing gives {chance}" in warning for warning in report.details.warnings))
    assert said == [True, False]


def one_score(model: Any) -> Any:
    """The model with the difference of its first two class scores and its last two as only output."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    (end,) = changed.graph.output
    weight = numpy_helper.from_array(np.float32([[-1], [-1], [1], [1]]), "one.score")
    changed.graph.initializer.append(weight)
    changed.graph.node.append(helper.make_node("MatMul", [end.name, "one.score"], ["score"], "score"))
    changed.graph.output.pop()
    changed.graph.output.append(helper.make_tensor_value_info("score", 1, ["n", 1]))
    return changed


def test_a_model_that_answers_nan_is_named(tmp_path: Path) -> None:
    ends = [helper.make_tensor_value_info("x", 1, ["n", 4]), helper.make_tensor_value_info("y", 1, ["n", 4])]
    root = helper.make_graph([helper.make_node("Sqrt", ["x"], ["y"])], "g", ends[:1], ends[1:])
    model = helper.make_model(root, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(SkerryError, match="answers NaN or infinity"):
        compress(tmp_path / "m.onnx", {"x": -np.ones((50, 4), np.float32)}, tmp_path / "out")


def test_a_model_with_nothing_to_compress_says_so_and_is_not_made_worse(tmp_path: Path) -> None:
    ends = [helper.make_tensor_value_info("x", 1, ["n", 4]), helper.make_tensor_value_info("y", 1, ["n", 4])]
    root = helper.make_graph([helper.make_node("Sigmoid", ["x"], ["y"])], "g", ends[:1], ends[1:])
    model = helper.make_model(root, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    report = compress(tmp_path / "m.onnx", {"x": x}, tmp_path / "out", device="x86-avx2")
    assert report.drop == 0
    assert any("nothing to compress" in note for note in report.details.notes)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [({"max_drop": -1.0}, "budget is -1"), ({"goal": "beauty"}, "goal is 'beauty'"), ({"seed": -1}, "seed is -1")],
)
def test_an_argument_that_makes_no_sense_is_a_usage_error(arguments: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=sentence):
        compress(tmp_path / "m.onnx", {}, tmp_path / "out", **arguments)


def test_a_folder_with_other_files_is_never_overwritten(small_net: Build, tmp_path: Path) -> None:
    net = small_net("plain")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="holds files that are not an earlier result"):
        compress(written(net, tmp_path), net.data, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


def test_an_earlier_result_is_replaced_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", {"report.json": b"1", "model.tflite": b"1"})
    write_folder(tmp_path / "out", {"report.json": b"2"})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["out"]


@pytest.mark.parametrize("at", range(1, 9))
def test_a_disk_that_fills_up_leaves_the_earlier_result_and_nothing_else(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "out", {"report.json": b"earlier"})
    calls = 0

    def full(kind: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return kind(*arguments, **named)

        return call

    monkeypatch.setattr(os, "fsync", full(os.fsync))
    monkeypatch.setattr(os, "mkdir", full(os.mkdir))
    monkeypatch.setattr(Path, "rename", full(Path.rename))
    try:
        write_folder(tmp_path / "out", {"report.json": b"later", "model.onnx": b"m"})
    except StorageError as error:
        assert "no space left to write" in str(error)
        committed = (tmp_path / "out" / "model.onnx").exists()
        assert (tmp_path / "out" / "report.json").read_bytes() == (b"later" if committed else b"earlier")
    else:
        # The first call asks for a parent folder that is there already, so its refusal does not matter.
        assert at == 1 or calls < at
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["out"]


@pytest.mark.parametrize(
    ("moment", "left"),
    [("reading the model and the data", ["model.onnx"]), ("looking at the report part", [".out.work", "model.onnx"])],
)
def test_an_interrupt_leaves_no_result_and_the_best_so_far_beside_it(
    moment: str, left: list[str], small_net: Build, tmp_path: Path
) -> None:
    def interrupt(stage: str, _share: float, _best: str) -> None:
        if stage == moment:
            raise KeyboardInterrupt

    net = small_net("plain")
    path = written(net, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        compress(path, net.data, tmp_path / "out", device="x86-avx2", progress=interrupt)
    assert sorted(item.name for item in tmp_path.iterdir() if item.name != "home") == left
    if ".out.work" in left:
        assert (tmp_path / ".out.work" / "best" / "model.onnx").stat().st_size < path.stat().st_size


TORCH_NET = """
import torch
def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
                               torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4))
def number():
    return 42
class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.end = torch.nn.LSTM(12, 16, batch_first=True), torch.nn.Linear(16, 4)
    def forward(self, x):
        return self.end(self.net(x[:, 0])[0][:, -1])
class Singular(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.svd(x)[0]
"""


@pytest.fixture
def torch_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_net_for_this_test.py").write_text(TORCH_NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "a_net_for_this_test", raising=False)
    return "a_net_for_this_test"


def test_a_torch_module_is_exported_and_compressed(torch_net: str, small_net: Build, tmp_path: Path) -> None:
    import torch

    module = __import__(torch_net).make()
    torch.save(module.state_dict(), tmp_path / "w.pth")
    x = small_net("plain").x
    report = compress(
        f"{torch_net}:make", {"x": x}, tmp_path / "out", device="x86-avx2", max_drop=20, weights=tmp_path / "w.pth"
    )
    assert report.metric_name == "agreement"
    assert report.result.metric > 0.8


@pytest.mark.parametrize("reference", ["net_in_this_folder.py:make", "net_in_this_folder:make", "{folder}/net.py:make"])
def test_a_factory_in_a_file_needs_no_python_path(
    reference: str, small_net: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("net_in_this_folder.py", "net.py"):
        (tmp_path / name).write_text("from layers_beside_it import make\n")
    (tmp_path / "layers_beside_it.py").write_text(TORCH_NET)
    (tmp_path / "skills.py").write_text("raise SystemExit('this took the place of ours')\n")
    monkeypatch.chdir(tmp_path)
    for name in ("net_in_this_folder", "layers_beside_it"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = list(sys.path)
    source = model.load(reference.format(folder=tmp_path), None, small_net("plain").x)
    assert source.model.graph.node
    assert sys.path == before


def test_a_recurrent_layer_is_left_alone(torch_net: str, small_net: Build, tmp_path: Path) -> None:
    # 1,000 samples in batches of 64 leave a shorter last one: the second size of an LSTM's tensors is the batch.
    x = small_net("plain").x
    report = compress(f"{torch_net}:Recurrent", {"x": x}, tmp_path / "out", device="x86-avx2", max_drop=20)
    assert report.result.metric > 0.8
    assert report.details.kernels["LSTM"] == 1


def test_an_operator_that_cannot_be_exported_is_named_and_nothing_else_is_printed(
    torch_net: str, small_net: Build, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FormatError, match="cannot be exported to ONNX: .*linalg_svd") as caught:
        compress(f"{torch_net}:Singular", {"x": small_net("plain").x}, tmp_path / "out")
    assert one_line(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("reference", "kind", "sentence"),
    [
        ("no_such_package_here:make", NotFound, "there is no module 'no_such_package_here'"),
        ("{net}:nothing", NotFound, "has no function 'nothing'"),
        ("{net}:number", FormatError, "gave int, expected a torch module"),
        (":make", UsageError, "neither a file, nor file.py:factory, nor package.module:factory"),
        ("nowhere.py:make", NotFound, "there is no file nowhere.py"),
        ("{folder}/broken.py:make", FormatError, "broken.py line 1"),
    ],
)
def test_a_wrong_factory_is_one_sentence(
    reference: str, kind: type[SkerryError], sentence: str, torch_net: str, small_net: Build, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text("def make(:\n")
    with pytest.raises(kind, match=sentence) as caught:
        compress(reference.format(net=torch_net, folder=tmp_path), {"x": small_net("plain").x}, tmp_path / "out")
    assert one_line(caught.value)


def test_weights_of_another_net_are_refused(torch_net: str, small_net: Build, tmp_path: Path) -> None:
    import torch

    torch.save({"other.weight": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(FormatError, match=r"w.pth do not fit the model"):
        compress(f"{torch_net}:make", {"x": small_net("plain").x}, tmp_path / "out", weights=tmp_path / "w.pth")


def test_numpy_weights_are_stored_raw_so_that_small_numbers_stay_small() -> None:
    from compress import graph

    value = np.arange(-100, 100, dtype=np.int8)
    assert len(graph.tensor("w", value).SerializeToString()) < 220
    assert (numpy_helper.to_array(graph.tensor("w", value)) == value).all()
