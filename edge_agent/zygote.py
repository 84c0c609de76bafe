"""The process from which workers are forked: it has imported the runtimes once, so that a worker costs milliseconds.

Speaks SOCK_SEQPACKET with the supervisor. In: {"fork": n} with two descriptors (the worker's channel, its log).
Out: {"ready": {runtime: version}}, {"forked": n, "pid": p} or {"forked": n, "error": why}, {"exit": p, "status": s}. It never
imports grpc: a process with grpc's threads must not fork. When the supervisor dies, the kernel kills the zygote, and with
it the workers.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import selectors
import signal
import socket
import sys

PR_SET_PDEATHSIG = 1
MAX_MESSAGE = 4096


def main(arguments: list[str] | None = None) -> int:
    """Serve forks until the supervisor hangs up."""
    parser = argparse.ArgumentParser(prog="python -m edge_agent.zygote", description=__doc__)
    parser.add_argument("--channel", type=int, required=True, help="descriptor of the socket to the supervisor")
    parser.add_argument("--supervisor", type=int, required=True, help="its process id")
    parser.add_argument("--runtimes", default="", help="runtimes to import, separated by commas")
    given = parser.parse_args(arguments)
    die_with(given.supervisor)
    channel = socket.socket(fileno=given.channel)
    channel.send(json.dumps({"ready": warm(given.runtimes.split(","))}).encode())
    serve(channel)
    return 0


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when `parent` dies, and end at once when it is dead already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def warm(runtimes: list[str]) -> dict[str, str]:
    """Import numpy and the runtimes; return the version of each that is there."""
    # OpenBLAS would start threads, which a fork does not survive; onnxruntime would call home and start one too.
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", ORT_DISABLE_TELEMETRY="1")
    sys.dont_write_bytecode = True  # workers must not write beside a skill's code
    import numpy as np

    from edge_agent import runtimes as doors
    from edge_agent import worker

    found = {"numpy": np.__version__, "worker": worker.__name__}
    for name in filter(None, runtimes):
        version = doors.warm(name)
        if version is not None:
            found[name] = version
    gc.collect()
    gc.freeze()  # the collector would touch, and so copy, every page that workers share
    return found


def serve(channel: socket.socket) -> None:
    """Fork a worker for each request and report each death."""
    wake, alarm = socket.socketpair()
    wake.setblocking(False)
    alarm.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor ends us
    signal.set_wakeup_fd(alarm.fileno(), warn_on_full_buffer=False)
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        selector.register(wake, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is wake:
                    with contextlib.suppress(BlockingIOError):
                        wake.recv(4096)
                    _bury(channel)
                elif not _fork(channel):
                    return


def _fork(channel: socket.socket) -> bool:
    try:
        message, descriptors, _, _ = socket.recv_fds(channel, MAX_MESSAGE, 2)
    except ConnectionError:
        return False
    if not message:
        return False
    number = json.loads(message)["fork"]
    reply: dict[str, object] = {"forked": number}
    try:
        # The kernel hands over fewer when this process may not open more.
        mine, log = descriptors
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _become_worker(parent, channel, mine, log)
        reply["pid"] = pid
    except ValueError:
        reply["error"] = "too many open files"
    except OSError as error:  # no memory or no process left: the workers that run go on
        reply["error"] = error.strerror or str(error)
    for descriptor in descriptors:
        os.close(descriptor)
    channel.send(json.dumps(reply).encode())
    return True


def _become_worker(parent: int, channel: socket.socket, mine: int, log: int) -> None:
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        die_with(parent)
        channel.close()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        sys.stdout = open(1, "w", buffering=1, closefd=False, errors="replace")  # noqa: SIM115 - lives as long as we
        sys.stderr = open(2, "w", buffering=1, closefd=False, errors="replace")  # noqa: SIM115
        from edge_agent import worker

        worker.serve(socket.socket(fileno=mine))
        code = 0
    except BaseException:  # noqa: BLE001 - the outermost frame of a process: its last words go to the log
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _bury(channel: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        with contextlib.suppress(ConnectionError):
            channel.send(json.dumps({"exit": pid, "status": os.waitstatus_to_exitcode(status)}).encode())


if __name__ == "__main__":
    sys.exit(main())
