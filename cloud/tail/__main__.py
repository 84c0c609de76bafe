"""Run a tail server: python -m cloud.tail --tails DIR --listen HOST:PORT."""

import argparse
import logging
import signal
import sys
import threading
from pathlib import Path

from cloud.tail.server import DRAIN_S, Server
from skills.errors import SkerryError
from skills.files import write_atomic

WARM_S = 5.0
SWITCH_S = 0.0005  # Python's own is 5 ms: so long the computing thread may wait for its turn after every segment


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cloud.tail", description="Serve the cloud's part of split models (Open Inference Protocol v2)."
    )
    parser.add_argument("--tails", type=Path, required=True, metavar="DIR", help="folder with one folder per plan hash")
    parser.add_argument(
        "--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="address to listen on; port 0 takes a free one"
    )
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="whose client certificates are accepted")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE")
    parser.add_argument("--tls-key", type=Path, metavar="FILE")
    parser.add_argument(
        "--tls-crl", type=Path, metavar="FILE", help="certificates that are refused; read again when changed"
    )
    parser.add_argument(
        "--allowed", type=Path, metavar="FILE", help="which device may use which plan; read again when changed"
    )
    parser.add_argument("--port-file", type=Path, metavar="FILE", help="written with the port once the server answers")
    parser.add_argument(
        "--metrics",
        metavar="HOST:PORT",
        help="Prometheus metrics, /live and /ready over HTTP; beyond loopback with TLS",
    )
    parser.add_argument(
        "--drain", type=float, default=DRAIN_S, metavar="SECONDS", help="how long SIGTERM lets what waits finish"
    )
    parser.add_argument("--threads", type=int, default=1, help="onnxruntime threads per segment")
    parser.add_argument(
        "--stages",
        choices=("released", "never", "any"),
        default="released",
        help="whose stages of skills run here: those of the plans that --allowed names (as by default), nobody's, or anybody's",
    )
    chosen = parser.parse_args(argv)
    files = (chosen.tls_ca, chosen.tls_cert, chosen.tls_key)
    if any(files) and not all(files):
        parser.error("--tls-ca, --tls-cert and --tls-key belong together")
    if (chosen.tls_crl or chosen.allowed) and not all(files):
        parser.error(
            "--tls-crl and --allowed need --tls-ca, --tls-cert and --tls-key: without TLS nobody says who it is"
        )
    if not 0 <= chosen.drain <= 3600:
        parser.error(f"--drain is {chosen.drain:g}, expected 0 to 3600 seconds")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    sys.setswitchinterval(SWITCH_S)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        server = Server(
            chosen.tails,
            chosen.listen,
            tls=files if all(files) else None,
            crl=chosen.tls_crl,
            allowed=chosen.allowed,
            threads=chosen.threads,
            stages=chosen.stages,
            metrics_at=chosen.metrics,
        )
        if chosen.port_file is not None:
            # Who waits for the file may measure or ask at once: usually all is warm by then, and many plans hold up nobody.
            server.wait_warm(WARM_S)
            write_atomic(chosen.port_file, f"{server.port}\n".encode())
    except SkerryError as error:
        print(f"tail: {error}", file=sys.stderr)
        return error.exit_code
    stop.wait()
    server.stop(chosen.drain)
    return 0


if __name__ == "__main__":
    sys.exit(main())
