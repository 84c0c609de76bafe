"""One version of one skill in a process of its own. It is unloaded by killing it: the operating system frees everything.

Forked by the zygote; speaks frames (edge_agent/ipc.py) with the supervisor, one request at a time. Operations: `load`,
`probe`, `infer` (with `left_s`, how long its asker still waits); `measure`, of a worker that has loaded nothing. Answers
carry "ok"; a failure carries "error" (one sentence) and "code" (skills/errors.py).
"""

import contextlib
import functools
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent import ipc, runtimes
from edge_agent.answer import Answer, answer_request
from skills.bundle import MAX_MANIFEST_BYTES, decode_bundle
from skills.errors import FormatError, SkerryError
from skills.files import read_bytes, sha256_hex
from skills.manifest import Skill, Variant
from skills.measurement import read_work
from skills.stages import StageChain, load_stage
from skills.timer import Local, Timer, parse_timer
from skills.wire import encode_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]


class CallableModel:
    """What control code is handed: `model(x=array)` runs the chosen variant and returns its outputs by name."""

    def __init__(self, variant: Variant, folder: Path, timer: Timer, link: Path | None, wait_s: float) -> None:
        self._timer, self._split, self._run = timer, None, None
        self.until_s: float | None = None  # when the asker stops waiting, on the monotonic clock
        if variant.split is not None:
            from edge_agent.infer import SplitModel

            plan_folder = (folder / variant.split).parent
            self._split = SplitModel(plan_folder, timer=timer, link=link, wait_s=wait_s)
        else:
            self._run = runtimes.door(variant.runtime).load(folder / str(variant.file)).run

    def __call__(self, **feeds: "NDArray[Any]") -> "Arrays":
        if self._split is not None:
            return self._split.answer(feeds, _left_s(self.until_s))
        return self._timer.run(lambda: self._run(feeds)).value  # type: ignore[misc]

    @property
    def ran(self) -> tuple[str, str]:
        """Return where the last run was and which cut it took."""
        return ("local", "local") if self._split is None else (self._split.last.where, self._split.last.cut)

    @property
    def away(self) -> str | None:
        """Return why the tail could not be asked, "" when it could, None where there is none or it is not known."""
        return None if self._split is None else self._split.away

    @contextlib.contextmanager
    def kept_local(self) -> Iterator[None]:
        """Run everything here meanwhile: a probe must say something of this device, not of the network."""
        if self._split is None:
            yield
            return
        self._split.use("local")
        try:
            yield
        finally:
            self._split.use(None)


class LoadedSkill:
    """A version with its models loaded and its control code imported."""

    def __init__(
        self, skill: Skill, folder: Path, variants: Mapping[str, str], timer: Timer, link: Path | None, wait_s: float
    ) -> None:
        self.skill, self.folder = skill, folder
        placed = skill.placement is not None
        self._models: dict[str, CallableModel] = {}
        for name, model in skill.models.items():
            variant = next((v for v in model.variants if v.name == variants.get(name)), None)
            if variant is None:
                raise FormatError(f"model '{name}' has no variant called '{variants.get(name)}'")
            # The stages of a placed skill are timed whole, their models within them.
            self._models[name] = CallableModel(variant, folder, Local() if placed else timer, link, wait_s)
        self._stages = [(stage, load_stage(folder, stage.code, stage.name)) for stage in skill.stages]
        self._placed = None
        if placed:
            from edge_agent.infer import SplitModel

            chain = StageChain(
                tuple(_bound(function, self._models[stage.model]) for stage, function in self._stages),
                tuple(stage.name for stage in skill.stages),
            )
            self._placed = SplitModel(folder, timer=timer, link=link, wait_s=wait_s, stages=chain)

    def run(self, inputs: "Arrays", until_s: float | None = None) -> Answer:
        """Run all stages on checked inputs; the asker stops waiting at `until_s` on the monotonic clock.

        Raises:
            FormatError: the control code refuses the input, or returns something else than the skill promises.
        """
        if self._placed is not None:
            outputs = self._placed.answer(inputs, _left_s(until_s))
            ran = self._placed.last
            return Answer(outputs=dict(outputs), where=ran.where, cut=ran.cut, tail=self._placed.away)
        for model in self._models.values():
            model.until_s = until_s
        arrays = inputs
        for stage, function in self._stages:
            arrays = function(arrays, self._models[stage.model])
            if not isinstance(arrays, Mapping):
                raise FormatError(f"stage '{stage.name}' returned {type(arrays).__name__}, expected arrays by name")
        places = [model.ran for model in self._models.values()]
        elsewhere = [place for place in places if place[0] != "local"]
        where, cut = elsewhere[0] if elsewhere else ("local", "local")
        tails = [model.away for model in self._models.values() if model.away is not None]
        return Answer(outputs=dict(arrays), where=where, cut=cut, tail=max(tails, default=None, key=len))

    def run_here(self, inputs: "Arrays") -> Answer:
        """Run as `run` does, with every stage and every model wholly on the device."""
        with contextlib.ExitStack() as stack:
            if self._placed is not None:
                self._placed.use("local")
                stack.callback(self._placed.use, None)
            for model in self._models.values():
                stack.enter_context(model.kept_local())
            return self.run(inputs)


def _left_s(until_s: float | None) -> float | None:
    return None if until_s is None else until_s - time.monotonic()


def _bound(function: "Callable[[Arrays, Any], Arrays]", model: CallableModel) -> "Callable[[Arrays], Arrays]":
    return lambda arrays: function(arrays, model)


def serve(channel: socket.socket) -> None:
    """Answer the supervisor until it hangs up."""
    loaded: LoadedSkill | None = None
    while (received := ipc.receive(channel)) is not None:
        header, body = received
        try:
            if header["op"] == "load":
                loaded = _load(header)
                reply: dict[str, object] = {"pss_kb": pss_kb()}
                answer = b""
            elif header["op"] == "measure" and loaded is None:
                reply, answer = {}, _measure(header, bytes(body))
            elif loaded is None:
                raise FormatError("nothing is loaded yet")
            elif header["op"] == "probe":
                from edge_agent.probe import check

                reply, answer = {"probe": check(loaded)}, b""
            else:
                until_s = time.monotonic() + header["left_s"] if "left_s" in header else None
                run = functools.partial(loaded.run, until_s=until_s)
                reply, answer = answer_request(loaded.skill, run, header, body)
        except SkerryError as error:
            reply, answer = {"ok": False, "error": str(error), "code": error.exit_code}, b""
        except Exception as error:  # noqa: BLE001 - the outermost loop of a process, around foreign code
            traceback.print_exc()
            reply, answer = {"ok": False, "error": last_line(error), "code": 1}, b""
        channel.sendall(ipc.frame({"ok": True, **reply}, answer))


def _load(header: Mapping[str, Any]) -> LoadedSkill:
    folder = Path(header["folder"])
    bundle = decode_bundle(read_bytes(Path(header["manifest"]), "the manifest", MAX_MANIFEST_BYTES), "the manifest")
    os.chdir(folder)
    return LoadedSkill(
        bundle.skill,
        folder,
        header["variants"],
        parse_timer(header["timer"]),
        Path(header["link"]) if header.get("link") else None,
        header["tail_deadline_ms"] / 1e3,
    )


def _measure(header: Mapping[str, Any], body: bytes) -> bytes:
    from edge_agent.measure import measure

    work, timer = read_work(body), parse_timer(header["timer"])
    return encode_json(measure(Path(header["folder"]), sha256_hex(body), work, timer, header["memory_mb"]))


def last_line(error: BaseException) -> str:
    """Return an exception of a skill's code as one sentence."""
    where = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(where[-1].filename).name} line {where[-1].lineno})" if where else ""
    return f"the skill's code failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


def pss_kb(pid: int | str = "self") -> int:
    """Return the proportional set size of a process in KiB, 0 where the kernel does not tell."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
