"""The result folder and what lies beside it: whole or absent, whatever happens."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress import folder
from compress.folder import Cache, best_folder, check_out, forget, workdir, write_folder
from skills.errors import Refused, StorageError, UsageError


def everything(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_folder_that_cannot_be_renamed_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for out in (Path(), Path(".."), tmp_path / "here" / "below", Path("../below")):
        with pytest.raises(UsageError, match="is the folder that you work in.*give a folder inside it"):
            folder.check_out(out)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "volume")
    with pytest.raises(UsageError, match="volume is a mount point.*volume/out"):
        folder.check_out(tmp_path / "volume")
    folder.check_out(tmp_path / "volume" / "out")
    folder.check_out(Path("new"))


def test_a_second_run_on_the_same_folder_is_refused_by_the_number_of_the_first(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    said = rf"process {os.getpid()}\) is at work on .*out: wait for it or end it"
    other = folder.only_run(tmp_path / "deep" / "other")
    with folder.only_run(out), other, pytest.raises(Refused, match=said), folder.only_run(out):
        pytest.fail("two at once")
    with pytest.raises(ZeroDivisionError), folder.only_run(out):
        raise ZeroDivisionError
    with folder.only_run(out):
        pass
    assert everything(tmp_path) == {}


def test_the_hold_on_a_folder_ends_with_its_process(tmp_path: Path) -> None:
    held, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        with folder.only_run(tmp_path / "out"):
            os.write(tell, b".")
            signal.pause()
    os.read(held, 1)
    with pytest.raises(Refused, match=f"process {pid}"), folder.only_run(tmp_path / "out"):
        pytest.fail("two at once")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with folder.only_run(tmp_path / "out"):
        pass


def test_files_may_lie_in_folders_of_their_own(tmp_path: Path) -> None:
    files = {"report.json": b"{}", "pareto/1.onnx": b"one", "pareto/2.onnx": b"two"}
    write_folder(tmp_path / "out", files)
    assert everything(tmp_path / "out") == files


def test_what_was_put_into_an_earlier_result_while_the_new_one_was_made_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_folder(out, {"model.onnx": b"1", "report.json": b"{}", "pareto/1.onnx": b"1"})
    (out / "notes.txt").write_text("mine")
    (out / "pareto" / "why.txt").write_text("mine as well")
    write_folder(out, {"model.onnx": b"2", "report.json": b"{}"})
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {
        "out/model.onnx": "2", "out/report.json": "{}", "out/notes.txt": "mine", "out/pareto/why.txt": "mine as well"
    }  # fmt: skip
    assert not list(tmp_path.glob(".out*"))


def test_what_cannot_be_moved_over_is_kept_and_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_folder(out, {"report.json": b"1"})
    (out / "pareto").write_text("mine")  # where the new result has a folder
    (out / "recipe.yaml").mkdir()
    with pytest.raises(StorageError, match="is written, but pareto, which was put into the earlier result") as error:
        write_folder(out, {"report.json": b"2", "pareto/1.onnx": b"2"})
    assert everything(out) == {"report.json": b"2", "pareto/1.onnx": b"2"}
    assert (out / "recipe.yaml").is_dir()
    (old,) = tmp_path.glob(".out.*.old")
    assert str(old) in str(error.value)
    assert everything(old)["pareto"] == b"mine"


def test_a_link_is_no_place_for_a_result(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "there")
    with pytest.raises(UsageError, match=r"is a link, .* give .*there"):
        check_out(tmp_path / "out")


def test_a_run_keeps_its_best_beside_the_result_and_forgets_it_in_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    write_folder(best_folder(out), {"model.onnx": b"first"})
    write_folder(best_folder(out), {"model.onnx": b"better"})
    assert everything(tmp_path) == {"deep/.out.work/best/model.onnx": b"better"}
    forget(out)
    assert not workdir(out).exists()
    forget(out)


def test_a_value_comes_back_under_its_key_only(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    assert cache.get("a") is None
    cache.put("a", b"1")
    cache.put("b/../c", b"")
    assert (cache.get("a"), cache.get("b/../c"), cache.get("b")) == (b"1", b"", None)
    assert Cache(tmp_path / "c").get("a") == b"1"


def test_a_value_that_the_disk_changed_counts_as_not_there(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    for damage in (lambda raw: raw[:-1], lambda raw: raw[:-1] + b"?", lambda _: b""):
        cache.put("a", b"value")
        (path,) = cache.folder.iterdir()
        path.write_bytes(damage(path.read_bytes()))
        assert cache.get("a") is None


def test_a_cache_stays_within_its_bound_and_lets_the_longest_unused_go(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", most=3 * (folder.HASH_BYTES + 10))
    for at, key in enumerate("abc"):
        cache.put(key, key.encode() * 10)
        os.utime(cache.folder / folder.sha256_hex(key.encode()), (at, at))
    assert cache.get("a") == b"a" * 10  # read just now, so b is the oldest
    cache.put("d", b"d" * 10)
    assert [key for key in "abcd" if cache.get(key)] == ["a", "c", "d"]
    cache.put("huge", b"h" * 200)
    assert cache.get("huge") is None
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= cache.most


@pytest.mark.parametrize("name", ["fsync", "replace", "open"])
def test_a_full_disk_leaves_the_earlier_value_and_no_rest(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "c")
    cache.put("a", b"earlier")

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, name, full)
    with pytest.raises(StorageError, match="no space left to write"):
        cache.put("a", b"later")
    monkeypatch.undo()
    assert cache.get("a") == b"earlier"
    assert len(list(cache.folder.iterdir())) == 1


DEADLY = ("open", "fsync", "replace", "rename", "mkdir", "unlink", "fdopen")


def die_at(number: int, root: Path) -> None:
    """In a forked child: really die before the n-th call that changes the disk."""
    left = number

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), 9)
            return real(*arguments, **named)

        return call

    for name in DEADLY:
        setattr(os, name, deadly(getattr(os, name)))
    try:
        Cache(root / "c").put("a", b"later" * 999)
        write_folder(root / "out", {"report.json": b"later", "pareto/1.onnx": b"later"})
    except BaseException:  # noqa: BLE001 - this process ends here, whatever happened
        os._exit(3)
    os._exit(0)


def test_death_between_any_two_writes_leaves_the_old_or_the_new_whole(tmp_path: Path) -> None:
    outcomes = []
    for number in range(100):
        root = tmp_path / str(number)
        Cache(root / "c").put("a", b"earlier")
        write_folder(root / "out", {"report.json": b"earlier"})
        (root / "out" / "notes.txt").write_bytes(b"mine")
        pid = os.fork()
        if pid == 0:
            die_at(number, root)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        cached = Cache(root / "c").get("a")
        assert cached in (b"earlier", b"later" * 999)
        assert len(list((root / "c").iterdir())) == 1
        moved = next(iter(root.glob(".out.*.old")), None)
        mine = [folder for folder in (root / "out", *([moved] if moved else [])) if (folder / "notes.txt").exists()]
        assert len(mine) == 1
        kept = everything(root / "out") or everything(moved or root / "out")
        kept.pop("notes.txt", None)
        assert kept in ({"report.json": b"earlier"}, {"report.json": b"later", "pareto/1.onnx": b"later"})
        outcomes.append((cached, len(kept)))
        if status == 0:
            break
        assert status == -9
    assert len(outcomes) > 15
    assert outcomes[0] == (b"earlier", 1)
    assert outcomes[-1] == (b"later" * 999, 2)
