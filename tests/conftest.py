"""What all tests share: where the reference models are, and a clean environment."""

import dataclasses
import functools
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from skills.bundle import BundleFile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROOT = Path(__file__).parent.parent
IN_CI = os.environ.get("CI") == "true"


def reference_folder() -> Path:
    return Path(os.environ.get("SKERRY_REFERENCE", ROOT.parent / "shared" / "data"))


@pytest.fixture
def reference() -> Path:
    """The folder of reference models and data; where it is absent a test is listed as not run, and fails in CI."""
    folder = reference_folder()
    if not folder.is_dir():
        message = f"the reference models are not at {folder} (set SKERRY_REFERENCE)"
        if IN_CI:
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the home of the person who runs it."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "SKERRY_URL", "SKERRY_TOKEN", "SKERRY_CA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def small_bundle(tmp_path: Path) -> "Callable[..., BundleFile]":
    """Build a bundle of the skill `tiny`, whose model is only bytes: for whoever delivers and never runs it."""
    from skills.bundle import build_bundle, open_bundle

    def build(
        version: str, model_bytes: int = 100_000, code: str = "def run(inputs, model):\n    return model(**inputs)\n"
    ) -> BundleFile:
        folder = tmp_path / f"tiny-{version}"
        folder.mkdir(exist_ok=True)
        folder.joinpath("model.onnx").write_bytes(random.Random(version).randbytes(model_bytes))  # noqa: S311 - no secret
        folder.joinpath("run.py").write_text(code)
        folder.joinpath("probe.npz").write_bytes(b"probe")
        folder.joinpath("skill.yaml").write_text(TINY_SKILL.format(version=version))
        build_bundle(folder, folder / "tiny.skb")
        return open_bundle(folder / "tiny.skb")

    return build


@pytest.fixture
def split_bundle(tmp_path: Path) -> "Callable[..., BundleFile]":
    """Build a bundle of the split skill `halves`, whose two segments are only bytes of that version."""
    from skills.bundle import build_bundle, open_bundle
    from skills.coding import Coding, Live
    from skills.files import sha256_hex
    from skills.split_plan import Cut, Millis, Plan, Segment
    from skills.wire import encode_yaml

    def build(version: str) -> BundleFile:
        folder = tmp_path / f"halves-{version}"
        (folder / "split").mkdir(parents=True, exist_ok=True)
        x, middle, y = (Live(name, "FP32", (-1, 4)) for name in ("x", "middle", "y"))
        no_time = Millis(0.0, 0.0)
        segments = []
        for at, (source, out) in enumerate((("x", "middle"), ("middle", "y"))):
            data = f"segment {at} of {version}".encode()
            (folder / f"split/{at}.onnx").write_bytes(data)
            segments.append(Segment(f"{at}.onnx", sha256_hex(data), len(data), (source,), (out,)))
        cuts = (
            Cut("input", 0, no_time, no_time, (x,), (Coding("native"),), raw=True),
            Cut("c1", 1, no_time, no_time, (middle,), (Coding("native"),)),
            Cut("local", 2, no_time, no_time),
        )
        folder.joinpath("split/split.yaml").write_text(encode_yaml(Plan("0" * 64, (x,), (y,), tuple(segments), cuts)))
        folder.joinpath("run.py").write_text("def run(inputs, model):\n    return model(**inputs)\n")
        folder.joinpath("probe.npz").write_bytes(b"probe")
        folder.joinpath("skill.yaml").write_text(
            TINY_SKILL.format(version=version)
            .replace("file: model.onnx", "split: split/split.yaml")
            .replace("tiny", "halves")
        )
        build_bundle(folder, folder / "halves.skb")
        return open_bundle(folder / "halves.skb")

    return build


@pytest.fixture
def csr() -> "Callable[[], str]":
    """Make a new device key each time and return a certificate request for it."""
    return lambda: make_csr()[0]


@pytest.fixture
def new_csr() -> "Callable[[], tuple[str, bytes]]":
    """Make a new device key each time and return (certificate request, private key), both PEM."""
    return make_csr


def make_csr() -> tuple[str, bytes]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "whatever")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return request.public_bytes(Encoding.PEM).decode(), pem


TINY_SKILL = """\
format: skill/v1
name: tiny
version: {version}
inputs: [{{name: x, dtype: FP32, shape: [-1, 4]}}]
outputs: [{{name: y, dtype: FP32, shape: [-1, 2]}}]
models:
  tiny: {{variants: [{{name: float, runtime: onnxruntime, file: model.onnx}}]}}
stages: [{{name: run, model: tiny, code: run.py}}]
"""


@pytest.fixture
def small_net() -> "Callable[[str], SmallNet]":
    """Build a small net that tells four patterns apart; the kinds are those of `SMALL_NETS`."""
    return make_small_net


@dataclasses.dataclass(frozen=True, slots=True)
class SmallNet:
    """An ONNX model with unfolded batch-norm, and 1,000 noisy 12x12 pictures (or series of 12 steps) that it gets right."""

    model: Any
    x: "NDArray[np.float32]"
    y: "NDArray[np.int64]"

    @property
    def data(self) -> "dict[str, NDArray[Any]]":
        return {"x": self.x, "y": self.y}


PICTURES = ("plain", "residual", "shortcut", "depthwise", "silu", "hardswish", "squeeze", "transposed")
SERIES = ("conv1d", "lstm", "gru", "transformer")
SMALL_NETS = (*PICTURES, *SERIES)


@functools.cache
def make_small_net(kind: str) -> SmallNet:  # noqa: C901 - one branch a kind of net
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    from skills import ort

    chance = np.random.default_rng(7)
    nodes: list[Any] = []
    stored: list[Any] = []

    def constant(name: str, value: Any) -> str:
        stored.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def whole(name: str, value: Any) -> str:
        stored.append(numpy_helper.from_array(np.asarray(value, np.int64), name))
        return name

    def node(op: str, *inputs: str, **facts: Any) -> str:
        name = f"n{len(nodes)}"
        nodes.append(helper.make_node(op, list(inputs), [name], name, **facts))
        return name

    def dense(source: str, into: int, out: int) -> str:
        name = f"m{len(nodes)}"
        return node("MatMul", source, constant(name, chance.standard_normal((into, out)) * into**-0.5))

    def conv(
        source: str, into: int, out: int, size: int, *, act: str = "Relu", groups: int = 1, stride: int = 1
    ) -> str:
        name = f"c{len(nodes)}"
        kernel = (size,) * (1 if kind in SERIES else 2)
        weight = (
            chance.standard_normal((out, into // groups, *kernel)) * (2 * groups / (into * size ** len(kernel))) ** 0.5
        )
        pads = [size // 2] * 2 * len(kernel)
        facts = {"pads": pads, "group": groups, "strides": [stride] * len(kernel)}
        nodes.append(helper.make_node("Conv", [source, constant(name + "w", weight)], [name], name, **facts))
        norm = [
            0.5 + chance.random(out),
            0.2 * chance.standard_normal(out),
            0.1 * chance.standard_normal(out),
            0.5 + chance.random(out),
        ]
        nodes.append(
            helper.make_node(
                "BatchNormalization", [name, *(constant(f"{name}n{at}", v) for at, v in enumerate(norm))], [name + "b"]
            )
        )
        if act == "Clip":
            nodes.append(
                helper.make_node(
                    "Clip", [name + "b", constant(name + "lo", 0.0), constant(name + "hi", 6.0)], [name + "a"]
                )
            )
        elif act:
            nodes.append(helper.make_node(act, [name + "b"], [name + "a"]))
        return name + ("a" if act else "b")

    def recurrent(op: str, gates: int) -> str:
        weights = [chance.standard_normal((1, gates * 32, size)) * size**-0.5 for size in (12, 32)]
        steps = node("Transpose", "x", perm=[1, 0, 2])
        inputs = [steps, *(constant(f"r{at}", weight) for at, weight in enumerate(weights))]
        nodes.append(helper.make_node(op, inputs, ["", "state"], "recurrent", hidden_size=32))
        return node("Squeeze", "state", whole("first", [0]))

    def normed(source: str) -> str:
        name = f"l{len(nodes)}"
        return node("LayerNormalization", source, constant(name + "g", np.ones(32)), constant(name + "b", np.zeros(32)))

    def transformer() -> str:
        tokens = node("Add", dense("x", 12, 32), constant("places", chance.standard_normal((12, 32))))
        query, key, value = (dense(tokens, 32, 32) for _ in range(3))
        seen = node("MatMul", query, node("Transpose", key, perm=[0, 2, 1]))
        heat = node("Softmax", node("Mul", seen, constant("scale", 32**-0.5)), axis=-1)
        tokens = normed(node("Add", tokens, dense(node("MatMul", heat, value), 32, 32)))
        tokens = normed(node("Add", tokens, dense(node("Relu", dense(tokens, 32, 64)), 64, 32)))
        return node("ReduceMean", tokens, axes=[1], keepdims=0)

    def pictures() -> str:
        last = conv("x", 1, 16, 3)
        nodes.append(helper.make_node("MaxPool", [last], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]))
        last = "pooled"
        match kind:
            case "residual":
                nodes.append(helper.make_node("Add", [conv(conv(last, 16, 16, 3), 16, 16, 3, act=""), last], ["sum"]))
                nodes.append(helper.make_node("Relu", ["sum"], ["summed"]))
                last = "summed"
            case "shortcut":
                few = conv(last, 16, 8, 1)
                ends = (whole(f"cut {at}", value) for at, value in enumerate(([0, 0], [99, 99], [2, 3], [2, 2])))
                more = node("Pad", node("Slice", few, *ends), whole("pads", [0, 4, 0, 0, 0, 4, 0, 0]))
                last = node("Relu", node("Add", conv(few, 8, 16, 3, act="", stride=2), more))
            case "depthwise":
                last = conv(last, 16, 16, 3, act="Clip", groups=16)
                last = conv(last, 16, 16, 1, act="Clip")
            case "silu":
                last = conv(last, 16, 16, 3, act="")
                last = node("Mul", last, node("Sigmoid", last))
            case "hardswish":
                last = conv(last, 16, 16, 3, act="HardSwish")
            case "squeeze":
                mean = node("GlobalAveragePool", last)
                gate = node("Sigmoid", conv(conv(mean, 16, 8, 1), 8, 16, 1, act=""))
                last = node("Mul", last, gate)
            case "transposed":
                weight = constant("up", chance.standard_normal((16, 16, 2, 2)) * 0.25)
                last = node("Relu", node("ConvTranspose", last, weight, strides=[2, 2]))
        return node("Flatten", node("GlobalAveragePool", conv(last, 16, 32, 3)))

    match kind:
        case "conv1d":
            pooled = node("MaxPool", conv("x", 12, 16, 3), kernel_shape=[2], strides=[2])
            features = node("Flatten", node("GlobalAveragePool", conv(pooled, 16, 32, 3)))
        case "lstm":
            features = recurrent("LSTM", 4)
        case "gru":
            features = recurrent("GRU", 3)
        case "transformer":
            features = transformer()
        case _:
            features = pictures()
    nodes[-1].output[0] = features = "features"
    shape = (12, 12) if kind in SERIES else (1, 12, 12)

    def finished(ends: list[Any], nodes: list[Any]) -> Any:
        body = helper.make_graph(nodes, kind, [helper.make_tensor_value_info("x", 1, ["n", *shape])], ends, stored)
        return helper.make_model(
            body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="a test"
        )

    pattern = chance.standard_normal((4, *shape))
    y = chance.integers(0, 4, 1000)
    x = (pattern[y] + 0.35 * chance.standard_normal((1000, *shape))).astype(np.float32)
    trunk = finished([helper.make_tensor_value_info("features", 1, ["n", 32])], nodes)
    found = ort.session(trunk.SerializeToString()).run({"x": x})[features]
    design = np.concatenate([found, np.ones((len(x), 1))], axis=1)
    wanted = np.eye(4)[y] * 8
    if kind == "transformer":  # its features hardly vary: without a ridge the head would blow up the last bit of each
        design, wanted = np.concatenate([design, np.eye(33)]), np.concatenate([wanted, np.zeros((33, 4))])
    answer = np.linalg.lstsq(design, wanted, rcond=None)[0]
    head = [constant("head", answer[:-1]), constant("offset", answer[-1])]
    nodes.append(helper.make_node("Gemm", ["features", *head], ["logits"], "head"))
    model = finished([helper.make_tensor_value_info("logits", 1, ["n", 4])], nodes)
    onnx.checker.check_model(model)
    return SmallNet(model, x, y)


@pytest.fixture(scope="session")
def detector() -> bytes:
    """A net of a detector's shape: scores (n, 1728, 2) and boxes (n, 1728, 4) for a picture (n, 1, 48, 48)."""
    import numpy as np
    from onnx import helper, numpy_helper

    chance = np.random.default_rng(3)
    stored = [numpy_helper.from_array(chance.normal(0, 0.3, (16, 1, 3, 3)).astype(np.float32), "w")]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["r"]),
    ]
    for name, wide in (("scores", 2), ("boxes", 4)):
        weight = chance.normal(0, 0.2, (3 * wide, 16, 3, 3)).astype(np.float32)
        stored += [
            numpy_helper.from_array(weight, f"{name}_w"),
            numpy_helper.from_array(np.array([0, -1, wide]), f"{name}_s"),
        ]
        nodes += [
            helper.make_node("Conv", ["r", f"{name}_w"], [f"{name}_c"], pads=[1, 1, 1, 1]),
            helper.make_node("Transpose", [f"{name}_c"], [f"{name}_t"], perm=[0, 2, 3, 1]),
            helper.make_node("Reshape", [f"{name}_t", f"{name}_s"], ["logits" if name == "scores" else name]),
        ]
    nodes.append(helper.make_node("Sigmoid", ["logits"], ["scores"]))
    ends = [
        helper.make_tensor_value_info(name, 1, shape)
        for name, shape in (("x", ["n", 1, 48, 48]), ("scores", ["n", 1728, 2]), ("boxes", ["n", 1728, 4]))
    ]
    graph = helper.make_graph(nodes, "detector", ends[:1], ends[1:], stored)
    opset = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())


@pytest.fixture(scope="session")
def planned_detector(detector: bytes, tmp_path_factory: pytest.TempPathFactory) -> "PlannedNet":
    """A split plan of a net of a detector's shape, whose answer of 41 kB may come back coded."""
    import numpy as np

    from cloud.split import split

    folder = tmp_path_factory.mktemp("detector") / "plan"
    x = np.random.default_rng(4).normal(0, 1, (24, 1, 48, 48)).astype(np.float32)
    split(detector, {"x": x}, out=folder, slowdown=10, rounds=2, most_samples=12, most_gate=24, max_drop=8.0)
    return PlannedNet(folder, detector, x)


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedNet:
    """A split plan in `folder`, the whole model it was made from, and inputs."""

    folder: Path
    model: bytes
    x: Any


@pytest.fixture(scope="session")
def planned_net(tmp_path_factory: pytest.TempPathFactory) -> PlannedNet:
    """A small residual net, planned for a device ten times slower."""
    from cloud.split import split

    net = make_small_net("residual")
    folder, model = tmp_path_factory.mktemp("plan") / "split", net.model.SerializeToString()
    split(model, {"x": net.x, "y": net.y}, slowdown=10, max_drop=5, out=folder, rounds=3, most_samples=24)
    return PlannedNet(folder, model, net.x)


@dataclasses.dataclass(frozen=True, slots=True)
class PlacedSkill:
    """A skill of two stages whose folder holds the plan of their placement, and inputs for it."""

    folder: Path
    x: Any

    def inputs(self, at: int = 0, order: int = 0, count: int = 1) -> "dict[str, Any]":
        """Return an input; orders 11 to 14 make the second stage misbehave at a tail (see its code)."""
        import numpy as np

        return {"image": self.x[at : at + count], "order": np.full((count, 1), order, np.int64)}


PLACED_SKILL = """\
name: shapes
version: 1.0.0
inputs:
  - {name: image, dtype: FP32, shape: [-1, 1, 12, 12]}
  - {name: order, dtype: INT64, shape: [-1, 1]}
outputs: [{name: logits, dtype: FP32, shape: [-1, 4]}]
models:
  net:
    variants: [{name: float, runtime: onnxruntime, file: net.onnx}]
stages:
  - {name: crop, model: net, code: stages.py}
  - {name: classify, model: net, code: stages.py}
assets: [scale.txt]
placement: split.yaml
"""
PLACED_CODE = """\
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__)
SCALE = float(HERE.with_name('scale.txt').read_text())

def crop(inputs, model):
    kept = np.zeros_like(inputs['image'])
    kept[:, :, 2:10, 2:10] = inputs['image'][:, :, 2:10, 2:10]
    return {'cut': kept, 'order': inputs['order']}

def classify(inputs, model):
    order = int(inputs['order'][0, 0])
    if 'tails' in HERE.parts:  # what only a tail does, as it is told
        if order == 11:
            raise ValueError('the tail is tired')
        if order == 12:
            return {'logits': np.zeros((1, 5), np.float32)}
        if order == 13:
            time.sleep(4)
        if order == 14:
            import os
            os._exit(3)
    return {'logits': model(x=inputs['cut'])['logits'] * np.float32(SCALE)}
"""


@pytest.fixture(scope="session")
def placed_skill(tmp_path_factory: pytest.TempPathFactory) -> PlacedSkill:
    """A skill whose second stage may run at a tail; its input can make that stage fail there."""
    import numpy as np

    from cloud.split.stages import plan_stages
    from edge_agent.worker import LoadedSkill
    from skills.manifest import load_skill
    from skills.timer import Local

    folder, net = tmp_path_factory.mktemp("placed") / "shapes", make_small_net("plain")
    folder.mkdir()
    (folder / "skill.yaml").write_text(PLACED_SKILL)
    (folder / "stages.py").write_text(PLACED_CODE)
    (folder / "scale.txt").write_text("2.0")
    (folder / "net.onnx").write_bytes(net.model.SerializeToString())
    x = net.x[:8]
    placed = PlacedSkill(folder, x)
    orders = np.array([[0], [15]] * 4, np.int64)
    plan_stages(folder, {"image": x, "order": orders}, rounds=1, max_drop=50, out=folder)
    skill = load_skill((folder / "skill.yaml").read_text(), "skill.yaml")
    golden = LoadedSkill(skill, folder, {"net": "float"}, Local(), None, 0.25).run_here(placed.inputs()).outputs
    np.savez(
        folder / "probe.npz",
        **{f"in.{name}": array for name, array in placed.inputs().items()},
        **{"out.logits": golden["logits"]},
    )
    return placed
