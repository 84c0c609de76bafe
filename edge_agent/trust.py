"""What needs cryptography, in short-lived processes: who sealed this assignment, and does the repository list this release?

`python -m edge_agent.trust` reads one JSON question on stdin and writes one JSON answer on stdout, so the supervisor carries
neither python-tuf nor cryptography (7 MB). Releases are judged by python-tuf's client over a metadata set that the device
has fetched; trusted time is handed in, for a board without a clock boots in 1970. Time may block an install; it never stops
what runs.
"""

import asyncio
import contextlib
import dataclasses
import datetime as dt
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Protocol
from urllib.parse import unquote, urlsplit

from skills.desired import MAX_ASSIGNMENT_BYTES, Assignment, ObjectRef, WantedSkill, open_sealed
from skills.errors import FormatError, SkerryError, TrustError, Unreachable, UsageError, error_for
from skills.files import read_bytes
from skills.measurement import MAX_ORDER_BYTES, Order, open_order
from skills.report import Sha256
from skills.signing import MetadataSet, unpack_metadata
from skills.wire import Limits, decode_json, encode_json

DEADLINE_S = 60.0
BASE_URL = "set://metadata/"
MAX_METADATA_FILE_BYTES = 1 << 20
MAX_QUESTION_BYTES = 256 << 10
MAX_KEY_BYTES = 64 << 10


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """May this release be installed? All paths are the device's own; `time` is Unix time from a verified message."""

    metadata: str
    trusted: str
    root: str
    target: str
    manifest_sha256: Sha256
    manifest_size: Annotated[int, Limits(min=0)]
    time: Annotated[int, Limits(min=0)]


@dataclasses.dataclass(frozen=True, slots=True)
class Sealed:
    """Who sealed this assignment, and may it follow `last`? Or this order? `director` is the path of the pinned key."""

    envelope: str
    director: str
    device: str
    last: Assignment | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Ask:
    """One question to the process: exactly one of the three."""

    release: Question | None = None
    sealed: Sealed | None = None
    order: Sealed | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Opened:
    """The answer to `Sealed`: the assignment or the order, or the error's code and sentence."""

    assignment: Assignment | None = None
    code: int = 0
    error: str = ""
    order: Order | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """`reason` is empty when the release is trusted; `passing` means that time alone stands against it."""

    reason: str = ""
    passing: bool = False


class Trust(Protocol):
    """Who judges releases and opens assignments."""

    async def open(self, envelope: bytes, device: str, last: Assignment | None) -> Assignment:
        """Return the assignment in a sealed envelope.

        Raises:
            FormatError, TrustError: as `skills.desired.open_sealed`.
            Unreachable: the process gave no answer; asking again may help.
        """

    async def open_order(self, envelope: bytes, device: str) -> Order:
        """Return the order in a sealed envelope.

        Raises:
            FormatError, TrustError: as `skills.measurement.open_order`.
            Unreachable: the process gave no answer; asking again may help.
        """

    async def judge(self, wanted: WantedSkill, metadata: ObjectRef, time: int) -> Verdict:
        """Return the verdict.

        Raises:
            SkerryError: no verdict could be had; asking again may help.
        """


class TrustProcess:
    """`Trust` in a process of its own."""

    def __init__(self, data: Path) -> None:
        self._data = data

    async def open(self, envelope: bytes, device: str, last: Assignment | None) -> Assignment:
        if len(envelope) > MAX_ASSIGNMENT_BYTES:
            raise FormatError(f"the assignment has {len(envelope)} bytes, the limit is {MAX_ASSIGNMENT_BYTES}")
        question = Ask(sealed=self._sealed(envelope, device, last))
        opened = decode_json(Opened, await self._run(question), "the opened assignment")
        if opened.assignment is None:
            raise error_for(opened.code, opened.error)
        return opened.assignment

    async def open_order(self, envelope: bytes, device: str) -> Order:
        if len(envelope) > MAX_ORDER_BYTES:
            raise FormatError(f"the order to measure has {len(envelope)} bytes, the limit is {MAX_ORDER_BYTES}")
        question = Ask(order=self._sealed(envelope, device, None))
        opened = decode_json(Opened, await self._run(question), "the opened order")
        if opened.order is None:
            raise error_for(opened.code, opened.error)
        return opened.order

    def _sealed(self, envelope: bytes, device: str, last: Assignment | None) -> Sealed:
        return Sealed(envelope.decode("utf-8", "replace"), str(self._data / "identity" / "director.pem"), device, last)

    async def judge(self, wanted: WantedSkill, metadata: ObjectRef, time: int) -> Verdict:
        question = ask(self._data, wanted, metadata, time)
        return decode_json(Verdict, await self._run(Ask(release=question)), "the verdict")

    async def _run(self, question: Ask) -> bytes:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "edge_agent.trust",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(DEADLINE_S):
                out, err = await process.communicate(encode_json(question))
        except TimeoutError:
            raise Unreachable(f"the trust process gave no answer within {DEADLINE_S:g} s") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode != 0:
            last = err.decode(errors="replace").strip().splitlines()[-1:] or ["it wrote nothing"]
            raise Unreachable(f"the trust process ended with status {process.returncode}: {last[0][:300]}")
        return out


def ask(data: Path, wanted: WantedSkill, metadata: ObjectRef, time: int) -> Question:
    """Return the question about one wanted release, with this data directory's paths."""
    return Question(
        metadata=str(data / "objects" / metadata.sha256),
        trusted=str(data / "trusted"),
        root=str(data / "identity" / "root.json"),
        target=wanted.target,
        manifest_sha256=wanted.manifest.sha256,
        manifest_size=wanted.manifest.size,
        time=time,
    )


def judge(question: Question) -> Verdict:
    """Run the TUF client workflow (specification 1.0, section 5) over the fetched metadata set.

    Raises:
        StorageError, NotFound, FormatError: a file of the device's own cannot be used; says nothing about the release.
    """
    from tuf.api import exceptions
    from tuf.ngclient.config import UpdaterConfig
    from tuf.ngclient.updater import Updater

    try:
        metadata = unpack_metadata(Path(question.metadata).read_bytes())
    except FormatError as error:
        return Verdict(str(error))
    folder = Path(question.trusted)
    folder.mkdir(parents=True, exist_ok=True)
    _drop_torn(folder)
    config = UpdaterConfig(
        root_max_length=MAX_METADATA_FILE_BYTES,
        timestamp_max_length=MAX_METADATA_FILE_BYTES,
        snapshot_max_length=MAX_METADATA_FILE_BYTES,
        targets_max_length=MAX_METADATA_FILE_BYTES,
    )
    try:
        updater = Updater(
            metadata_dir=str(folder),
            metadata_base_url=BASE_URL,
            fetcher=_fetcher(metadata),
            config=config,
            bootstrap=Path(question.root).read_bytes(),
        )
        set_reference_time(updater, question.time)
        updater.refresh()
        info = updater.get_targetinfo(question.target)
    except exceptions.ExpiredMetadataError as error:
        return Verdict(f"the repository's metadata has expired: {_sentence(error)}", passing=True)
    except (exceptions.RepositoryError, exceptions.DownloadError) as error:
        return Verdict(f"the repository's metadata is not trusted: {_sentence(error)}")
    finally:
        _make_durable(folder)
    if info is None:
        return Verdict(f"the signed repository does not list {question.target}")
    if (info.hashes.get("sha256"), info.length) != (question.manifest_sha256, question.manifest_size):
        return Verdict(f"the signed repository lists {question.target} with another content than the assignment names")
    return Verdict()


def set_reference_time(updater: Any, time: int) -> None:
    """Hand the trusted time to python-tuf. The one place that touches its private parts; tuf is pinned exactly.

    Raises:
        SkerryError: the attribute has moved; then nothing is installed until this door is mended.
    """
    trusted = getattr(updater, "_trusted_set", None)
    if trusted is None or not isinstance(getattr(trusted, "reference_time", None), dt.datetime):
        raise SkerryError("this python-tuf keeps its reference time elsewhere: install the pinned version of tuf")
    trusted.reference_time = dt.datetime.fromtimestamp(time, dt.UTC)


def _fetcher(metadata: MetadataSet) -> Any:
    from tuf.api.exceptions import DownloadHTTPError
    from tuf.ngclient.fetcher import FetcherInterface

    class FromSet(FetcherInterface):
        """Serves the fetched metadata set as if it were a repository."""

        def _fetch(self, url: str) -> Iterator[bytes]:
            text = _text(metadata, unquote(urlsplit(url).path.rpartition("/")[2]))
            if text is None:
                raise DownloadHTTPError(f"{url} is not in the metadata set", 404)
            yield text.encode()

    return FromSet()


def _text(metadata: MetadataSet, name: str) -> str | None:
    """Return a file of the set by the name that the client asks for: `2.root.json`, `timestamp.json`, `7.snapshot.json`."""
    parts = name.removesuffix(".json").split(".")
    match parts[-1]:
        case "root":
            return metadata.root.get(parts[0]) if len(parts) == 2 else None
        case "timestamp":
            return metadata.timestamp
        case "snapshot":
            return metadata.snapshot
        case "targets":
            return metadata.targets
    return None


def _drop_torn(folder: Path) -> None:
    """Remove leftovers of a death; python-tuf itself ignores a cached file that it cannot verify."""
    for path in folder.glob("tmp*"):
        path.unlink(missing_ok=True)


def _make_durable(folder: Path) -> None:
    """python-tuf renames into place without fsync: a power cut could take the protection against rollback with it."""
    for path in (folder, *folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def answer(question: Ask) -> Opened | Verdict:
    """Answer one question.

    Raises:
        SkerryError: a file of the device's own cannot be used, or nothing was asked.
    """
    if question.release is not None:
        return judge(question.release)
    sealed = question.sealed or question.order
    if sealed is None:
        raise UsageError("nothing was asked")
    pem = read_bytes(Path(sealed.director), "the director's key", MAX_KEY_BYTES)
    try:
        if question.order is not None:
            return Opened(order=open_order(sealed.envelope.encode(), pem, sealed.device))
        return Opened(open_sealed(sealed.envelope.encode(), pem, sealed.device, sealed.last))
    except (FormatError, TrustError) as error:
        return Opened(None, error.exit_code, str(error))


def main() -> int:
    """Answer one question on stdin."""
    try:
        question = decode_json(Ask, sys.stdin.buffer.read(MAX_QUESTION_BYTES + 1), "the question", MAX_QUESTION_BYTES)
        sys.stdout.buffer.write(encode_json(answer(question)))
    except (SkerryError, OSError) as error:
        print(str(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
