"""Python code that a user names on the command line: `file.py:name` or `package.module:name`."""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from skills.errors import FormatError, MissingExtra, NotFound, SkerryError, UsageError


def find(reference: str, role: str) -> Callable[..., Any]:
    """Return the callable that `reference` names; `role` is what a sentence calls it.

    A file's neighbours and the working folder can be imported by it, last of all: nothing there takes the place of an
    installed module.

    Raises:
        UsageError: it is no such reference.
        NotFound: there is no such file, module or name.
        FormatError: the file is no Python, or its import failed.
        MissingExtra: it imports something that is not installed.
    """
    path, _, attribute = reference.rpartition(":")
    if not path or not attribute.isidentifier():
        raise UsageError(f"'{reference}' is neither a file, nor file.py:{role}, nor package.module:{role}")
    try:
        module = _import_file(Path(path)) if path.endswith(".py") else _import_module(path)
    except ModuleNotFoundError as error:
        if error.name and not path.endswith(".py") and f"{path}.".startswith(f"{error.name}."):
            raise NotFound(f"there is no module '{error.name}' to import, here or on PYTHONPATH") from None
        raise MissingExtra(f"{path} needs the module '{error.name}', which is not installed") from None
    except SyntaxError as error:
        raise FormatError(f"{error.filename or path} line {error.lineno}: {error.msg}") from None
    except SkerryError:
        raise
    except Exception as error:
        raise FormatError(f"{path} cannot be imported: {said(error)}") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise NotFound(f"{path} has no function '{attribute}'")
    return found  # type: ignore[no-any-return]


@contextlib.contextmanager
def named(reference: str, doing: str = "") -> Iterator[None]:
    """Turn whatever the user's code raises into one sentence that names it.

    Raises:
        FormatError: the code raised; an error of our own tree passes as it is.
    """
    try:
        yield
    except SkerryError:
        raise
    except Exception as error:
        raise FormatError(f"{reference} raised {said(error)}{doing}") from error


def said(error: Exception) -> str:
    """Return an exception as `Type: first line of its message`."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise NotFound(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"skerry_factory_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FormatError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in the file look themselves up
    with _also_from(path.parent):
        spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> Any:
    with _also_from(Path.cwd()):
        return importlib.import_module(name)


@contextlib.contextmanager
def _also_from(folder: Path) -> Iterator[None]:
    entry = str(folder.resolve())
    sys.path.append(entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for at in range(len(sys.path) - 1, -1, -1):
            if sys.path[at] == entry:
                del sys.path[at]  # the last one is ours
                break
