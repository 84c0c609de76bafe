"""The command line and its documents say the same: each command explains itself, each documented call exists."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cloud.cli import run
from cloud.cli.app import build
from skills import errors

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOT_OPTIONS = {"--help", "-h", "--version", "--install-completion", "--show-completion"}
TREE: Any = typer.main.get_command(build())


def commands(node: Any = TREE, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, node
    for name, below in getattr(node, "commands", {}).items():
        yield from commands(below, (*path, name))


ALL = dict(commands())


def options(node: Any) -> set[str]:
    return {
        "--help",
        "-h",
        *(option for parameter in node.params for option in parameter.opts if option.startswith("-")),
    }


def check_call(line: str) -> None:
    """Refuse a written call that names a command or an option which is not there."""
    words = shlex.split(line, comments=True)
    assert words[0] == "skerry"
    path: tuple[str, ...] = ()
    rest = words[1:]
    while rest and (*path, rest[0]) in ALL:
        path, rest = (*path, rest[0]), rest[1:]
    if not path:
        assert rest, line
        assert rest[0] in ROOT_OPTIONS, f"no such command: {line}"
        return
    known = options(ALL[path])
    for word in rest:
        if word.startswith("-") and word != "-":
            assert word.split("=")[0] in known, f"{' '.join(path)} has no option {word}: {line}"
    if hasattr(ALL[path], "commands") and not ALL[path].params:
        assert not rest, f"no such command: {line}"


@pytest.mark.parametrize("path", [path for path in ALL if path], ids=" ".join)
def test_every_command_explains_itself_with_an_example(path: tuple[str, ...]) -> None:
    node = ALL[path]
    assert len(node.help or "") > 20
    for parameter in node.params:
        if parameter.name != "help":
            assert getattr(parameter, "help", None), f"{path}: {parameter.name} has no help"
    if not hasattr(node, "commands"):
        examples = re.findall(r"\[cyan\](.*?)\[/cyan\]", node.epilog or "")
        assert examples
        for example in examples:
            assert example.startswith(f"skerry {' '.join(path)}"), example
            check_call(example.replace("\\[", "["))


@pytest.mark.parametrize(
    "path", [path for path, node in ALL.items() if path and not hasattr(node, "commands")], ids=" ".join
)
def test_every_command_prints_json_and_can_be_quiet_or_talkative(path: tuple[str, ...]) -> None:
    assert {"--json", "--quiet", "-q", "--debug"} <= options(ALL[path])


@pytest.mark.parametrize("path", ALL, ids=lambda path: " ".join(path) or "skerry")
def test_every_command_answers_help_and_refuses_an_unknown_option(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*path, "--help"]) == 0
    assert f"Usage: {' '.join(('skerry', *path))} " in capsys.readouterr().out
    assert run([*path, "--bogus"]) == 2
    assert "no such option: --bogus" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["check", "joint", "stages"])
def test_a_command_below_split_says_what_it_lacks_and_what_it_does_not_know(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hint = f"(see: skerry split {name} --help)"
    assert run(["split", name]) == 2
    assert re.search(rf"missing argument '\w+' {re.escape(hint)}", capsys.readouterr().err)
    assert run(["split", name, "plan", "--bogus"]) == 2
    err = capsys.readouterr().err
    assert "no such option: --bogus" in err
    assert hint in err
    assert run(["split", name, "plan", "--help"]) == 0


def written_calls() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        text = page.read_text() if page.exists() else ""
        for block in re.findall(r"^```(?:sh|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            for line in block.splitlines():
                for call in re.findall(r"(?:^|\$ |\$\(|[;|&] ?|until )(skerry [^|;&)]*)", line):
                    yield page.name, call.strip()
        for call in re.findall(r"`(skerry [^`]+)`", text):
            yield page.name, call


def test_every_call_in_the_documents_exists() -> None:
    found = list(written_calls())
    assert {page for page, _ in found} >= {"README.md", "start.md"}
    for page, call in found:
        if not re.search(r"[|…]", call):  # `skerry up|down` and `skerry skill …` speak of several at once
            try:
                check_call(call)
            except AssertionError as error:
                raise AssertionError(f"{page}: {error}") from None


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for path, node in ALL.items():
        if path and not hasattr(node, "commands") and path[-1] != "list":
            assert re.search(rf"skerry {' '.join(path)}\b", text), f"the README does not show skerry {' '.join(path)}"


def test_the_table_of_exit_codes_is_the_error_tree() -> None:
    text = (ROOT / "docs" / "exit-codes.md").read_text()
    rows = {name: int(code) for code, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", text, re.MULTILINE)}
    tree = {kind.__name__: kind.exit_code for kind in (errors.SkerryError, *errors.SkerryError.__subclasses__())}
    assert rows == tree
