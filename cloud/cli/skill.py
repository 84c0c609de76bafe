"""`skerry skill …`: begin, check, build and publish a skill."""

import os
from pathlib import Path
from typing import Annotated

import typer

from cloud.cli.command import command, group
from cloud.cli.connection import Ca, Token, Url
from cloud.cli.screen import Screen
from skills.errors import FormatError, NotFound, NotReached
from skills.units import readable

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder that holds skill.yaml.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    skill = group("A skill is control code, models and golden data in one folder: begin, check, build, publish it.")
    app.add_typer(skill, name="skill", rich_help_panel="Skills")
    command(
        skill,
        "new",
        examples=("skerry skill new my-digits", "skerry skill new my-photos --from photos --folder src/my-photos"),
    )(new)
    command(skill, "check", examples=("skerry skill check my-digits",))(check)
    command(skill, "build", examples=("skerry skill build my-digits -o my-digits.skb",))(build)
    command(
        skill,
        "publish",
        examples=("skerry skill publish my-digits.skb", "skerry skill publish my-digits.skb --key publisher.pem"),
    )(publish)


def new(
    screen: Screen,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Lower-case letters, digits and '-'.")],
    template: Annotated[
        str, typer.Option("--from", metavar="SKILL", help="The ready skill to begin from: digits or photos.")
    ] = "digits",
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="FOLDER", help="Where to put it.", show_default="NAME")
    ] = None,
) -> None:
    """Begin a skill from a ready one: manifest, control code and the recipe that makes its model."""
    from cloud.authoring import new_skill

    target = Path(name) if folder is None else folder
    skill = new_skill(name, target, template)
    screen.result(
        {"skill": skill.name, "version": skill.version, "folder": str(target)},
        f"{target}: the skill {skill.name} {skill.version}, begun from {template}",
    )
    screen.say(f"Next: edit {target / 'skill.yaml'}, then [cyan]skerry skill build {target} -o {name}.skb[/cyan]")


def check(screen: Screen, folder: Folder) -> None:
    """Check a skill's manifest, files and control code; load its models, run its golden data; say what is wrong.

    Models of a runtime that is not installed here are not tried. Ends with 3 when the golden data is not reproduced.
    """
    from cloud.authoring import check_skill
    from cloud.cli import tables
    from cloud.trial import try_skill

    found = check_skill(folder)
    with screen.progress("checking") as step:
        step("loading the models", 0.5)
        tried = try_skill(folder)
    skill = found.skill

    def view() -> object:
        made = tables.table("model", "variant", "runtime", "file", "needs")
        for model, entry in skill.models.items():
            for variant in entry.variants:
                needs = [*variant.arch, *variant.isa, *([variant.npu] if variant.npu else []), f"{variant.ram_mb} MiB"]
                made.add_row(model, variant.name, variant.runtime, str(variant.file or variant.split), " ".join(needs))
        return made

    facts = {
        "skill": skill.name,
        "version": skill.version,
        "missing": list(found.missing),
        "skipped": list(tried.skipped),
        "failing": list(tried.failing),
    }
    screen.result(facts, view)  # type: ignore[arg-type]
    for text in tried.skipped:
        screen.say(_escaped(text))
    if tried.failing:
        more = f" (and {len(tried.failing) - 1} more)" if len(tried.failing) > 1 else ""
        raise NotReached(f"{skill.name} {skill.version} does not pass its own probe: {tried.failing[0]}{more}")
    if found.missing:
        screen.say(
            f"{skill.name} {skill.version} is in order; skerry skill build makes what is missing: {', '.join(found.missing)}"
        )
    else:
        screen.say(f"{skill.name} {skill.version} is in order")


def build(
    screen: Screen,
    folder: Folder,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE.skb", help="The bundle to write.")],
) -> None:
    """Build a skill's bundle: one immutable file, every part known by its SHA-256.

    Models that are missing are made first, by the skill's own recipe. Every model must load here, where its runtime is
    installed; a probe that fails is said and does not hold you back. The same content gives the same bytes.
    """
    from cloud.authoring import build_skill
    from cloud.cli import tables

    warnings: list[str] = []
    with screen.progress("building") as step:
        bundle = build_skill(folder, out, lambda text: step(text, 0.5), warnings.append)

    def view() -> object:
        made = tables.table("part", "content", "travels as", "sha256", right=("content", "travels as"))
        for part in bundle.parts:
            made.add_row(part.path, readable(part.size), readable(part.wire_size), f"{part.sha256[:16]}…")
        return made

    parts = [
        {"path": part.path, "sha256": part.sha256, "size": part.size, "wire_size": part.wire_size}
        for part in bundle.parts
    ]
    facts = {
        "skill": bundle.skill.name,
        "version": bundle.skill.version,
        "file": str(out),
        "wire_bytes": bundle.size,
        "parts": parts,
        "warnings": warnings,
    }
    screen.result(facts, view)  # type: ignore[arg-type]
    for text in warnings:
        screen.warn(text)
    screen.say(f"{out}: {bundle.skill.name} {bundle.skill.version}, {readable(bundle.size)}")


def publish(
    screen: Screen,
    file: Annotated[Path, typer.Argument(metavar="FILE.skb", help="A bundle.")],
    key: Annotated[
        Path | None, typer.Option("--key", metavar="FILE", help="The publisher's private key.", envvar="SKERRY_KEY")
    ] = None,
    url: Url = None,
    token: Token = None,
    ca: Ca = None,
) -> None:
    """Sign a bundle as a release and hand it to the controller.

    The signature is made here: the key never leaves this machine. A release never changes; raise the version instead.
    """
    from cloud.access import Flags, find_access
    from cloud.client import Client
    from cloud.publish import publish as run

    if file.is_dir():
        raise FormatError(
            f"{file} is a folder: build it first (skerry skill build {file} -o {file.resolve().name}.skb)"
        )
    access = find_access(Flags(url, token, ca), os.environ)
    found_key = key or (Path(access.key) if access.key else None)
    if found_key is None:
        raise NotFound("no publisher's key is known: name it with --key or SKERRY_KEY")
    with Client(access) as client, screen.progress("publishing") as step:
        done = run(client, file, found_key, progress=step)
    release = done.release
    facts = {
        "skill": release.skill,
        "version": release.version,
        "manifest_sha256": release.manifest_sha256,
        "uploaded_bytes": done.uploaded_bytes,
        "known_bytes": done.known_bytes,
    }
    there = f", {readable(done.known_bytes)} were there already" if done.known_bytes else ""
    text = f"released {release.skill} {release.version}: {readable(done.uploaded_bytes)} uploaded{there}"
    screen.result(facts, text)
    screen.say(f"Next: [cyan]skerry push {release.skill}@{release.version} --to all --canary 1 --wait[/cyan]")


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
