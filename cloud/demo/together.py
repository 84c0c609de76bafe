"""Chapter e: a photo classifier between a slow device and the cloud, and the cloud's part killed while requests flow."""

import dataclasses
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cloud.authoring import build_skill
from cloud.demo import measured
from cloud.demo.board import Board
from cloud.demo.facts import Times, Together
from cloud.demo.scene import Scene
from cloud.demo.smaller import load_recipe
from cloud.publish import publish
from skills.errors import DeadlineExceeded, SkerryError
from skills.files import write_atomic

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

TITLE = "Together: device and cloud answer with one model"
TEXT = (
    "EfficientNet-Lite0 with its ImageNet weights looks at real photos, on a device many times slower than this machine. "
    "Every cut is measured whole; staying local and sending the compressed photo are candidates like any other."
)
DEVICE_MS = 150.0  # what the whole model shall take on the slow device, on whatever machine the story is told
LINK = "20mbit/30ms"
BEFORE = 20  # answers before the tail is killed
BACK_DEADLINE_S = 25.0
FLOW_DEADLINE_S = 60.0


def tell(scene: Scene) -> Together:
    """Tell the chapter."""
    from cloud.cli import findings
    from cloud.split import LINKS
    from cloud.split.verdict import judge
    from skills import ort
    from skills.network import parse_link
    from skills.split_plan import load_plan

    scene.chapter("e", TITLE, TEXT)
    for name in ("lighthouse", "buoy"):
        scene.boards[name].stop()  # two cores only: what is measured now shall have them
    recipe, folder = load_recipe("photos"), scene.folder / "photos"
    x, slowdown = recipe.photos(), times_slower(recipe)
    scene.say(
        f"{len(x)} views of real photos from scikit-image and scikit-learn; the device is slowed down {slowdown:g} times, "
        f"so that the whole model takes about {DEVICE_MS:.0f} ms on it"
    )
    with scene.working("exporting and measuring every cut") as step:
        recipe.make(
            folder,
            slowdown=slowdown,
            private=True,
            progress=lambda stage, done, of: step(stage, done / of if of else 0.0),
        )
    plan = load_plan((folder / "models" / "split" / "split.yaml").read_text())
    open_plan = dataclasses.replace(plan, private=False)
    scene.table(findings.split_table(open_plan, LINKS))
    found = measured.tell(scene, folder / "models" / "split", open_plan, {"image": x})
    link = parse_link(LINK)
    private = judge(plan, link)
    scene.say("[bold]Now the photo may not leave the device[/bold] (--private), raw or compressed. Then:")
    scene.say(f"[bold]{link.mbit:g} Mbit/s, {link.rtt_ms:g} ms:[/bold] {private.text}")
    scene.claim(
        "with private photos splitting is the right answer",
        private.cut not in ("local", "input"),
        f"{private.cut}, {private.ms:.0f} ms",
    )

    whole = ort.session(folder / "models" / "photos.onnx").run({"image": x})["logits"].argmax(1)
    _serve(scene, folder, plan.slowdown)
    views = recipe.pictures()  # the same photos as the skill takes them
    normal = _flow(scene, views, whole, kill=False)  # every photo once: what its agreement is measured on
    cut = Counter(str(record.get("cut")) for record in normal.records).most_common(1)[0][0]
    local_ms = plan.cut("local").device_ms.p50
    scene.say(
        f"the camera answers together with the tail (cut {cut}) over an emulated {LINK} link: "
        f"p50 {normal.times.p50:.0f} ms, p90 {normal.times.p90:.0f} ms; alone it would take {local_ms:.0f} ms"
    )
    outage = _flow(scene, views, whole, kill=True)
    return _judge(scene, plan, open_plan, found, private.text, normal, outage)


@dataclasses.dataclass(frozen=True, slots=True)
class Flow:
    """Requests one after the other, and what became of them."""

    sent: int
    answered: int
    agreed: int
    times: Times
    records: tuple[dict[str, object], ...]
    errors: tuple[str, ...]
    back_s: float | None = None


def times_slower(recipe: Any) -> float:
    """Return how many times this machine must be slowed down for the whole model to take `DEVICE_MS`."""
    from skills import ort

    session, x = ort.session(recipe.build(recipe.weights())), recipe.photos(1)[:1]
    took = []
    for _ in range(12):
        begin = time.perf_counter()
        session.run({"image": x})
        took.append((time.perf_counter() - begin) * 1000)
    return float(max(2, round(DEVICE_MS / Times.of(took[2:]).p50)))


def _serve(scene: Scene, folder: Path, slowdown: float) -> None:
    """Publish the photo skill and bring it to the camera, whose way to the tail is an emulated link."""
    from cloud.link_emulator import emulated_link
    from skills.network import parse_link

    running = scene.controller
    if running is None:
        raise DeadlineExceeded("the controller is not running")
    tail = urlsplit(running.run.tail_url)
    with scene.working("building the bundle and starting the camera") as step:
        file = scene.folder / "photos-1.0.0.skb"
        build_skill(folder, file, lambda text: step(text, 0.3))
        step("publishing", 0.7)
        publish(scene.client, file, scene.publisher_key)
        port = scene.keep(emulated_link(int(tail.port or 0), parse_link(LINK))).port
        step("the camera enrols", 0.9)

        def through_the_link(board: Board) -> None:
            path = board.folder / "identity" / "device.json"
            write_atomic(path, path.read_bytes().replace(f":{tail.port}".encode(), f":{port}".encode()))

        scene.add_board("camera", f"timer: dilated({slowdown:g})\n", {"site": "pier"}, through_the_link)
        scene.wait_online("camera")
    scene.say("[cyan]$ skerry push photos --to name=camera --wait[/cyan]")
    ended, seconds = scene.follow(scene.client.push("photos", None, "name=camera", None))
    if ended.devices[0].stage != "serving":
        raise SkerryError(f"the camera does not serve photos: {ended.devices[0].reason or ended.reason}")
    scene.say(f"[dim]{seconds:.1f} s from push to serving[/dim]")


def _flow(scene: Scene, x: "Array", whole: "Array", *, kill: bool) -> Flow:
    """Ask the camera for photo after photo; with `kill` the tail dies meanwhile, and it goes on until the tail is back."""
    from skills.oip import Call

    board = scene.boards["camera"]
    known = len(board.usage())
    labels: list[int | None] = []
    times: list[float] = []
    errors: list[str] = []
    stop, sent = threading.Event(), 0

    def ask() -> None:
        nonlocal sent
        while not stop.is_set() and (kill or sent < len(x)):
            at = sent % len(x)
            sent += 1
            try:
                answer, took_ms = board.ask("photos", Call({"image": x[at : at + 1]}))
            except SkerryError as error:
                labels.append(None)
                errors.append(str(error))
                continue
            labels.append(int(answer.arrays["label"][0]))
            times.append(took_ms)

    asking = threading.Thread(target=ask, name="asking")
    asking.start()
    back_s: float | None = None
    try:
        enough = BEFORE if kill else len(x)
        with scene.working("requests flow") as step:
            _until(
                lambda: len(labels) >= enough,
                FLOW_DEADLINE_S,
                lambda _: step(f"{len(times)} answered", len(times) / enough),
            )
        if kill:
            back_s = _kill_tail(scene, board, times)
    finally:
        stop.set()
        asking.join(BACK_DEADLINE_S)
    agreed = sum(label == int(whole[at % len(whole)]) for at, label in enumerate(labels))
    return Flow(sent, len(times), agreed, Times.of(times), tuple(board.usage()[known:]), tuple(errors), back_s)


def _kill_tail(scene: Scene, board: Board, times: list[float]) -> float | None:
    """Kill the tail as the kernel kills; return the seconds until an answer came through a new one, None when none did."""
    old = scene.client.status()["tail"]["pid"]
    os.kill(int(old), signal.SIGKILL)
    began, marked = time.monotonic(), len(board.usage())
    scene.say(f"[red]$ kill -9 {old}[/red]   the tail, while requests flow")

    def back() -> bool:
        records = board.usage()[marked:]
        worked_alone = any(record.get("where") in ("local", "continued") for record in records)
        return worked_alone and bool(records) and records[-1].get("where") == "split"

    with scene.working("the tail is dead, requests go on") as step:
        if not _until(back, BACK_DEADLINE_S, lambda share: step(f"{len(times)} answered", share)):
            return None
    took = time.monotonic() - began
    enough = len(times) + 5
    _until(lambda: len(times) >= enough, 5.0, lambda share: None)
    return round(took, 1)


def _until(done: Any, deadline_s: float, show: Any) -> bool:
    begin = time.monotonic()
    while not done():
        share = (time.monotonic() - begin) / deadline_s
        if share >= 1:
            return False
        show(share)
        time.sleep(0.1)
    return True


def _judge(
    scene: Scene, plan: Any, open_plan: Any, found: Any, private_text: str, normal: Flow, outage: Flow
) -> Together:
    from cloud.cli import tables
    from cloud.split import LINKS
    from cloud.split.verdict import judge

    ran = Counter(str(record.get("where")) for record in outage.records)
    alone = ran["continued"] + ran["local"]
    made = tables.table("while the tail died", "", right=("",))
    for name, value in (
        ("requests sent", str(outage.sent)),
        ("answered", str(outage.answered)),
        ("finished by device and cloud", str(ran["split"])),
        ("begun together, finished on the device", str(ran["continued"])),
        ("answered on the device alone", str(ran["local"])),
        ("median answer", f"{outage.times.p50:.0f} ms"),
        ("slowest answer", f"{outage.times.worst:.0f} ms"),
        (
            "tail answering again after",
            f"{outage.back_s:.1f} s" if outage.back_s is not None else "not within the demo",
        ),
    ):
        made.add_row(name, value)
    scene.table(made)
    every = "; ".join([f"{outage.sent} sent, {outage.answered} answered", *outage.errors[:1]])
    scene.claim("every request was answered", outage.sent == outage.answered > 0, every)
    finished = f"{alone} answers, the slowest took {outage.times.worst:.0f} ms"
    scene.claim("the device finished alone what the cloud left open", alone > 0, finished)
    agreement = normal.agreed / max(normal.answered, 1)
    budget = f"the answers agree with the whole float model's ({plan.max_drop:g} points may be lost)"
    scene.claim(budget, agreement >= 1 - plan.max_drop / 100, f"agreement {agreement:.1%} on {normal.answered} photos")
    raw = [record for record in (*normal.records, *outage.records) if record.get("cut") == "input"]
    scene.claim(
        "no photo left the device", not raw, f"{normal.answered + outage.answered} answers, none at the cut 'input'"
    )
    verdicts = tuple(
        {"link": str(link), "cut": one.cut, "coding": one.coding, "ms": one.ms, "text": one.text}
        for link in LINKS
        for one in (judge(open_plan, link),)
    )
    local = plan.cut("local").device_ms
    return Together(
        slowdown=plan.slowdown,
        link=LINK,
        samples=plan.samples,
        verdicts=verdicts,
        measured=found,
        private_verdict=private_text,
        normal=normal.times,
        local=Times(local.p50, local.p90, local.p90, plan.samples),
        agreement=round(agreement, 4),
        sent=outage.sent,
        answered=outage.answered,
        slowest_ms=outage.times.worst,
        ran=dict(ran),
        tail_back_s=outage.back_s,
    )
