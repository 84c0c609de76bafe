"""Environments of foreign converters, and what is read of Vela's words: nothing is installed or compiled here."""

import dataclasses
import sys
from pathlib import Path

import pytest

from compress import profiles
from compress.converters import environment, vela
from compress.converters.environment import Environment
from compress.html import _npu
from compress.report import NpuEstimate
from skills.errors import DeadlineExceeded, FormatError, NotFound, SkerryError, StorageError, Unreachable

SUMMARY = (
    "experiment,network,accelerator_configuration,system_config,memory_mode,core_clock,inference_time,sram_memory_used,"
    "dram_memory_used,on_chip_flash_memory_used,off_chip_flash_memory_used,cycles_total\n"
    "default,model,Ethos_U55_128,Ethos_U55_High_End_Embedded,Shared_Sram,500000000.0,0.000734,32.25,0,0,25.5,367000.0\n"
)
SAID = """
Network summary for model
CPU operators = 2 (15.4%)
   CPU: Quantize = input (Quantize)
   CPU: Dequantize = output (Dequantize)
NPU operators = 11 (84.6%)
   NPU: Conv2D = first (Conv2D)
"""


def test_the_estimate_is_read_from_the_summary_and_the_operators_from_what_was_said() -> None:
    found = vela.estimate(SUMMARY, SAID)
    assert (found.time_ms, found.cycles, found.sram_kib, found.flash_kib) == (0.734, 367_000, 32.25, 25.5)
    assert (found.on_npu, found.on_cpu) == (11, 2)
    assert found.share == pytest.approx(11 / 13)
    assert found.left_on_cpu == ("Quantize", "Dequantize")


@pytest.mark.parametrize(
    ("summary", "said", "what"),
    [
        ("", SAID, "no row"),
        (SUMMARY.replace("cycles_total", "cycles"), SAID, "cycles_total"),
        (SUMMARY.replace("0.000734", "soon"), SAID, "inference_time"),
        (SUMMARY, "all went well", "CPU"),
    ],
)
def test_another_velas_words_are_an_error_that_names_what_is_missing(summary: str, said: str, what: str) -> None:
    with pytest.raises(FormatError, match=what):
        vela.estimate(summary, said)


def test_a_model_larger_than_the_accelerators_memory_is_said() -> None:
    profile = dataclasses.replace(profiles.find("ethos-u55"), sram_kib=32.0, flash_kib=100.0)
    assert vela.over_budget(vela.estimate(SUMMARY, SAID), profile) == (
        "It takes 32 KiB of SRAM, ethos-u55 has 32 KiB.",
    )


def test_a_profile_without_an_accelerator_is_not_compiled_for() -> None:
    with pytest.raises(FormatError, match="names no accelerator"):
        vela.compile_for(profiles.find("arm64-litert"), b"", lambda _said: None)


def test_the_ethos_profile_asks_for_whole_numbers_and_blocks_of_channels() -> None:
    profile = profiles.find("ethos-u55")
    assert (profile.whole_numbers, profile.quantize_outputs, profile.channel_multiple) == (True, True, 16)
    assert profile.accelerator == "ethos-u55-128"


def test_other_packages_another_python_or_another_machine_are_another_environment() -> None:
    names = {
        environment.folder_name("vela", "a==1\nb==2\n", "3.11", "x86_64"),
        environment.folder_name("vela", "a==1\nb==3\n", "3.11", "x86_64"),
        environment.folder_name("vela", "a==1\nb==2\n", "3.12", "x86_64"),
        environment.folder_name("vela", "a==1\nb==2\n", "3.11", "aarch64"),
    }
    assert len(names) == 4
    same = environment.folder_name("vela", "b==2\na==1", "3.11", "x86_64")
    assert same in names
    assert same.startswith("vela-")


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"XDG_CACHE_HOME": "/caches", "HOME": "/home/a"}, "/caches/skerry/environments"),
        ({"XDG_CACHE_HOME": "caches", "HOME": "/home/a"}, "/home/a/.cache/skerry/environments"),
        ({"HOME": "/home/a"}, "/home/a/.cache/skerry/environments"),
    ],
)
def test_environments_lie_where_xdg_says(variables: dict[str, str], place: str) -> None:
    assert environment.cache(variables) == Path(place)


def test_without_a_home_there_is_no_place_and_that_is_said() -> None:
    with pytest.raises(NotFound, match="XDG_CACHE_HOME"):
        environment.cache({})


def test_every_package_of_an_environment_is_pinned() -> None:
    lines = vela.VELA.requirements().split()
    assert lines
    assert all(line.count("==") == 1 for line in lines)


@pytest.mark.parametrize(
    ("said", "kind", "what"),
    [
        (["WARNING: Retrying after NewConnectionError", "ERROR: No matching distribution"], Unreachable, "does not answer"),
        (["ERROR: [Errno 28] No space left on device"], StorageError, "no space left"),
        (["Collecting a", "ERROR: No matching distribution found for a==9"], SkerryError, "found for a==9"),
        ([], SkerryError, "said nothing"),
    ],
)  # fmt: skip
def test_what_pip_says_becomes_one_sentence(said: list[str], kind: type[SkerryError], what: str) -> None:
    error = environment.failure("vela", said)
    assert type(error) is kind
    assert what in str(error)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Environment:
    """An environment without packages, in a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Environment, "requirements", lambda _self: "")
    return Environment("small", 1)


def made(_environment: Environment, partial: Path, _say: environment.Say) -> None:
    (partial / "bin").mkdir(parents=True)
    (partial / "bin" / "python").symlink_to(sys.executable)


def test_an_environment_is_made_once_and_then_found(small: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(environment, "_make", made)
    first = environment.ready(small, told.append)
    monkeypatch.setattr(environment, "_make", None)
    assert environment.ready(small, told.append) == first
    assert first.parent.parent == environment.folder(small)
    assert told == ["waiting for the environment of small"]


def test_a_half_made_environment_is_never_used(small: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(environment_: Environment, partial: Path, say: environment.Say) -> None:
        made(environment_, partial, say)
        raise Unreachable("the index does not answer")

    monkeypatch.setattr(environment, "_make", fails)
    with pytest.raises(Unreachable):
        environment.ready(small, lambda _said: None)
    assert not environment.folder(small).exists()
    left = environment.folder(small).with_suffix(".partial")
    left.mkdir()  # as a killed process leaves it
    (left / "bin").mkdir()
    monkeypatch.setattr(environment, "_make", made)
    assert environment.ready(small, lambda _said: None).exists()
    assert not left.exists()


def test_too_little_room_is_said_before_anything_is_fetched(small: Environment) -> None:
    with pytest.raises(StorageError, match="takes 1000000000 MB.*XDG_CACHE_HOME"):
        environment.ready(dataclasses.replace(small, megabytes=10**9), lambda _said: None)


def test_a_scripts_last_line_is_the_error_and_a_hanging_one_is_ended(
    small: Environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(environment, "_make", made)
    with pytest.raises(SkerryError, match="small failed: .*No such file"):
        environment.call(small, "no_such_script.py", tmp_path, lambda _said: None)
    with pytest.raises(DeadlineExceeded, match="small did not come to an end"):
        environment.call(small, "run_vela.py", tmp_path, lambda _said: None, seconds=1e-9)


def test_the_page_shows_the_estimate_as_one() -> None:

    shown = _npu(NpuEstimate("ethos-u55-128", "a", "b", 0.734, 367_000, 32.25, 25.5, 11, 2, ("Quantize <in>",)))
    assert "11 of 13 (85%)" in shown
    assert "nothing here was measured on a chip" in shown
    assert "Quantize &lt;in&gt;" in shown
