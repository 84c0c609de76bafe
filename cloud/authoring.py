"""What a skill's author does on the own machine: begin a skill from a ready one, check it, build its bundle."""

import ast
import contextlib
import dataclasses
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from cloud.recipes import Say, run_recipe
from cloud.trial import try_skill
from skills.bundle import MANIFEST_NAME, Bundle, build_bundle, load_folder, read_text
from skills.errors import FormatError, NotFound, UsageError
from skills.files import storage_errors, write_atomic
from skills.manifest import NAME, Skill, Stage, load_skill

NOT_COPIED = ("__pycache__", "models", "probe.npz")  # a recipe makes these


@dataclasses.dataclass(frozen=True, slots=True)
class Checked:
    """A skill's folder that was looked at; `missing` is what its recipe has still to make."""

    skill: Skill
    folder: Path
    missing: tuple[str, ...]


def templates() -> tuple[str, ...]:
    """Return the names of the ready skills."""
    folder = resources.files("skills") / "library"
    return tuple(sorted(entry.name for entry in folder.iterdir() if (entry / MANIFEST_NAME).is_file()))


def new_skill(name: str, folder: Path, template: str) -> Skill:
    """Begin a skill: a copy of a ready one under another name, without its models (`build` makes them).

    Raises:
        UsageError: the name is not allowed, or the folder exists.
        NotFound: there is no ready skill of that name.
        StorageError: the disk is full or refuses; no folder is left.
    """
    if not re.fullmatch(NAME, name):
        raise UsageError(
            f"a skill cannot be called {name!r}: use lower-case letters, digits and '-', beginning with a letter"
        )
    if template not in templates():
        raise NotFound(f"there is no ready skill {template!r} to begin from: {', '.join(templates())}")
    if folder.exists():
        raise UsageError(f"{folder} exists already: choose another name or folder")
    with (
        storage_errors(folder),
        _first_of_many(),
        resources.as_file(resources.files("skills") / "library" / template) as source,
    ):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The new folder appears whole: copied beside its place, then renamed.
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            shutil.copytree(source, work, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
            text = re.sub(r"(?m)^name:.*$", f"name: {name}", (work / MANIFEST_NAME).read_text(), count=1)
            text = re.sub(r"(?m)^version:.*$", "version: 0.1.0", text, count=1)
            skill = load_skill(text, str(folder / MANIFEST_NAME))
            write_atomic(work / MANIFEST_NAME, text.encode())
            work.chmod(0o755)
            work.rename(folder)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    return skill


@contextlib.contextmanager
def _first_of_many() -> Iterator[None]:
    """Turn shutil's list of everything that could not be copied into the first of these errors."""
    try:
        yield
    except shutil.Error as error:
        _source, target, reason = error.args[0][0]
        full = os.strerror(errno.ENOSPC) in str(reason)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(reason), str(target)) from None


def check_skill(folder: Path) -> Checked:
    """Check a skill's folder: manifest, files, control code and golden data; nothing of it is run.

    What a recipe makes may be missing: models and golden data.

    Raises:
        NotFound, FormatError: what is wrong, with the line where there is one.
    """
    missing = _missing(folder)
    skill = _manifest(folder)
    made = {skill.probe.file, *(str(v.file or v.split) for model in skill.models.values() for v in model.variants)}
    if by_hand := [path for path in missing if path not in made]:
        raise NotFound(f"{folder / MANIFEST_NAME} names {by_hand[0]}, which is not there, and which no recipe makes")
    if missing and skill.recipe is None:
        raise NotFound(
            f"{folder / MANIFEST_NAME} names {missing[0]}, which is not there, and no recipe that would make it"
        )
    for stage in skill.stages:
        if stage.code not in missing:
            _check_code(folder / stage.code, stage)
    if skill.probe.file not in missing:
        _check_probe(folder / skill.probe.file, skill)
    if not missing:
        load_folder(folder)
    return Checked(skill, folder, missing)


def build_skill(folder: Path, out: Path, say: Say = lambda text: None, warn: Say = lambda text: None) -> Bundle:
    """Build a skill's bundle; files that are missing are made by its recipe first.

    Every model is loaded and the probe is run before anything is packed: `warn` hears how a probe failed here and what
    could not be tried. Only a model that cannot be loaded is refused, for the last word on a probe is the device's.

    Raises:
        NotFound, FormatError, StorageError, SkerryError: what is wrong; `out` is as it was.
    """
    checked = check_skill(folder)
    if checked.missing and checked.skill.recipe is not None:
        run_recipe(folder, checked.skill.recipe, checked.missing, say)
        checked = check_skill(folder)
        if checked.missing:
            raise NotFound(f"the recipe {checked.skill.recipe} ran but did not make {checked.missing[0]}")
    say("trying the models")
    tried = try_skill(folder)
    for text in tried.skipped:
        warn(text)
    for text in tried.failing:
        warn(f"the probe fails here, as it will on such devices: {text}")
    return build_bundle(folder, out, lambda path: say(f"packing {path}"))


def _manifest(folder: Path) -> Skill:
    if not folder.is_dir():
        raise NotFound(f"{folder} is not a folder: name the folder that holds {MANIFEST_NAME}")
    if not (folder / MANIFEST_NAME).is_file():
        raise NotFound(f"{folder} is no skill: it has no {MANIFEST_NAME} (make one with: skerry skill new NAME)")
    return load_skill(read_text(folder / MANIFEST_NAME, "the skill's manifest"), str(folder / MANIFEST_NAME))


def _missing(folder: Path) -> tuple[str, ...]:
    return tuple(path for path in dict.fromkeys(_manifest(folder).files()) if not (folder / path).is_file())


def _check_code(path: Path, stage: Stage) -> None:
    try:
        tree = ast.parse(read_text(path, "the control code"), str(path))
    except SyntaxError as error:
        raise FormatError(f"{path} line {error.lineno}: {error.msg}") from None
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if stage.name not in functions:
        raise FormatError(
            f"{path} has no function {stage.name}(inputs, model), it has {', '.join(functions) or 'none'}"
        )


def _check_probe(path: Path, skill: Skill) -> None:
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            found = {name.removesuffix(".npy") for name in archive.namelist()}
    except zipfile.BadZipFile:
        raise FormatError(f"{path} is no .npz file") from None
    wanted = [*(f"in.{tensor.name}" for tensor in skill.inputs), *(f"out.{tensor.name}" for tensor in skill.outputs)]
    if absent := [name for name in wanted if name not in found]:
        raise FormatError(f"{path} lacks the array {absent[0]}, it has {', '.join(sorted(found))}")
