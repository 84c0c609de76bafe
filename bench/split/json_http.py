"""The input as JSON lists over HTTP, as Sedna's joint inference sends it (`data.tolist()`), to a tail that parses them.

    python -P json_http.py serve HOST:PORT FOLDER          on the tail's side; FOLDER is a plan's, whose segments it runs
    python -P json_http.py ask HOST:PORT SAMPLES.npy       on the device's side

The server prints its port. The other one reads lines `SLOWDOWN NUMBER`; for each, it writes that sample as a device so many
times slower, posts it on the one connection that it has, reads the answer, and prints the milliseconds and the bytes sent.
"""

import http.client
import http.server
import json
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from skills import ort
from skills.codec import DTYPES
from skills.split_plan import Plan, load_plan
from skills.timer import Dilated, Local, Timer

PATIENCE_S = 120.0


class Answering(http.server.BaseHTTPRequestHandler):
    """Runs the whole model on what was posted."""

    protocol_version = "HTTP/1.1"  # the connection stays open
    disable_nagle_algorithm = True
    plan: ClassVar[Plan]
    chain: ClassVar[ort.Chain]

    def do_POST(self) -> None:
        """Parse the lists, run, and answer with lists."""
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        live = self.plan.inputs[0]
        found = self.chain.run({live.name: np.asarray(said["data"], DTYPES[live.dtype])})
        body = json.dumps({name: array.tolist() for name, array in found.items()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing of each request."""


def serve(host: str, port: int, folder: Path) -> None:
    """Answer until the process is ended."""
    plan = Answering.plan = load_plan((folder / "split.yaml").read_text())
    Answering.chain = ort.chain([folder / one.file for one in plan.segments], [live.name for live in plan.outputs])
    with http.server.HTTPServer((host, port), Answering) as server:
        print(json.dumps({"port": server.server_address[1]}), flush=True)
        server.serve_forever()


def ask(host: str, port: int, file: Path) -> None:
    """Post a sample for every line of standard input."""
    samples, server = np.load(file), http.client.HTTPConnection(host, port, timeout=PATIENCE_S)
    for line in sys.stdin:
        slowdown, number = line.split()
        timer: Timer = Dilated(float(slowdown)) if float(slowdown) > 1 else Local()
        sample, start = samples[int(number)], time.perf_counter()
        body = timer.run(lambda sample=sample: json.dumps({"data": sample.tolist()}).encode()).value  # type: ignore[misc]
        server.request("POST", "/", body, {"Content-Type": "application/json"})
        answer = server.getresponse().read()
        timer.run(lambda answer=answer: json.loads(answer))  # type: ignore[misc]
        print(json.dumps({"ms": (time.perf_counter() - start) * 1e3, "bytes": len(body)}), flush=True)


if __name__ == "__main__":
    at, _, number = sys.argv[2].rpartition(":")
    (serve if sys.argv[1] == "serve" else ask)(at, int(number), Path(sys.argv[3]))
