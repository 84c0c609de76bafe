"""One device of the story: a real agent in a process of its own, with a data folder of its own."""

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cloud.interrupts import held_back
from skills.errors import DeadlineExceeded, FormatError, SkerryError, Unreachable, error_for

if TYPE_CHECKING:
    from skills.oip import Answer, Call

ENROLL_DEADLINE_S = 30.0
START_DEADLINE_S = 30.0
STOP_DEADLINE_S = 10.0
ASK_DEADLINE_S = 20.0
LOOK_EVERY_S = 0.1


class Board:
    """A device called `name` below `folder`."""

    def __init__(self, name: str, folder: Path, config: str) -> None:
        self.name, self.folder = name, folder
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: http.client.HTTPConnection | None = None
        folder.mkdir(parents=True)
        (folder / "agent.yaml").write_text(f"listen: 127.0.0.1:0\n{config}")

    def enroll(self, token: str) -> None:
        """Join the controller, with the line that `skerry devices invite` prints.

        Raises:
            SkerryError: what the agent said.
        """
        done = subprocess.run(
            [*self._command("enroll"), token, "--name", self.name],
            capture_output=True,
            text=True,
            timeout=ENROLL_DEADLINE_S,
            check=False,
        )
        if done.returncode:
            raise error_for(done.returncode, f"{self.name}: {done.stderr.strip().removeprefix('skerry-agent: ')}")

    def start(self) -> None:
        """Start `skerry-agent run` and wait for its local endpoint.

        Raises:
            SkerryError: it ended; its last words.
            DeadlineExceeded: it was not there in time.
        """
        output = self.folder / "output.log"
        # A session of its own: a Ctrl-C at the terminal reaches the demo, which then stops its agents in order.
        with output.open("wb") as sink, held_back():
            self._process = subprocess.Popen(
                self._command("run"), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
            )
        end = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise SkerryError(
                    f"the agent {self.name} ended at once: {output.read_text(errors='replace').strip()[-500:]}"
                )
            for line in output.read_text(errors="replace").splitlines():
                if line.startswith("skills at http://"):
                    port = int(line.split(":")[2].split("/")[0])
                    self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ASK_DEADLINE_S)
                    return
            time.sleep(LOOK_EVERY_S)
        raise DeadlineExceeded(
            f"the agent {self.name} was not ready within {START_DEADLINE_S:.0f} s; its log: {self.folder / 'agent.log'}"
        )

    def ask(self, skill: str, call: "Call") -> tuple["Answer", float]:
        """Ask a skill at the device's own endpoint, as a program on it would; return the answer and the milliseconds it took.

        Raises:
            SkerryError: what the endpoint said.
            Unreachable: it is not there.
        """
        from skills.oip import BINARY_HEADER, decode_answer, encode_call

        if self._connection is None:
            raise Unreachable(f"{self.name} is not running")
        body, json_len = encode_call(call)
        path, headers = f"/v2/models/{skill}/infer", {BINARY_HEADER: str(json_len)}
        begin = time.perf_counter()
        try:
            try:
                response, data = _post(self._connection, path, body, headers)
            except ConnectionError:  # the agent closes a connection that was silent for a minute: on to a new one
                self._connection.close()
                begin = time.perf_counter()
                response, data = _post(self._connection, path, body, headers)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise Unreachable(f"{self.name} does not answer: {error}") from None
        took_ms = (time.perf_counter() - begin) * 1000
        if response.status != 200:
            raise SkerryError(f"{self.name} answered {response.status}: {data[:500].decode(errors='replace')}")
        size = response.getheader(BINARY_HEADER)
        if size is not None and not size.isdecimal():
            raise FormatError(f"{self.name} answered with {BINARY_HEADER}: {size[:20]!r}")
        return decode_answer(data, None if size is None else int(size)), took_ms

    def usage(self) -> list[dict[str, object]]:
        """Return the records that the device keeps of its answers, oldest first."""
        import json

        path = self.folder / "usage" / "usage.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def stop(self) -> None:
        """Stop the agent with all its workers."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(STOP_DEADLINE_S)

    def _command(self, verb: str) -> list[str]:
        return [sys.executable, "-P", "-m", "edge_agent", verb, "--data", str(self.folder)]


def _post(
    connection: http.client.HTTPConnection, path: str, body: bytes, headers: dict[str, str]
) -> tuple[http.client.HTTPResponse, bytes]:
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    return response, response.read()
