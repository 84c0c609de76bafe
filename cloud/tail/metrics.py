"""What the tail counts, for Prometheus; and the small HTTP listener that says it: /metrics, /live, /ready.

Labels are bounded: plans and cuts are named only once they are loaded, and forgotten with their plan.
"""

import contextlib
import http.server
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from skills.errors import FormatError, MissingExtra, Unreachable, UsageError

BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16)
ASK_TIMEOUT_S = 5.0  # for a whole exchange, handshake and answer included
MAX_CONNECTIONS = 16  # at once: Prometheus, a load balancer and a person need three
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Metrics:
    """Counters, gauges and histograms of one tail; for use from many threads."""

    def __init__(self) -> None:
        prometheus = _prometheus()
        self._registry = prometheus.CollectorRegistry()
        here = {"registry": self._registry, "namespace": "skerry_tail"}
        cut, plan = ("plan", "cut"), ("plan", "after")
        seconds = {"labelnames": cut, "buckets": BUCKETS_S, **here}
        make = prometheus.Counter, prometheus.Gauge, prometheus.Histogram
        counter, gauge, histogram = make
        self._requests = counter("requests", "Requests that were answered", labelnames=cut, **here)
        self._refused = counter("refused", "Requests that were not answered, by reason", labelnames=("reason",), **here)
        self._expired = counter("expired", "Queued requests given up, by where", labelnames=("where",), **here)
        self._total = histogram("request_seconds", "From the request's arrival to its answer", **seconds)
        self._queued = histogram("queue_seconds", "Of it, waiting for the compute thread", **seconds)
        self._computed = histogram("compute_seconds", "Of it, running segments", **seconds)
        self._batches = histogram("batch_size", "Requests run as one", labelnames=plan, buckets=BATCH_BUCKETS, **here)
        self._max_batch = gauge("max_batch", "The measured batch size", labelnames=plan, **here)
        self._batch_ms = gauge("batch_ms", "A batch's measured time", labelnames=(*plan, "size"), **here)
        self._waiting = gauge("queue_length", "Requests that wait", **here)
        self._held = gauge("held_bytes", "Bytes of requests held, waiting or running", **here)
        self._loaded = gauge("plans_loaded", "Plans in memory", **here)
        self._ready = gauge("ready", "1 once warm, 0 again while draining", **here)

    def watch(
        self,
        waiting: Callable[[], float],
        held: Callable[[], float],
        loaded: Callable[[], float],
        ready: Callable[[], float],
    ) -> None:
        """Ask these whenever somebody looks."""
        for gauge, value in (
            (self._waiting, waiting), (self._held, held), (self._loaded, loaded), (self._ready, ready)
        ):  # fmt: skip
            gauge.set_function(value)

    def answered(self, plan: str, cut: str, total_s: float, queue_s: float, compute_s: float) -> None:
        """Count an answer and where its time went."""
        self._requests.labels(plan, cut).inc()
        for histogram, value in ((self._total, total_s), (self._queued, queue_s), (self._computed, compute_s)):
            histogram.labels(plan, cut).observe(value)

    def refused(self, reason: str) -> None:
        """Count a request without an answer."""
        self._refused.labels(reason).inc()

    def expired(self, where: str) -> None:
        """Count a queued request that was given up: queue, segment, gone or drain."""
        self._expired.labels(where).inc()

    def batch(self, plan: str, after: int, size: int) -> None:
        """Count a run of `size` requests as one."""
        self._batches.labels(plan, str(after)).observe(size)

    def measured(self, plan: str, after: int, max_batch: int, batch_ms: dict[int, float]) -> None:
        """Show what the batch sizes of a plan took when it was loaded."""
        self._max_batch.labels(plan, str(after)).set(max_batch)
        for size, took in batch_ms.items():
            self._batch_ms.labels(plan, str(after), str(size)).set(took)

    def forget(self, plan: str) -> None:
        """Drop all that is counted for a plan that is no longer here."""
        for family in (
            self._requests, self._total, self._queued, self._computed, self._batches, self._max_batch, self._batch_ms
        ):  # fmt: skip
            family.remove_by_labels({"plan": plan})

    def text(self) -> bytes:
        """Return everything in Prometheus' text exposition format."""
        return bytes(_prometheus().generate_latest(self._registry))


class Listener:
    """Serves GET /metrics, /live and /ready on a thread of its own until `close`."""

    def __init__(
        self, listen: str, metrics: Metrics, ready: Callable[[], bool], tls: tuple[Path, Path, Path] | None = None
    ) -> None:
        """Listen on HOST:PORT; with `tls` (ca, certificate, key) only for who has a certificate of that CA.

        Raises:
            UsageError: not HOST:PORT; or without TLS an address that others reach.
            Unreachable: the port is taken.
            FormatError: a TLS file is not what it should be.
        """
        host, _, port = listen.rpartition(":")
        host = host.strip("[]")
        if not host or not port.isdigit():
            raise UsageError(f"--metrics is {listen!r}, expected HOST:PORT")
        if tls is None and host not in LOOPBACK:
            raise UsageError(f"--metrics {listen} is more than loopback: that needs --tls-ca, --tls-cert and --tls-key")
        context = _context(*tls) if tls is not None else None
        try:
            self._server = _Server((host, int(port)), _handler(metrics, ready), ipv6=":" in host)
        except (OSError, OverflowError) as error:
            raise Unreachable(f"the metrics cannot listen on {listen}: {error}") from None
        self._server.context = context
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.2,), name="tail-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=ASK_TIMEOUT_S)


class _Server(http.server.ThreadingHTTPServer):
    """A thread for each connection, of which there are few, and none for long."""

    daemon_threads = True
    context: ssl.SSLContext | None = None

    def __init__(self, address: tuple[str, int], handler: Any, *, ipv6: bool) -> None:
        self.address_family = socket.AF_INET6 if ipv6 else socket.AF_INET
        self._lock = threading.Lock()
        self._open: dict[
            int, tuple[socket.socket, float]
        ] = {}  # by request: a second handle on it, and until when it may last
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        handle = request.dup()  # TLS takes the first one over; with this one the connection is ended whoever has it
        with self._lock:
            room = len(self._open) < MAX_CONNECTIONS
            if room:
                self._open[id(request)] = handle, time.monotonic() + ASK_TIMEOUT_S
        if not room:
            handle.close()
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._forget(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(request)

    def service_actions(self) -> None:
        """End what takes too long; the library asks for this several times a second."""
        now = time.monotonic()
        with self._lock:
            for handle, until in self._open.values():
                if now > until:
                    with contextlib.suppress(OSError):  # it has just ended by itself
                        handle.shutdown(socket.SHUT_RDWR)

    def _forget(self, request: Any) -> None:
        with self._lock:
            handle, _ = self._open.pop(id(request))
            handle.close()

    def finish_request(self, request: Any, client_address: Any) -> None:
        # In the connection's own thread, handshake too: one who says nothing holds up nobody.
        request.settimeout(ASK_TIMEOUT_S)
        if self.context is None:
            super().finish_request(request, client_address)
            return
        with self.context.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a connection that ended early is the other side's business."""


def _handler(metrics: Metrics, ready: Callable[[], bool]) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = ASK_TIMEOUT_S

        def do_GET(self) -> None:
            answers: dict[str, Callable[[], tuple[int, bytes]]] = {
                "/metrics": lambda: (200, metrics.text()),
                "/live": lambda: (200, b"live\n"),
                "/ready": lambda: (200, b"ready\n") if ready() else (503, b"not ready\n"),
            }
            code, body = answers.get(
                self.path.partition("?")[0], lambda: (404, b"there is /metrics, /live, /ready\n")
            )()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the library's name
            """Say nothing: it is asked every few seconds."""

    return Handler


def _context(ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(ca)
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise FormatError(f"the TLS files of --metrics are not usable: {error}") from None
    return context


def _prometheus() -> Any:
    try:
        import prometheus_client
    except ImportError:
        raise MissingExtra("prometheus-client is not installed: pip install 'skerry[cloud]'") from None
    return prometheus_client
