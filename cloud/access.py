"""Where the controller is and who we are to it: flag, then environment, then the user's config file.

`~/.config/skerry/config.yaml` (XDG) is written by `skerry up` and `skerry login`, readable by its owner only.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from skills.bundle import read_text
from skills.errors import FormatError, NotFound, UsageError
from skills.files import storage_errors, write_atomic, xdg_config
from skills.wire import Doc, decode_yaml, encode_yaml

HEADER = "Which controller `skerry` talks to. Written by `skerry up` and `skerry login`; keep it to yourself: it holds a token.\n"


@dataclasses.dataclass(frozen=True, slots=True)
class Access:
    """A controller's address, the token of its API, and the file with its CA's certificate."""

    url: str
    token: str
    ca: Annotated[str | None, Doc("PEM file of the controller's CA; empty: the system's")] = None
    key: Annotated[str | None, Doc("the publisher's key, with which this user signs releases")] = None


@dataclasses.dataclass(frozen=True, slots=True)
class Flags:
    """What was given on the command line."""

    url: str | None = None
    token: str | None = None
    ca: str | None = None


def config_path() -> Path:
    """Return the user's config file."""
    return xdg_config("config.yaml")


def find_access(flags: Flags, environment: Mapping[str, str] = os.environ, config: Path | None = None) -> Access:
    """Return the controller to talk to; each of the three values comes from the first source that has it.

    Token and CA of the config file belong to the URL of the config file: they are not offered to another controller.

    Raises:
        NotFound: nothing says where the controller is.
        UsageError: the URL is none, or there is no token for it.
        FormatError: the config file is not what it should be.
    """
    path = config_path() if config is None else config
    kept = _read(path)
    url = flags.url or environment.get("SKERRY_URL") or (kept.url if kept else None)
    if not url:
        raise NotFound(
            f"no controller is known: start one with skerry up, or name one with skerry login URL ({path} is not there)"
        )
    url = check_url(url)
    same = kept if kept is not None and kept.url == url else None
    token = flags.token or environment.get("SKERRY_TOKEN") or (same.token if same else None)
    if not token:
        raise UsageError(
            f"there is no token for {url}: give it with --token or SKERRY_TOKEN, or once and for all with skerry login {url}"
        )
    ca = flags.ca or environment.get("SKERRY_CA") or (same.ca if same else None)
    return Access(url, token, ca, same.key if same else None)


def keep_access(access: Access) -> Path:
    """Write the user's config file and return its path.

    Raises:
        StorageError: it cannot be written.
    """
    path = config_path()
    with storage_errors(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(path, encode_yaml(access, HEADER).encode(), mode=0o600)
    return path


def check_url(url: str) -> str:
    """Return the URL without a trailing slash; https only, for a token goes with every request.

    Raises:
        UsageError: not an address that a controller could have.
    """
    parts = urlsplit(url)
    try:
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError:
        port_is_fine = False
    if parts.scheme != "https" or not parts.hostname or not port_is_fine or parts.path not in ("", "/"):
        raise UsageError(f"{url!r} is no controller's address: expected https://HOST:PORT")
    return f"{parts.scheme}://{parts.netloc}"


def _read(path: Path) -> Access | None:
    try:
        return decode_yaml(Access, read_text(path, "the config file"), str(path))
    except NotFound:
        return None
    except FormatError as error:
        raise FormatError(f"{error}; write it anew with skerry login") from None
