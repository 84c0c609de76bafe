"""The gRPC face of the tail: Open Inference Protocol v2, *plain* (named tensors) and *compact* (one packed frame).

Plain: `model_name` is a plan's hash for the whole model, or `<hash>.<cut>` for the tail from that cut on.
Compact: one UINT8 tensor [n] that is an activation frame; the parameters `split.plan`, `split.cut`, `split.codec` say how to
read it, `split.deadline_us` how much time is left, and `split.reply` which coding of the answer the caller can read. An
answer in that coding is one UINT8 tensor [n] with the parameter `split.reply`; else it is raw, as in plain mode. The
answer's trailing metadata say where the time went, and a refusal's (`split-refused`) in a word why, as the metrics do.
"""

import concurrent.futures
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import skills
from cloud.tail.budget import ByteBudget, Held, OverBudget
from cloud.tail.engine import MAX_WAITING, Draining, Engine, QueueFull, Result
from cloud.tail.guard import CodeRule, Guard, NotPermitted
from cloud.tail.metrics import Listener, Metrics
from cloud.tail.request import named, plain_model, plain_name, read, wanted, written
from cloud.tail.store import Loading, Store
from cloud.tail.warmer import MEASURE_S, Warmer
from edge_agent.link import PROBE
from skills import oip, ort, zstd
from skills.errors import (
    DeadlineExceeded,
    FormatError,
    MissingExtra,
    NotFound,
    Refused,
    SkerryError,
    TrustError,
    Unreachable,
    UsageError,
)
from skills.files import read_bytes

DEFAULT_DEADLINE_S = 30.0
MAX_DEADLINE_S = 300.0
DRAIN_S = 5.0
ANSWERS_S = 1.0  # for the answers of what was finished last to be written
MAX_KEY_BYTES = 1 << 20
EXTENSIONS = ("skerry.split.compact",)
LOG = logging.getLogger("skerry.tail")

Ask = Callable[[str, str, str | None], None]


def make_service(
    store: Store, engine: Engine, ready: Callable[[], bool], allow: Ask, budget: ByteBudget, metrics: Metrics
) -> Any:
    """Return the servicer.

    `allow` is asked with (device from its certificate, plan, cut or None) before anything is looked up or decoded, and
    `budget` has what decoding takes before it begins.
    """
    grpc, pb, pb_grpc = _grpc(), oip.messages(), oip.service()

    class Service(pb_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc, name-defined]
        def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802  the protocol's name
            return pb.ServerLiveResponse(live=True)

        def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
            return pb.ServerReadyResponse(ready=ready())

        def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
            # Loads the plan: who asks is about to use it, and the first request should not wait for that. While somebody
            # else loads it, it is not ready.
            with _Refusals(grpc, context):
                plan = request.name.partition(".")[0]
                allow(_device(context), plan, None)
                try:
                    plain_model(store, request.name)
                except SkerryError:
                    return pb.ModelReadyResponse(ready=False)
                return pb.ModelReadyResponse(ready=not engine.draining)

        def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
            return pb.ServerMetadataResponse(name="skerry-tail", version=skills.__version__, extensions=EXTENSIONS)

        def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
            with _Refusals(grpc, context):
                allow(_device(context), *plain_name(request.name))
                loaded, cut = plain_model(store, request.name)
                inputs = loaded.plan.inputs if cut.after == 0 else cut.tensors
                kind = "python_stages" if loaded.plan.stages else "onnx_segments"
                answer = pb.ModelMetadataResponse(name=request.name, versions=["1"], platform=kind)
                for target, tensors in ((answer.inputs, inputs), (answer.outputs, loaded.plan.outputs)):
                    for live in tensors:
                        target.add(name=live.name, datatype=live.dtype, shape=live.shape)
                return answer

        def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
            with _Refusals(grpc, context, metrics) as refusals:
                arrived = time.monotonic()
                said = oip.parameters(request)
                deadline = arrived + _seconds_left(said, context)
                plan, cut_name = named(request.model_name, said)
                # A device asks for a plan of that name to learn how wide its link is: nobody should be woken for it.
                refusals.counted = plan != PROBE["plan"]
                allow(_device(context), plan, cut_name)
                held = Held(budget)
                try:
                    held.take(request.ByteSize() + oip.unpacked_bytes(request))
                    call = oip.from_request(request)
                    frame = read(store, request.model_name, call)
                    held.take(frame.decoded_bytes)
                    values = frame.decode()
                    decoded = time.monotonic()
                    waiting = engine.submit(
                        frame.loaded, frame.cut.after, values, deadline, context.is_active, here=True
                    )
                except BaseException:
                    held.give()
                    raise
                # Held until the engine lets go of it, which may be after this call has given up waiting.
                waiting.add_done_callback(lambda _: held.give())
                result = _wait(waiting, deadline)
                queue_s, compute_s, computed = result.queue_ms / 1e3, result.compute_ms / 1e3, time.monotonic()
                outputs, said = written(frame, wanted(result.outputs, call.outputs))
                times = (
                    ("split-decode-us", decoded - arrived),
                    ("split-queue-us", queue_s),
                    ("split-compute-us", compute_s),
                    ("split-encode-us", time.monotonic() - computed),
                )
                context.set_trailing_metadata(tuple((key, str(int(value * 1e6))) for key, value in times))
                answer = oip.to_response(oip.Answer(outputs, request.model_name, "1", call.id, said))
                metrics.answered(frame.loaded.name, frame.cut.name, time.monotonic() - arrived, queue_s, compute_s)
                return answer

    return Service()


class Server:
    """A running tail: `port`, and `stop()` which drains."""

    def __init__(
        self,
        tails: Path,
        listen: str,
        *,
        tls: tuple[Path, Path, Path] | None = None,
        crl: Path | None = None,
        allowed: Path | None = None,
        threads: int = 1,
        metrics_at: str | None = None,
        measure_s: float = MEASURE_S,
        stages: CodeRule = "released",
    ) -> None:
        """Listen on HOST:PORT (port 0: any free one); `tls` is (ca, certificate, key), and then clients need one too.

        `crl` lists certificates that are refused, `allowed` which device may use which plan (`cloud.tail.guard.Allowed`);
        neither means anything without TLS, for then nobody says who he is. `metrics_at` is HOST:PORT of the metrics.
        `stages` says whose code runs here: of the plans in `allowed`, nobody's, or of all that lies in `tails`.
        It listens at once and is ready when the plans that may be asked for are warm and measured, `measure_s` each.

        Raises:
            Unreachable: a port is taken or the address is not this machine's.
            NotFound, FormatError, UsageError: a file or an address is missing or not what it should be.
        """
        grpc, pb_grpc = _grpc(), oip.service()
        guard = Guard(crl, allowed) if tls is not None else Guard()
        credentials = _credentials(grpc, tls) if tls is not None else None
        _import_heavy()
        self._metrics, store, budget = (
            Metrics(),
            Store(tails, threads, lambda plan: guard.check_code(plan, stages)),
            ByteBudget(),
        )
        self._warmer = Warmer(store, guard.plans, self._metrics, measure_s)
        self._listener: Listener | None = None
        if metrics_at is not None:
            self._listener = Listener(metrics_at, self._metrics, self._is_ready, tls)
        self._engine = Engine(self._metrics)
        self._metrics.watch(
            lambda: self._engine.waiting,
            lambda: budget.held,
            lambda: len(store.loaded()),
            lambda: float(self._is_ready()),
        )
        # A handler waits for the compute thread: as many as may wait, and a few for the questions that never do.
        pool = concurrent.futures.ThreadPoolExecutor(MAX_WAITING + 16, thread_name_prefix="tail-grpc")
        options = (
            ("grpc.max_receive_message_length", oip.MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", oip.MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", 5000),
        )
        self._server = grpc.server(
            pool,
            options=options,
            maximum_concurrent_rpcs=2 * MAX_WAITING,
            interceptors=() if tls is None else (_certificate_check(grpc, guard),),
        )
        service = make_service(store, self._engine, self._is_ready, guard.check, budget, self._metrics)
        pb_grpc.add_GRPCInferenceServiceServicer_to_server(service, self._server)
        try:
            if credentials is None:
                self.port = int(self._server.add_insecure_port(listen))
            else:
                self.port = int(self._server.add_secure_port(listen, credentials))
        except RuntimeError:
            self.port = 0
        if self.port == 0:
            self._engine.drain(0)
            if self._listener is not None:
                self._listener.close()
            raise Unreachable(f"the tail cannot listen on {listen}: is the port taken?")
        self._server.start()
        self._warmer.start()

    @property
    def metrics_port(self) -> int | None:
        """Where the metrics are, None when nowhere."""
        return self._listener.port if self._listener is not None else None

    def wait_warm(self, timeout_s: float) -> bool:
        """Wait until the plans that were there at the start are warm; False when they are not in time."""
        return self._warmer.wait(timeout_s)

    def stop(self, grace_s: float = DRAIN_S) -> None:
        """Drain: say not ready and refuse what is new, finish or expire what waits within `grace_s`, then end."""
        began = time.monotonic()
        LOG.info("tail.draining waiting=%s grace_s=%s", self._engine.waiting, grace_s)
        self._engine.drain(grace_s)  # from here on not ready; the answers of the last ones are still on their way
        self._warmer.stop()
        self._server.stop(ANSWERS_S).wait(ANSWERS_S + 1)
        if self._listener is not None:
            self._listener.close()
        LOG.info("tail.ended seconds=%.2f", time.monotonic() - began)

    def _is_ready(self) -> bool:
        return self._warmer.done and not self._engine.draining


class _Refusals:
    """Turns an error of ours into the status that the protocol's clients understand, with its one sentence."""

    def __init__(self, grpc: Any, context: Any, metrics: Metrics | None = None) -> None:
        codes = grpc.StatusCode
        self._context, self._metrics, self.counted = context, metrics, True
        self._codes = (
            (NotPermitted, codes.PERMISSION_DENIED, "permission"), (Draining, codes.UNAVAILABLE, "draining"),
            (Loading, codes.UNAVAILABLE, "loading"),
            (DeadlineExceeded, codes.DEADLINE_EXCEEDED, "late"), (QueueFull, codes.RESOURCE_EXHAUSTED, "queue"),
            (OverBudget, codes.RESOURCE_EXHAUSTED, "bytes"), (Refused, codes.RESOURCE_EXHAUSTED, "refused"),
            (NotFound, codes.NOT_FOUND, "plan"), (FormatError, codes.INVALID_ARGUMENT, "invalid"),
            (UsageError, codes.INVALID_ARGUMENT, "invalid"), (TrustError, codes.FAILED_PRECONDITION, "damaged"),
            (SkerryError, codes.INTERNAL, "internal"),
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for known, code, reason in self._codes:
            if isinstance(error, known):
                if self._metrics is not None and self.counted:
                    self._metrics.refused(reason)
                self._context.set_trailing_metadata((("split-refused", reason),))
                self._context.abort(code, str(error)[:1000])


def _certificate_check(grpc: Any, guard: Guard) -> Any:
    """Return the interceptor that every call passes: a certificate that was revoked opens nothing."""

    class CertificateCheck(grpc.ServerInterceptor):  # type: ignore[misc]
        def intercept_service(self, go_on: Callable[[Any], Any], details: Any) -> Any:
            handler = go_on(details)
            if handler is None or handler.unary_unary is None:
                return handler

            def checked(request: Any, context: Any) -> Any:
                try:
                    guard.check_certificate(bytes(context.auth_context().get("x509_pem_cert", [b""])[0]))
                except TrustError as error:
                    context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error)[:1000])
                return handler.unary_unary(request, context)

            return grpc.unary_unary_rpc_method_handler(
                checked, handler.request_deserializer, handler.response_serializer
            )

    return CertificateCheck()


def _device(context: Any) -> str:
    names = context.auth_context().get("x509_common_name", [b""])
    return bytes(names[0]).decode("utf-8", "replace") if names else ""


def _seconds_left(parameters: Mapping[str, oip.Parameter], context: Any) -> float:
    said = parameters.get("split.deadline_us")
    if said is not None and (type(said) is not int or said <= 0):
        raise FormatError(f"split.deadline_us is {said!r}, expected microseconds above nought")
    left = context.time_remaining()
    limits = [MAX_DEADLINE_S if said is not None or left is not None else DEFAULT_DEADLINE_S]
    limits += [said / 1e6] if isinstance(said, int) else []
    limits += [left] if left is not None else []
    return float(min(limits))


def _wait(result: "concurrent.futures.Future[Result]", deadline_s: float) -> Result:
    try:
        return result.result(timeout=max(0.0, deadline_s - time.monotonic()) + 0.05)
    except concurrent.futures.TimeoutError:
        raise DeadlineExceeded("the request's time ran out at the tail") from None


def _credentials(grpc: Any, tls: tuple[Path, Path, Path]) -> Any:
    ca, certificate, key = (read_bytes(path, "the TLS file", MAX_KEY_BYTES) for path in tls)
    return grpc.ssl_server_credentials([(key, certificate)], root_certificates=ca, require_client_auth=True)


def _import_heavy() -> None:
    """Import what requests need before there are threads: numpy does not survive a first import from two of them at once."""
    import PIL.Image

    PIL.Image.preinit()
    ort.runtime()
    zstd.compress(b"", 1)


def _grpc() -> Any:
    try:
        import grpc
    except ImportError:
        raise MissingExtra("grpcio is not installed: pip install 'skerry[cloud]'") from None
    return grpc
