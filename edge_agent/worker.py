"""One version of one skill in a process of its own. It is unloaded by killing it: the operating system frees everything.

Forked by the zygote; speaks frames (edge_agent/ipc.py) with the supervisor, one request at a time. Operations: `load`,
`probe`, `infer`; `measure`, of a worker that has loaded nothing. Answers carry "ok"; a failure carries "error" (one
sentence) and "code" (skills/errors.py).
"""

import contextlib
import importlib.util
import os
import socket
import sys
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
from skills.timer import Timer, parse_timer
from skills.wire import encode_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]
    StageFunction = Callable[[Arrays, "CallableModel"], Arrays]


class CallableModel:
    """What control code is handed: `model(x=array)` runs the chosen variant and returns its outputs by name."""

    def __init__(self, variant: Variant, folder: Path, timer: Timer, link: Path | None, wait_s: float) -> None:
        self._timer, self._split, self._run = timer, None, None
        if variant.split is not None:
            from edge_agent.infer import SplitModel

            plan_folder = (folder / variant.split).parent
            self._split = SplitModel(plan_folder, timer=timer, link=link, wait_s=wait_s)
        else:
            self._run = runtimes.door(variant.runtime).load(folder / str(variant.file)).run

    def __call__(self, **feeds: "NDArray[Any]") -> "Arrays":
        if self._split is not None:
            return self._split(**feeds)
        return self._timer.run(lambda: self._run(feeds)).value  # type: ignore[misc]

    @property
    def ran(self) -> tuple[str, str]:
        """Return where the last run was and which cut it took."""
        return ("local", "local") if self._split is None else (self._split.last.where, self._split.last.cut)

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
        self._models: dict[str, CallableModel] = {}
        for name, model in skill.models.items():
            variant = next((v for v in model.variants if v.name == variants.get(name)), None)
            if variant is None:
                raise FormatError(f"model '{name}' has no variant called '{variants.get(name)}'")
            self._models[name] = CallableModel(variant, folder, timer, link, wait_s)
        self._stages = [(stage, load_stage(folder, stage.code, stage.name)) for stage in skill.stages]

    def run(self, inputs: "Arrays") -> Answer:
        """Run all stages on checked inputs.

        Raises:
            FormatError: the control code refuses the input, or returns something else than the skill promises.
        """
        arrays = inputs
        for stage, function in self._stages:
            arrays = function(arrays, self._models[stage.model])
            if not isinstance(arrays, Mapping):
                raise FormatError(f"stage '{stage.name}' returned {type(arrays).__name__}, expected arrays by name")
        ran = [model.ran for model in self._models.values()]
        away = [entry for entry in ran if entry[0] != "local"]
        where, cut = away[0] if away else ("local", "local")
        return Answer(outputs=dict(arrays), where=where, cut=cut)

    def run_here(self, inputs: "Arrays") -> Answer:
        """Run as `run` does, with every model wholly on the device."""
        with contextlib.ExitStack() as stack:
            for model in self._models.values():
                stack.enter_context(model.kept_local())
            return self.run(inputs)


def load_stage(folder: Path, code: str, name: str) -> "StageFunction":
    """Import a stage's file, without writing beside it, and return the function that is named like the stage."""
    spec = importlib.util.spec_from_file_location(f"skerry_stage_{name}", folder / code)
    if spec is None or spec.loader is None:
        raise FormatError(f"{code} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling in a skill's code look themselves up
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise FormatError(f"{code} has no function '{name}'")
    result: StageFunction = function
    return result


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
                reply, answer = answer_request(loaded.skill, loaded.run, header, body)
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
