"""The store survives death at every step and a power cut after every step; a forgotten fsync is caught."""

import dataclasses
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent import plan
from edge_agent.plan import Installed, Pointer
from edge_agent.store import PartialPart, Store
from skills import zstd
from skills.bundle import BundleFile, Part, build_bundle, chunk_hashes, open_bundle
from skills.errors import FormatError, NotFound, StorageError, TrustError
from skills.files import sha256_file, sha256_hex
from skills.report import CHUNK_BYTES

SKILL = """\
name: tiny
version: {version}
inputs: [{{name: x, dtype: FP32, shape: [4]}}]
outputs: [{{name: y, dtype: FP32, shape: [4]}}]
models: {{m: {{variants: [{{name: v, runtime: onnxruntime, file: deep/m.onnx}}]}}}}
stages: [{{name: run, model: m, code: run.py}}]
"""


def make(folder: Path, version: str) -> BundleFile:
    source = folder / version
    (source / "deep").mkdir(parents=True)
    (source / "skill.yaml").write_text(SKILL.format(version=version))
    (source / "run.py").write_text("def run(inputs, model): ...")
    (source / "probe.npz").write_bytes(b"probe")
    (source / "deep/m.onnx").write_bytes(version.encode() * 40_000)
    build_bundle(source, folder / f"{version}.skb")
    return open_bundle(folder / f"{version}.skb")


def install(store: Store, file: BundleFile) -> None:
    """Do what the agent does for a new version, all of it."""
    store.put_object(file.digest, file.manifest_bytes)
    for part in file.bundle.parts:
        wire = file.objects[part.wire_sha256]
        with PartialPart(store, part) as partial:
            for index in range(len(part.chunks)):
                assert partial.write(index, wire[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
        store.finish_part(part)
    store.stage(file.digest, file.bundle.parts)
    pointer = store.pointer("tiny")
    store.write_pointer(plan.activated(pointer, Installed(file.bundle.skill.version, file.digest, "t")))


def check(store: Store, first: str, second: str) -> str:
    """Boot on what is left: the version that the pointer names is whole. Returns its digest."""
    store.prepare()
    active = store.pointer("tiny").active
    assert active is not None
    assert active.manifest in (first, second)
    assert store.damage(active.manifest) == ""
    assert sorted(p.name for p in store.folder(active.manifest).rglob("*") if p.is_file()) == [
        "m.onnx",
        "probe.npz",
        "run.py",
    ]
    for digest in store.version_digests():
        assert store.damage(digest) == ""
    return active.manifest


def test_a_death_at_any_system_call_of_an_update_leaves_the_old_or_the_new_version_whole(tmp_path: Path) -> None:
    first, second = make(tmp_path, "1.0.0"), make(tmp_path, "2.0.0")
    seed = tmp_path / "seed"
    Store(seed).prepare()
    install(Store(seed), first)
    outcomes = []
    for number in range(1, 400):
        data = tmp_path / "device"
        shutil.rmtree(data, ignore_errors=True)
        shutil.copytree(seed, data)
        pid = os.fork()
        if pid == 0:
            _die_at(number, data, second)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        outcomes.append(check(Store(data), first.digest, second.digest))
        install(Store(data), second)
        assert check(Store(data), first.digest, second.digest) == second.digest
        if status == 0:
            break
        assert status == -9
    assert len(outcomes) > 30
    assert outcomes[0] == first.digest
    assert outcomes[-1] == second.digest


DEADLY = ("open", "pwrite", "fsync", "replace", "link", "unlink", "mkdir", "rmdir")


def _die_at(number: int, data: Path, file: BundleFile) -> None:
    """In a forked child: really die before the n-th system call that changes the disk."""
    counter = 0

    def deadly(name: str) -> None:
        real: Callable[..., object] = getattr(os, name)

        def call(*arguments: object, **more: object) -> object:
            nonlocal counter
            if name != "open" or int(arguments[1]) & os.O_CREAT:  # type: ignore[call-overload]
                counter += 1
            if counter == number:
                if name == "pwrite":
                    half = bytes(arguments[1])[: len(bytes(arguments[1])) // 2]  # type: ignore[arg-type]
                    real(arguments[0], half, *arguments[2:])
                os.kill(os.getpid(), 9)
            return real(*arguments, **more)

        setattr(os, name, call)

    for name in DEADLY:
        deadly(name)
    try:
        install(Store(data), file)
    except BaseException:  # noqa: BLE001 - this process ends here, whatever happened
        os._exit(3)
    os._exit(0)


# --- power cuts -----------------------------------------------------------------------------------


class Disk:
    """What a disk may hold after a power cut: only what was synced is sure; the rest may be there, empty, or not at all.

    Watches the same system calls as they really happen, and keeps two books: what every file contains and what every folder
    lists, each as it was at the last fsync of that very file or folder.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, forget: str = "") -> None:
        self.root, self.forget = root, forget
        self.content: dict[int, bytes] = {}
        self.listing: dict[int, dict[str, tuple[bool, int]]] = {}
        for folder, _, names in os.walk(root):
            for name in names:
                path = Path(folder, name)
                self.content[path.stat().st_ino] = path.read_bytes()
            self._keep(Path(folder), self.listing)
        self.states: list[Callable[[Path], None]] = []
        for name in ("fsync", "replace", "link", "unlink", "mkdir", "rmdir"):
            self._watch(monkeypatch, name)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object, **more: object) -> object:
            result = None
            if name == "fsync":
                path = Path(f"/proc/self/fd/{arguments[0]}").readlink()
                kind = "directory" if path.is_dir() else "file"
                if kind != self.forget:
                    self._synced(path)
            else:
                result = real(*arguments, **more)
            self.remember()
            return result

        monkeypatch.setattr(os, name, call)

    def _synced(self, path: Path) -> None:
        if path.is_dir():
            self._keep(path, self.listing)
        else:
            self.content[path.stat().st_ino] = path.read_bytes()

    def _keep(self, folder: Path, listing: dict[int, dict[str, tuple[bool, int]]]) -> None:
        entries = {entry.name: (entry.is_dir(), entry.inode()) for entry in os.scandir(folder)}
        listing[folder.stat().st_ino] = entries

    def remember(self) -> None:
        """Keep the two worst disks of this moment: nothing unsynced arrived, or all names did and no content."""
        live: dict[int, dict[str, tuple[bool, int]]] = {}
        for folder, _, _ in os.walk(self.root):
            self._keep(Path(folder), live)
        content, synced = dict(self.content), dict(self.listing)
        for listing in (synced, live):
            self.states.append(lambda target, listing=listing: self._lay_out(target, listing, content))

    def _lay_out(
        self, target: Path, listing: dict[int, dict[str, tuple[bool, int]]], content: dict[int, bytes]
    ) -> None:
        def fill(folder: int, out: Path) -> None:
            out.mkdir(parents=True)
            for name, (is_folder, inode) in listing.get(folder, {}).items():
                if is_folder:
                    fill(inode, out / name)
                else:
                    (out / name).write_bytes(content.get(inode, b""))

        fill(self.root.stat().st_ino, target)


@pytest.mark.parametrize("forget", ["", "file", "directory"])
def test_a_power_cut_at_any_moment_leaves_a_whole_version_and_a_forgotten_fsync_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: str
) -> None:
    first, second = make(tmp_path, "1.0.0"), make(tmp_path, "2.0.0")
    root = tmp_path / "device"
    Store(root).prepare()
    install(Store(root), first)
    with monkeypatch.context() as patched:
        disk = Disk(root, patched, forget)
        install(Store(root), second)
        disk.remember()
    failures, last = 0, ""
    for number, lay_out in enumerate(disk.states):
        target = tmp_path / f"cut-{number}"
        lay_out(target)
        try:
            found = check(Store(target), first.digest, second.digest)
            last = found if number % 2 == 0 else last  # of the disks that hold only what was synced
        except (AssertionError, FormatError, NotFound, StorageError):
            failures += 1
        shutil.rmtree(target)
    if forget == "file":
        assert failures, "a forgotten fsync of a file went unnoticed"
    elif forget == "directory":
        assert failures or last != second.digest, "a forgotten fsync of a folder went unnoticed"
    else:
        assert failures == 0
        assert last == second.digest


# --- smaller rules --------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "device")
    made.prepare()
    return made


def test_a_chunk_with_another_hash_is_never_written(store: Store, tmp_path: Path) -> None:
    file = make(tmp_path, "1.0.0")
    part = file.bundle.parts[0]
    with PartialPart(store, part) as partial:
        assert not partial.write(0, b"something else")
        assert not partial.write(7000, file.objects[part.wire_sha256])
        assert partial.have == set()
    assert (store.partial / part.wire_sha256).read_bytes() == b""


def test_good_chunks_are_found_again_by_hashing_and_holes_are_not(store: Store, tmp_path: Path) -> None:
    file = make(tmp_path, "1.0.0")
    part = file.bundle.parts[0]
    wire = os.urandom(5 * CHUNK_BYTES + 17)
    part = dataclasses.replace(part, wire_size=len(wire), chunks=chunk_hashes(wire))
    with PartialPart(store, part) as partial:
        for index in (5, 1, 3):
            assert partial.write(index, wire[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
    with PartialPart(store, part) as partial:
        assert partial.have == {1, 3, 5}


def arrived(store: Store, content: bytes, wire: bytes) -> Part:
    """Put a whole wire form where parts arrive; returns the part whose manifest tells the truth."""
    part = Part("m", sha256_hex(content), len(content), sha256_hex(wire), len(wire), chunk_hashes(wire))
    (store.partial / part.wire_sha256).write_bytes(wire)
    return part


def test_a_part_is_unpacked_without_ever_being_in_memory(store: Store) -> None:
    content = os.urandom(1 << 20) * 16
    part = arrived(store, content, zstd.compress(content, 1))
    del content
    tracemalloc.start()
    try:
        store.finish_part(part)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert sha256_file(store.objects / part.sha256) == part.sha256
    assert (store.objects / part.sha256).stat().st_mode & 0o777 == 0o444
    assert not list(store.partial.iterdir())


@pytest.mark.parametrize("what", ["wire", "content", "size", "frame"])
def test_a_part_that_is_not_what_the_manifest_says_leaves_no_object(store: Store, what: str) -> None:
    content = b"content" * 1000
    part = arrived(store, content, zstd.compress(content, 3))
    match what:
        case "wire":
            (store.partial / part.wire_sha256).write_bytes(zstd.compress(content, -100))  # another frame, same content
        case "content":
            part = dataclasses.replace(part, sha256="0" * 64)
        case "size":
            part = dataclasses.replace(part, size=len(content) - 1)
        case "frame":
            (store.partial / part.wire_sha256).write_bytes(b"no frame")
    with pytest.raises(TrustError, match="part m: "):
        store.finish_part(part)
    assert not list(store.objects.iterdir())
    assert (store.partial / part.wire_sha256).is_file()


def test_an_object_with_another_hash_is_refused(store: Store) -> None:
    with pytest.raises(TrustError, match="arrived with sha256"):
        store.put_object("0" * 64, b"x")
    assert not list(store.objects.iterdir())


def test_an_object_damaged_on_the_disk_is_dropped_when_it_is_read(store: Store, tmp_path: Path) -> None:
    file = make(tmp_path, "1.0.0")
    store.put_object(file.digest, file.manifest_bytes)
    (store.objects / file.digest).chmod(0o644)
    (store.objects / file.digest).write_bytes(b"{}")
    with pytest.raises(NotFound, match="damaged"):
        store.read_object(file.digest, 1 << 20)
    assert file.digest not in store.object_digests()


def test_a_pointer_survives_its_trip_to_the_disk(store: Store) -> None:
    pointer = Pointer("tiny", Installed("1.0.0", "a" * 64, "t", {"m": "v"}), None, True, 2)
    store.write_pointer(pointer)
    assert store.pointer("tiny") == pointer
    assert store.skills() == ("tiny",)
    store.remove_pointer("tiny")
    assert store.pointer("tiny") == Pointer("tiny")


def test_collecting_removes_only_what_is_not_named(store: Store, tmp_path: Path) -> None:
    first, second = make(tmp_path, "1.0.0"), make(tmp_path, "2.0.0")
    install(store, first)
    install(store, second)
    keep = frozenset([second.digest, *(part.sha256 for part in second.bundle.parts)])
    assert store.collect(keep, frozenset([second.digest]), frozenset()) > 0
    assert store.version_digests() == {second.digest}
    assert store.object_digests() == keep
    assert store.damage(second.digest) == ""


def test_a_file_system_without_hard_links_gets_copies(store: Store, tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    file = make(tmp_path, "1.0.0")
    install(store, file)
    assert store.damage(file.digest) == ""
