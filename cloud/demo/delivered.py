"""Chapter b: a signed skill reaches three agents over MQTT, one of them first, and one of them refuses."""

from pathlib import Path
from typing import TYPE_CHECKING

from cloud.authoring import build_skill
from cloud.demo.facts import Delivered
from cloud.demo.scene import Scene, arrivals
from cloud.publish import publish
from skills.bundle import Bundle
from skills.units import readable

if TYPE_CHECKING:
    from rich.table import Table

TITLE = "Delivered: a signed skill reaches its devices"
TEXT = (
    "The skill is built, signed with the publisher's key and brought to three agents, processes of their own that know "
    "only their broker. One device goes first; the others follow when it serves."
)
BOARDS = {
    "dock": ("runtimes: [onnxruntime]\n", {"site": "harbour"}),
    "lighthouse": ("runtimes: [litert]\n", {"site": "harbour"}),
    "buoy": ("memory_mb: 16\n", {"site": "sea"}),
}


def tell(scene: Scene, folder: Path) -> Delivered:
    """Tell the chapter."""
    scene.chapter("b", TITLE, TEXT)
    with scene.working("building the bundle") as step:
        file = scene.folder / "digits-1.0.0.skb"
        bundle = build_skill(folder, file, lambda text: step(text, 0.5))
    scene.table(bundle_table(bundle))
    with scene.working("starting the controller and three agents") as step:
        step("controller, broker, tail server", 0.1)
        running = scene.start_controller()
        for at, (name, (config, labels)) in enumerate(BOARDS.items()):
            step(f"{name} enrols", 0.3 + 0.2 * at)
            scene.add_board(name, config, labels)
        step("waiting for their first words", 0.9)
        scene.wait_online(*BOARDS)
    scene.say(
        f"controller {running.run.url}, broker {running.run.broker} at {running.run.mqtt_url} "
        "[dim](TLS, each device its own certificate)[/dim]"
    )
    from cloud.cli import tables

    scene.table(tables.devices(scene.client.devices()))
    done = publish(scene.client, file, scene.publisher_key)
    scene.say(f"[cyan]$ skerry skill publish {file.name}[/cyan]   signed, {readable(done.uploaded_bytes)} uploaded")
    scene.say("[cyan]$ skerry push digits --to all --canary 1 --wait[/cyan]")
    ended, seconds = scene.follow(scene.client.push("digits", None, "all", "1"))
    by_name = {member.device: member for member in ended.devices}
    serving = [name for name, member in by_name.items() if member.stage == "serving"]
    scene.claim(
        "the devices that can serve it do",
        sorted(serving) == ["dock", "lighthouse"],
        f"{seconds:.1f} s from push to serving",
    )
    taken = {name: ", ".join(member.variants.values()) for name, member in by_name.items() if member.variants}
    fits = taken.get("dock") == "int8" and taken.get("lighthouse") == "int8-litert"
    scene.claim(
        "each took the variant that fits it", fits, ", ".join(f"{name}: {variant}" for name, variant in taken.items())
    )
    refused = by_name["buoy"]
    why = refused.reason.partition(";")[0]
    scene.claim("the device that no variant fits refuses and says why", refused.stage == "refused" and why, why)
    return Delivered(bundle.size, len(bundle.parts), round(seconds, 2), running.run.broker, arrivals(ended))


def bundle_table(bundle: Bundle) -> "Table":
    """Return the parts of a bundle for people."""
    from cloud.cli import tables

    made = tables.table(
        "part",
        "content",
        "travels as",
        "sha256",
        right=("content", "travels as"),
        title=f"{bundle.skill.name} {bundle.skill.version}",
    )
    for part in bundle.parts:
        made.add_row(part.path, readable(part.size), readable(part.wire_size), f"{part.sha256[:12]}…")
    return made
