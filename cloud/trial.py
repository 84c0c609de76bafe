"""Trying a skill before it travels: every model is loaded by its runtime, then the golden data is run, as a device would.

Foreign code and foreign files run in a process of their own (`python -m cloud.trial FOLDER`), which prints one JSON object a
line; whatever ends that process ends nothing else.
"""

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from skills.errors import DeadlineExceeded, FormatError, MissingExtra, SkerryError, error_for
from skills.isa import isa
from skills.manifest import Skill, Variant

TRIAL_DEADLINE_S = 300.0

Tell = Callable[[Mapping[str, object]], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """What a trial found: `skipped` says what could not be tried here, `failing` how a probe failed."""

    skipped: tuple[str, ...] = ()
    failing: tuple[str, ...] = ()


def try_skill(folder: Path, deadline_s: float = TRIAL_DEADLINE_S) -> Trial:
    """Load every model that is there and, when no file is missing, run the probe with each variant that fits this machine.

    Raises:
        FormatError: a model cannot be loaded; the sentence names its file.
        DeadlineExceeded: it took longer than `deadline_s`.
    """
    whole = folder.resolve()
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "ORT_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-P", "-m", "cloud.trial", str(whole)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"trying the skill in {folder} took longer than {deadline_s:g} s") from None
    told = [json.loads(line) for line in done.stdout.splitlines()]
    for entry in told:
        if "error" in entry:
            raise error_for(entry["code"], entry["error"].replace(f"{whole}/", f"{folder}/"))
    failing = [entry["failing"] for entry in told if "failing" in entry]
    if done.returncode:
        doing: dict[str, str] = next(
            (entry for entry in reversed(told) if "loading" in entry or "probing" in entry), {}
        )
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        if "probing" not in doing:
            what = doing.get("loading")
            raise FormatError(f"loading {folder / what if what else folder} ended the runtime's process with {how}")
        failing.append(f"{doing['probing']}: the probe ended its process with {how}")
    return Trial(tuple(entry["skipped"] for entry in told if "skipped" in entry), tuple(failing))


def run(folder: Path, tell: Tell) -> None:
    """Do the work of a trial in this process; `tell` hears what is being done and what was found.

    Raises:
        FormatError: a model cannot be loaded.
    """
    from edge_agent.worker import CallableModel
    from skills.bundle import MANIFEST_NAME, read_text
    from skills.manifest import load_skill
    from skills.timer import Local

    skill = load_skill(read_text(folder / MANIFEST_NAME, "the skill's manifest"), str(folder / MANIFEST_NAME))
    usable: dict[str, list[str]] = {}
    for name, model in skill.models.items():
        usable[name] = []
        for variant in model.variants:
            file = str(variant.file or variant.split)
            if not (folder / file).is_file():
                continue
            tell({"loading": file})
            try:
                CallableModel(variant, folder, Local(), None, 0.0)
            except MissingExtra as error:
                tell({"skipped": f"{file} was not loaded: {error}"})
                continue
            if reason := _unfit(variant):
                tell({"skipped": f"{file} was loaded but not probed: {reason}"})
                continue
            usable[name].append(variant.name)
    if all((folder / path).is_file() for path in skill.files()):
        for choice in _choices(usable):
            _probe(skill, folder, choice, tell)


def _unfit(variant: Variant) -> str:
    """Say what this machine lacks to answer as the variant's devices do, or return ""."""
    if variant.arch and platform.machine() not in variant.arch:
        return f"it is made for {', '.join(variant.arch)}, this machine is {platform.machine()}"
    if lacking := sorted(set(variant.isa) - set(isa())):
        return f"this machine lacks {', '.join(lacking)}"
    return f"it needs {variant.npu}" if variant.npu else ""


def _choices(usable: Mapping[str, list[str]]) -> Iterator[dict[str, str]]:
    """Yield choices of variants, one a model, such that every variant is in one of them."""
    if all(usable.values()):
        for at in range(max(map(len, usable.values()))):
            yield {name: variants[min(at, len(variants) - 1)] for name, variants in usable.items()}


def _probe(skill: Skill, folder: Path, choice: dict[str, str], tell: Tell) -> None:
    from edge_agent.probe import check
    from edge_agent.worker import LoadedSkill, last_line
    from skills.timer import Local

    what = ", ".join(f"{model}={variant}" for model, variant in choice.items())
    tell({"probing": what})
    try:
        reason = check(LoadedSkill(skill, folder, choice, Local(), None, 0.0))
    except SkerryError as error:
        reason = str(error)
    except Exception as error:  # noqa: BLE001  the skill's own code
        reason = last_line(error)
    if reason:
        tell({"failing": f"{what}: {reason}"})


def main() -> None:
    """Try the folder that is named on the command line."""
    # What the skill's code prints must not come between our lines.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(entry: Mapping[str, object]) -> None:
        lines.write(json.dumps(entry) + "\n")
        lines.flush()

    folder = Path(sys.argv[1])
    os.chdir(folder)
    try:
        run(folder, tell)
    except SkerryError as error:
        tell({"error": str(error), "code": error.exit_code})


if __name__ == "__main__":
    main()
