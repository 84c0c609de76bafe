"""Ethos-U: compile an int8 `.tflite` with Arm's Vela and read its estimate. Nothing here was measured on a chip."""

import csv
import dataclasses
import io
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from compress.converters.environment import Environment, Say, call
from compress.report import NpuEstimate
from skills.errors import FormatError, SkerryError
from skills.profile import Profile

VELA = Environment("vela", 150)
FLASH = ("off_chip_flash", "on_chip_flash", "dram")  # where weights lie, by the memory mode


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """A `.tflite` whose operators are, as far as the NPU takes them, one command stream; and Vela's estimate of it."""

    file: bytes
    estimate: NpuEstimate


def compile_for(profile: Profile, model: bytes, say: Say) -> Compiled:
    """Return the model compiled for the profile's accelerator.

    Raises:
        FormatError: the profile names no accelerator.
        SkerryError: Vela refuses the model, in its words.
        Unreachable, StorageError: its environment cannot be made.
    """
    if profile.accelerator is None:
        raise FormatError(f"the profile {profile.name} names no accelerator to compile for")
    options = ["--accelerator-config", profile.accelerator, "--show-cpu-operations"]
    for name, value in (("--system-config", profile.system_config), ("--memory-mode", profile.memory_mode)):
        options += [name, value] if value is not None else []
    with tempfile.TemporaryDirectory(prefix="skerry-vela-") as place:
        work = Path(place)
        (work / "model.tflite").write_bytes(model)
        (work / "options.json").write_text(json.dumps(options))
        said = call(VELA, "run_vela.py", work, say)
        summaries = sorted(work.glob("model_summary_*.csv"))
        compiled = work / "model_vela.tflite"
        if not summaries or not compiled.is_file():
            raise SkerryError(f"Vela left no model and summary behind: {said.strip()[-300:]}")
        return Compiled(compiled.read_bytes(), estimate(summaries[0].read_text(), said))


def estimate(summary: str, said: str) -> NpuEstimate:
    """Read Vela's summary (CSV, memory in KiB, time in seconds) and what it printed with `--show-cpu-operations`. Pure.

    Raises:
        FormatError: a column or a count is missing: this is another Vela.
    """
    rows = list(csv.DictReader(io.StringIO(summary)))
    if not rows:
        raise FormatError("Vela's summary has no row")
    row = rows[0]
    on_cpu, on_npu = (_count(kind, said) for kind in ("CPU", "NPU"))
    return NpuEstimate(
        row.get("accelerator_configuration") or "", row.get("system_config") or "", row.get("memory_mode") or "",
        round(_number(row, "inference_time") * 1e3, 4), round(_number(row, "cycles_total")),
        round(_number(row, "sram_memory_used"), 2), round(sum(_number(row, f"{area}_memory_used") for area in FLASH), 2),
        on_npu, on_cpu, tuple(re.findall(r"^\s+CPU: (\w+)", said, re.MULTILINE)),
    )  # fmt: skip


def over_budget(found: NpuEstimate, profile: Profile) -> tuple[str, ...]:
    """Return a sentence for each memory in which the model is larger than the profile allows. Pure."""
    limits = (("SRAM", found.sram_kib, profile.sram_kib), ("flash", found.flash_kib, profile.flash_kib))
    return tuple(
        f"It takes {used:.0f} KiB of {name}, {profile.name} has {most:g} KiB."
        for name, used, most in limits
        if most is not None and used > most
    )


def _number(row: Mapping[str, str], column: str) -> float:
    try:
        return float(row[column])
    except (KeyError, TypeError, ValueError):
        raise FormatError(f"Vela's summary has no number in the column {column}") from None


def _count(kind: str, said: str) -> int:
    found = re.search(rf"^{kind} operators = (\d+)", said, re.MULTILINE)
    if found is None:
        raise FormatError(f"Vela did not say how many operators run on the {kind}")
    return int(found.group(1))
