"""Chapter d: an update, a model that went wrong, two kinds of tampering, and the way back."""

import importlib.util
from pathlib import Path
from typing import Any

from cloud.authoring import build_skill
from cloud.demo.facts import Arrival, Refusal, Update
from cloud.demo.scene import Scene, arrivals, replaced
from cloud.demo.smaller import Workpiece
from cloud.publish import publish
from cloud.views import RolloutView
from skills import signing
from skills.bundle import open_bundle
from skills.desired import ObjectRef
from skills.errors import TrustError
from skills.files import write_atomic
from skills.units import readable

TITLE = "Kept right: an update, a mistake, two attacks, the way back"
FIRST = "dock"  # the device that goes first
WHERE = "site=harbour"


def tell(scene: Scene, piece: Workpiece) -> tuple[Update, tuple[Refusal, ...], tuple[Arrival, ...]]:
    """Tell the chapter."""
    scene.chapter(
        "d",
        TITLE,
        "Four more releases follow. One is good; the others must not serve on any device, each for another reason.",
    )
    update = _update(scene, piece)
    refusals = [_miscalibrated(scene, piece), _flipped_byte(scene, piece), *_strangers_key(scene, piece)]
    return update, tuple(refusals), _way_back(scene)


# --- 1.1.0: only what changed travels ---------------------------------------------------------------


def _update(scene: Scene, piece: Workpiece) -> Update:

    factor = sharpness(piece)
    before, after = sureness(piece, 1.0), sureness(piece, factor)
    _head(scene, "1.1.0", "better control code: its confidence shall say how often it is right")
    scene.say(
        f"[dim]mean confidence on held-out digits {before:.1%} → {after:.1%}, right {piece.built.trained.accuracy:.1%}[/dim]"
    )
    folder = scene.folder / "digits-1.1.0"
    replaced(
        piece.folder,
        folder,
        skill_yaml=_version("1.1.0"),
        classify_py=(".astype(np.float64)", f".astype(np.float64) * {factor:g}"),
    )
    write_probe(piece, folder)
    file = _build(scene, folder)
    bundle = open_bundle(file).bundle
    done = publish(scene.client, file, scene.publisher_key)
    ended, seconds = _push(scene, "1.1.0")
    came = [member for member in ended.devices if member.stage == "serving"]
    received, reused = max((m.received_bytes for m in came), default=0), min((m.reused_bytes for m in came), default=0)
    scene.say(
        f"the bundle has {readable(bundle.size)}; {readable(done.uploaded_bytes)} of it had to be uploaded, "
        f"{readable(received)} reached each device, its share of the repository's metadata included"
    )
    scene.claim(
        "both devices serve 1.1.0", _serving(scene) == {"dock": "1.1.0", "lighthouse": "1.1.0"}, f"{seconds:.1f} s"
    )
    text = f"{readable(received)} received, {readable(reused)} reused"
    scene.claim("parts that a device has do not travel", 0 < received < reused, text)
    return Update(bundle.size, done.uploaded_bytes, round(seconds, 2), arrivals(ended))


def sharpness(piece: Workpiece) -> float:
    """Return the factor for the logits with which the float net is, on its training digits, as sure as it is right."""
    import numpy as np

    from skills import ort

    trained = piece.built.trained
    logits = ort.session(trained.onnx).run({"x": trained.x_train})["logits"]
    right = float((logits.argmax(1) == trained.y_train).mean())
    low, high = 0.5, 3.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if _mean_confidence(np.asarray(logits), middle) < right else (low, middle)
    return round(low, 2)


def sureness(piece: Workpiece, factor: float) -> float:
    """Return the float net's mean confidence on the held-out digits, its logits taken times `factor`."""
    from skills import ort

    return _mean_confidence(ort.session(piece.built.trained.onnx).run({"x": piece.built.trained.x})["logits"], factor)


def _mean_confidence(logits: Any, factor: float) -> float:
    import numpy as np

    scaled = logits.astype(np.float64) * factor
    odds = np.exp(scaled - scaled.max(1, keepdims=True))
    return float((odds.max(1) / odds.sum(1)).mean())


def write_probe(piece: Workpiece, folder: Path) -> None:
    """Write golden outputs for changed control code: the float net's, for the same golden pictures."""
    import numpy as np

    from skills import ort

    spec = importlib.util.spec_from_file_location("digits_changed", folder / "classify.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(folder / "classify.py")
    code: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    session = ort.session(piece.built.trained.onnx)
    with np.load(folder / "probe.npz") as probe:
        image = probe["in.image"]
    answer = code.classify({"image": image}, lambda x: session.run({"x": x}))
    np.savez_compressed(
        folder / "probe.npz", **{"in.image": image, **{f"out.{name}": value for name, value in answer.items()}}
    )


# --- 1.2.0: a model that went wrong -----------------------------------------------------------------


def _miscalibrated(scene: Scene, piece: Workpiece) -> Refusal:
    _head(
        scene,
        "1.2.0",
        "a mistake: calibrated on inputs of the wrong scale. It loads, it runs, its signature is valid; it answers wrongly",
    )
    wrong, folder = scene.folder / "digits-wrong", scene.folder / "digits-1.2.0"
    with scene.working("compressing with the mistake in it") as step:
        built = piece.recipe.assemble(piece.built.trained, wrong, lambda what, share, best: step(what, share), "wrong")
    replaced(wrong, folder, skill_yaml=_version("1.2.0"))
    scene.say(
        f"on held-out digits this model is right {built.report.result.metric:.1%} of the time; nothing tells the devices so"
    )
    publish(scene.client, _build(scene, folder), scene.publisher_key)
    ended, _ = _push(scene, "1.2.0")
    return _refused(
        scene,
        ended,
        "mis-quantized model",
        "the probe fails on the device, which therefore never serves it",
        ("probe", "golden", "digit"),
    )


# --- 1.3.0: a byte in the controller's store --------------------------------------------------------


def _flipped_byte(scene: Scene, piece: Workpiece) -> Refusal:
    import onnx

    _head(scene, "1.3.0", "an attack: after the release one byte of the model is changed in the controller's own store")
    folder = scene.folder / "digits-1.3.0"
    replaced(piece.folder, folder, skill_yaml=_version("1.3.0"))
    path = folder / "models" / "digits-int8.onnx"
    model = onnx.load(path)
    model.doc_string = "1.3.0"
    onnx.save(model, path)
    file = _build(scene, folder)
    publish(scene.client, file, scene.publisher_key)
    part = next(part for part in open_bundle(file).bundle.parts if part.path == "models/digits-int8.onnx")
    stored = scene.folder / "controller" / "objects" / part.wire_sha256
    clean = stored.read_bytes()
    at = len(clean) // 2
    write_atomic(stored, clean[:at] + bytes([clean[at] ^ 0x01]) + clean[at + 1 :])
    scene.say(f"byte {at:,} of {part.path} is {clean[at]:#04x} no longer, it is {clean[at] ^ 0x01:#04x}")
    try:
        ended, _ = _push(scene, "1.3.0")
    finally:
        write_atomic(stored, clean)
    return _refused(
        scene, ended, "byte changed in the store", "the device finds the changed byte and refuses", ("sha256", "hash")
    )


# --- 1.4.0: a stranger's signature ------------------------------------------------------------------


def _strangers_key(scene: Scene, piece: Workpiece) -> tuple[Refusal, ...]:
    _head(scene, "1.4.0", "an attack: a bundle signed with a key that the repository does not list")
    folder = scene.folder / "digits-1.4.0"
    replaced(piece.folder, folder, skill_yaml=_version("1.4.0"), classify_py=('"""Read', '"""Pretend to read'))
    file, key = _build(scene, folder), scene.folder / "stranger.pem"
    signing.save_key(signing.new_key(), key)
    said = ""
    try:
        publish(scene.client, file, key)
    except TrustError as error:
        said = str(error)
    scene.claim("the controller does not take it", said, said)
    first = Refusal("foreign signature, at the API", "1.4.0", "controller", "refused", said, "")

    scene.say("[dim]so the attacker writes it into the repository behind the controller's back, on its own disk[/dim]")
    bundle = open_bundle(file)
    target = signing.release_target("digits", "1.4.0")
    manifest = ObjectRef(bundle.digest, len(bundle.manifest_bytes))
    clean = scene.client.metadata("targets")
    forged = signing.add_release(clean, target, manifest, signing.load_key(key), now())
    _with_targets(scene, forged)
    ended, _ = _push(scene, "1.4.0")
    second = _refused(
        scene,
        ended,
        "foreign signature, in the repository",
        "the device does not take it either",
        ("sign", "key", "targets"),
    )
    # The publisher repairs the list: the same releases under the right key, with the next version number.
    _with_targets(scene, signing.add_release(clean, target, manifest, signing.load_key(scene.publisher_key), now()))
    return first, second


def _with_targets(scene: Scene, targets: bytes) -> None:
    """Restart the controller on another list of releases."""
    with scene.working("restarting the controller") as step:
        scene.stop_controller()
        write_atomic(scene.folder / "controller" / "repository" / "targets.json", targets)
        step("its devices come back", 0.5)
        scene.start_controller()
        scene.wait_online("dock", "lighthouse")


def now() -> Any:
    """Return the time, for a signature's expiry."""
    from datetime import UTC, datetime

    return datetime.now(UTC)


# --- the way back ----------------------------------------------------------------------------------


def _way_back(scene: Scene) -> tuple[Arrival, ...]:
    scene.say("")
    scene.say(f"[cyan]$ skerry rollback digits --to {WHERE} --wait[/cyan]")
    ended, seconds = scene.follow(scene.client.rollback("digits", WHERE))
    found = _serving(scene)
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    back = found == {"dock": "1.0.0", "lighthouse": "1.0.0"}
    scene.claim("every device is back at what it served before", back, f"{versions}, {seconds:.1f} s")
    return arrivals(ended)


# --- what they share -------------------------------------------------------------------------------


def _head(scene: Scene, version: str, text: str) -> None:
    scene.say("")
    scene.say(f"[bold]{version}[/bold]  {text}")


def _version(version: str) -> tuple[str, str]:
    return "version: 1.0.0", f"version: {version}"


def _build(scene: Scene, folder: Path) -> Path:
    file = folder.with_suffix(folder.suffix + ".skb")
    with scene.working("building the bundle") as step:
        build_skill(folder, file, lambda text: step(text, 0.5))
    return file


def _push(scene: Scene, version: str) -> tuple[RolloutView, float]:
    scene.say(f"[cyan]$ skerry push digits@{version} --to {WHERE} --canary 1 --wait[/cyan]")
    return scene.follow(scene.client.push("digits", version, WHERE, "1"))


def _serving(scene: Scene) -> dict[str, str]:
    serving = {device.id: device.serving("digits") for device in scene.client.devices()}
    return {name: entry.version for name, entry in serving.items() if entry is not None}


def _refused(scene: Scene, ended: RolloutView, what: str, text: str, words: tuple[str, ...]) -> Refusal:
    """Check that the first device refused for the right reason, that the rollout halted, and that the old version answers."""
    from skills.oip import Call

    member = next(member for member in ended.devices if member.device == FIRST)
    entry = scene.client.device(FIRST).serving("digits")
    import numpy as np

    answer, _ = scene.boards[FIRST].ask("digits", Call({"image": np.zeros((1, 8, 8), np.uint8)}))
    old = entry.version if entry is not None else "nothing"
    reason = member.reason or ended.reason
    scene.claim(text, member.stage == "failed" and any(word in reason.lower() for word in words))
    others = [other.stage for other in ended.devices if other.device != FIRST]
    stopped = ended.state == "halted" and "serving" not in others
    scene.claim(
        "it stops there, and 1.1.0 goes on",
        stopped and old == answer.version == "1.1.0",
        f"the rollout halted, {FIRST} answers with {answer.version}",
    )
    return Refusal(what, str(ended.version), FIRST, member.stage, reason, old)
