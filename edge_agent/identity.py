"""Who this device is: the key that never leaves it, its certificate, and what it pins of its controller."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from skills.errors import NotFound
from skills.files import read_bytes
from skills.wire import Limits, decode_json

DEVICE = r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}"
MAX_FILE_BYTES = 256 << 10


@dataclasses.dataclass(frozen=True, slots=True)
class Controller:
    """What enrolment told the device about itself and its controller (`device.json`)."""

    device: Annotated[str, Limits(pattern=DEVICE, hint="letters, digits, '.', '_' and '-'")]
    url: str
    mqtt_url: str
    tail_url: str = ""
    format: Literal["device/v1"] = "device/v1"


@dataclasses.dataclass(frozen=True, slots=True)
class IdentityFiles:
    """The files of an identity; `device.json` is written last, so where it is, all are."""

    folder: Path

    @property
    def key(self) -> Path:
        return self.folder / "key.pem"

    @property
    def cert(self) -> Path:
        return self.folder / "cert.pem"

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def root(self) -> Path:
        return self.folder / "root.json"

    @property
    def director(self) -> Path:
        return self.folder / "director.pem"

    @property
    def device(self) -> Path:
        return self.folder / "device.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """An enrolled device."""

    files: IdentityFiles
    controller: Controller

    @property
    def device(self) -> str:
        return self.controller.device


def load_identity(data: Path) -> Identity:
    """Read the identity below a data directory.

    Raises:
        NotFound: the device is not enrolled yet; the message says how.
        FormatError, StorageError: a file is damaged or cannot be read.
    """
    files = IdentityFiles(data / "identity")
    try:
        text = read_bytes(files.device, "the identity", MAX_FILE_BYTES)
    except NotFound:
        raise NotFound(
            f"this device is not enrolled: {files.device} does not exist "
            "(run `skerry devices invite` on the controller and paste the line it prints here)"
        ) from None
    controller = decode_json(Controller, text, str(files.device))
    for path in (files.key, files.cert, files.ca, files.root, files.director):
        if not path.is_file():
            raise NotFound(f"the identity lacks {path}: enrol the device again")
    return Identity(files, controller)
