"""The stages of one plan in a process of their own: python -m cloud.tail.stage_worker. It ends with the tail that began it.

Foreign code, though signed: what it raises, breaks or never finishes is this process's affair and no other plan's. Speaks
frames (edge_agent/ipc.py) on a socket, one stage of one message at a time.
"""

import argparse
import os
import socket
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent import ipc
from edge_agent.worker import last_line
from skills import ort
from skills.errors import FormatError, SkerryError, TrustError
from skills.files import read_bytes, sha256_hex
from skills.split_plan import MAX_PLAN_BYTES, Plan, load_plan, plan_hash
from skills.stages import StageChain, check_stages, fitted, load_stage, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

MAX_MODEL_BYTES = 1 << 30


def load(folder: Path, name: str, threads: int = 1) -> tuple[Plan, StageChain]:
    """Load the plan whose hash is `name` and its stages; every file is checked before anything of any is run.

    Raises:
        TrustError: the plan or a file is not what the hash stands for.
        FormatError, NotFound: a file is missing or not what it should be.
    """
    text = read_bytes(folder / "split.yaml", "the split plan", MAX_PLAN_BYTES).decode("utf-8", "replace")
    plan = load_plan(text, f"{name}/split.yaml")
    if plan_hash(plan) != name:
        raise TrustError(f"the folder {name} holds the plan {plan_hash(plan)}")
    check_stages(plan)
    models = {stage.model for stage in plan.stages}
    kept = {}
    for part in plan.parts:
        data = read_bytes(folder / part.file, "the part", MAX_MODEL_BYTES)
        if (found := sha256_hex(data)) != part.sha256:
            raise TrustError(f"the part {part.file} has sha256 {found[:12]}…, the plan says {part.sha256[:12]}…")
        if part.file in models:
            kept[part.file] = data
    sessions = {file: ort.session(data, threads) for file, data in kept.items()}
    runs = []
    for stage, segment in zip(plan.stages, plan.segments, strict=True):
        function = load_stage(folder, segment.file, stage.name, segment.sha256)
        runs.append(_bound(function, sessions[stage.model]))
    return plan, StageChain(tuple(runs), tuple(stage.name for stage in plan.stages))


def serve(channel: socket.socket, plan: Plan, chain: StageChain) -> None:
    """Answer the tail until it hangs up."""
    while (received := ipc.receive(channel)) is not None:
        header, body = received
        reply, answer = _answer(plan, chain, header, body)
        channel.sendall(ipc.frame({"number": header["number"], **reply}, answer))


def _answer(plan: Plan, chain: StageChain, header: Mapping[str, Any], body: memoryview) -> tuple[dict[str, Any], bytes]:
    at = int(header["stage"])
    stage = plan.stages[at]
    before = plan.stages[at - 1].message if at else plan.inputs
    try:
        made = chain.run(unpack(before, header["shapes"], body), at, at + 1)
        shapes, data = pack(stage.message, fitted(stage.message, made, f"what stage '{stage.name}' returned"))
    except SkerryError as error:
        return {"error": str(error)}, b""
    except Exception as error:  # noqa: BLE001 - the outermost loop of a process, around foreign code
        traceback.print_exc()
        return {"error": f"stage '{stage.name}': {last_line(error)}"}, b""
    return {"shapes": shapes}, data


def _bound(function: "Callable[[Arrays, Any], Arrays]", session: ort.Session) -> "Callable[[Arrays], Arrays]":
    def model(**feeds: "NDArray[Any]") -> "Arrays":
        return session.run(feeds)

    return lambda arrays: function(arrays, model)


def _end_with_parent() -> None:
    """End this process, whatever its code is doing, when nobody holds the other end of standard input any more."""
    while os.read(0, 1):
        pass
    os._exit(0)


def main(argv: list[str] | None = None) -> int:
    """Load the plan, say so or why not, and serve."""
    parser = argparse.ArgumentParser(prog="python -m cloud.tail.stage_worker")
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--plan", required=True)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args(argv)
    threading.Thread(target=_end_with_parent, name="with-parent", daemon=True).start()
    channel = socket.socket(fileno=chosen.channel)
    os.chdir(chosen.folder)
    try:
        plan, chain = load(chosen.folder, chosen.plan, chosen.threads)
    except SkerryError as error:
        channel.sendall(ipc.frame({"number": 0, "error": str(error), "code": error.exit_code}))
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - what foreign code raises as it is imported
        traceback.print_exc()
        channel.sendall(ipc.frame({"number": 0, "error": last_line(error), "code": FormatError.exit_code}))
        return FormatError.exit_code
    channel.sendall(ipc.frame({"number": 0}))
    serve(channel, plan, chain)
    return 0


if __name__ == "__main__":
    sys.exit(main())
