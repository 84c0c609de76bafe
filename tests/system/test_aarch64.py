"""The emulated 64-bit Arm: the agent joins, takes the skill and reads one digit as x86 does; packed weights unfold."""

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compress import profiles
from compress.emit import emit, layer_codes
from compress.passes.canonicalise import canonicalise
from compress.passes.place import place
from compress.passes.ranges import activations
from compress.statistics import observe
from compress.weights import TERNARY

ROOT = Path(__file__).parent.parent.parent
ARM = ROOT / ".venv-aarch64"
# Under user-mode emulation a child is started through the emulator's wrapper, not through the Arm binary itself.
DRIVER = "import sys; sys.executable = {python!r}; from edge_agent.__main__ import main; main()"


@pytest.fixture(scope="module")
def arm_python() -> Path:
    """The emulated Python with this checkout's wheel in it."""
    missing = [name for name in ("qemu-aarch64-static", "mmdebstrap") if shutil.which(name) is None]
    wheels = sorted((ROOT / "build" / "wheel").glob("skerry-*.whl"))
    if missing or not wheels:
        message = f"not run: {', '.join(missing) or 'a wheel in build/wheel (scripts/test makes one)'} is missing"
        if os.environ.get("SKERRY_REQUIRE_AARCH64"):
            pytest.fail(message)
        pytest.skip(message)
    done = subprocess.run(
        [ROOT / "scripts" / "aarch64", wheels[-1]], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return ARM / "python"


@pytest.mark.aarch64
@pytest.mark.timeout(400)
def test_an_arm_board_takes_the_skill_and_answers_as_x86_does(arm_python, built_digits, person_with_controller) -> None:
    person, (folder, _) = person_with_controller, built_digits
    person.run("skerry", "skill", "build", folder, "-o", "digits.skb")
    person.run("skerry", "skill", "publish", "digits.skb")
    token = person.json("skerry", "devices", "invite")["token"]
    agent = [arm_python, "-P", "-c", DRIVER.format(python=str(arm_python))]
    person.run(*agent, "enroll", token, "--name", "board", "--data", "board")
    (person.home / "board" / "agent.yaml").write_text("listen: 127.0.0.1:0\n")
    with person.running([*agent, "run", "--data", "board"], "skills at"):
        person.run("skerry", "push", "digits", "--to", "arch=aarch64", "--wait", timeout=200)
        golden = np.load(folder / "probe.npz")
        np.save(person.home / "digit.npy", golden["in.image"][:1])
        answer = person.json("skerry", "infer", "digits", "--device", "board", "digit.npy", timeout=100)
    assert answer["outputs"]["digit"]["data"] == golden["out.digit"][:1].tolist()


UNFOLD = """
import sys, numpy, onnxruntime
x = numpy.load("x.npy")
for bits in sys.argv[1:]:
    answers = []
    for form in ("packed", "plain"):
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.optimized_model_filepath = 3, f"{form}{bits}.optimised"
        answers.append(onnxruntime.InferenceSession(f"{form}{bits}.onnx", options).run(None, {"x": x})[0])
    print(bits, (answers[0] == answers[1]).all())
"""


@pytest.mark.aarch64
@pytest.mark.timeout(400)
def test_every_stored_width_unfolds_on_an_arm_board_into_its_int8_kernels(arm_python, small_net, tmp_path) -> None:
    net = small_net("residual")
    model = canonicalise(net.model)
    seen = observe(model, activations(model), net.x[:50], lambda _share: None)
    scheme = place(model, seen, profiles.find("arm64-onnxruntime"), depthwise="int8", others="int8")
    values = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    old = dataclasses.replace(scheme.profile, runtime_min="1.17")
    np.save(tmp_path / "x.npy", net.x[:8])
    widths = (8, 4, 3, 2, TERNARY)
    for bits in widths:
        narrow = scheme.with_bits({layer.node: bits for layer in scheme.layers})
        codes = {layer.node: layer_codes(layer, values[layer.weight], 8) for layer in narrow.layers}
        same = {node: dataclasses.replace(found, bits=8) for node, found in codes.items()}
        biases = {
            layer.node: values[node.input[2]].astype(np.float16).astype(np.float32)
            for layer in scheme.layers
            for node in model.graph.node
            if node.name == layer.node and len(node.input) > 2
        }
        plain = dataclasses.replace(scheme, profile=old).with_codes(same).with_biases(biases)
        (tmp_path / f"packed{bits}.onnx").write_bytes(emit(model, narrow, seen).SerializeToString())
        (tmp_path / f"plain{bits}.onnx").write_bytes(emit(model, plain, seen).SerializeToString())
    (tmp_path / "unfold.py").write_text(UNFOLD)
    done = subprocess.run(
        [arm_python, "unfold.py", *(str(bits) for bits in widths)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{bits} True" for bits in widths]
    for bits in widths:
        kinds = {node.op_type for node in onnx.load(tmp_path / f"packed{bits}.optimised").graph.node}
        assert {"QLinearConv", "QGemm"} <= kinds
        assert not {"Conv", "Gemm", "Cast", "Div", "Mod", "Split", "Mul"} & kinds
