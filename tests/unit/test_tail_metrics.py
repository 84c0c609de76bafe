"""What the tail says to Prometheus: readable by its parser, bounded, and not for everybody."""

import contextlib
import select
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cloud.authority import Authority
from cloud.tail import metrics as metrics_module
from cloud.tail.metrics import Listener, Metrics
from skills.errors import FormatError, Unreachable, UsageError

PLAN = "0" * 16


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_all_that_happened_is_in_the_exposition_and_prometheus_reads_it() -> None:
    metrics = Metrics()
    metrics.watch(lambda: 3, lambda: 4096, lambda: 2, lambda: 1.0)
    metrics.answered(PLAN, "c1", 0.03, 0.01, 0.015)
    metrics.refused("queue")
    metrics.expired("segment")
    metrics.batch(PLAN, 1, 4)
    metrics.measured(PLAN, 1, 4, {1: 2.0, 4: 5.0})
    found = samples(metrics.text())
    cut = (("cut", "c1"), ("plan", PLAN))
    after = (("after", "1"), ("plan", PLAN))
    for name, labels, value in (
        ("requests_total", cut, 1), ("request_seconds_count", cut, 1), ("request_seconds_sum", cut, 0.03),
        ("queue_seconds_sum", cut, 0.01), ("compute_seconds_sum", cut, 0.015),
        ("request_seconds_bucket", (("cut", "c1"), ("le", "0.05"), ("plan", PLAN)), 1),
        ("request_seconds_bucket", (("cut", "c1"), ("le", "0.02"), ("plan", PLAN)), 0),
        ("refused_total", (("reason", "queue"),), 1), ("expired_total", (("where", "segment"),), 1),
        ("batch_size_sum", after, 4), ("max_batch", after, 4), ("batch_ms", (*after, ("size", "4")), 5),
        ("queue_length", (), 3), ("held_bytes", (), 4096), ("plans_loaded", (), 2), ("ready", (), 1),
    ):  # fmt: skip
        assert found[f"skerry_tail_{name}", tuple(labels)] == pytest.approx(value), name


def test_a_plan_that_is_gone_is_forgotten() -> None:
    metrics = Metrics()
    for plan in (PLAN, "1" * 16):
        metrics.answered(plan, "c1", 0.03, 0.01, 0.015)
        metrics.batch(plan, 1, 1)
        metrics.measured(plan, 1, 1, {1: 2.0})
    metrics.forget(PLAN)
    metrics.forget(PLAN)
    assert PLAN.encode() not in metrics.text()
    assert b"1" * 16 in metrics.text()


@pytest.fixture
def listening() -> Iterator[tuple[Callable[[str], tuple[int, bytes]], dict[str, bool]]]:
    state = {"ready": False}
    listener = Listener("127.0.0.1:0", Metrics(), lambda: state["ready"])

    def get(path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{listener.port}{path}", timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    get.port = listener.port  # type: ignore[attr-defined]
    yield get, state
    listener.close()


def test_the_listener_tells_alive_from_ready(listening) -> None:
    get, state = listening
    assert get("/live") == (200, b"live\n")
    assert get("/ready") == (503, b"not ready\n")
    state["ready"] = True
    assert get("/ready") == (200, b"ready\n")
    assert b"# TYPE skerry_tail_requests_total counter" in get("/metrics")[1]
    assert get("/../etc/passwd")[0] == 404


def closed(line: socket.socket, wait_s: float) -> bool:
    """Say whether the other side ends the connection in time."""
    readable, _, _ = select.select([line], [], [], wait_s)
    try:
        return bool(readable) and line.recv(1) == b""
    except ConnectionError:
        return True


def test_one_who_asks_a_letter_at_a_time_is_not_listened_to_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "ASK_TIMEOUT_S", 0.5)
    listener = Listener("127.0.0.1:0", Metrics(), lambda: True)
    try:
        with socket.create_connection(("127.0.0.1", listener.port), timeout=10) as line:
            ended = False
            for _ in range(400):
                with contextlib.suppress(ConnectionError):
                    line.sendall(b"G")
                ended = closed(line, 0.05)
                if ended:
                    break
            assert ended
    finally:
        listener.close()


def test_as_many_connections_as_may_be_and_room_again_when_they_end(listening) -> None:
    get, _ = listening
    port = get.port
    with contextlib.ExitStack() as stack:
        for _ in range(metrics_module.MAX_CONNECTIONS):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        with socket.create_connection(("127.0.0.1", port), timeout=10) as one_more:
            assert closed(one_more, 4)
    for _ in range(200):
        with contextlib.suppress(OSError):
            if get("/live") == (200, b"live\n"):
                break
    else:
        pytest.fail("there is no room any more")


def test_beyond_loopback_metrics_are_for_who_has_a_certificate(
    tmp_path: Path, new_csr: Callable[[], tuple[str, bytes]]
) -> None:
    import ssl

    with pytest.raises(UsageError, match="is more than loopback"):
        Listener("0.0.0.0:0", Metrics(), lambda: True)
    with pytest.raises(UsageError, match="expected HOST:PORT"):
        Listener("9100", Metrics(), lambda: True)
    authority = Authority(tmp_path / "ca", ())
    request, key = new_csr()
    (tmp_path / "c.pem").write_text(authority.certify(request, "prometheus").cert_pem)
    (tmp_path / "k.pem").write_bytes(key)
    with pytest.raises(FormatError, match="not usable"):
        Listener("127.0.0.1:0", Metrics(), lambda: True, (authority.ca_file, tmp_path / "k.pem", tmp_path / "k.pem"))
    files = (authority.ca_file, authority.server.cert, authority.server.key)
    listener = Listener("127.0.0.1:0", Metrics(), lambda: True, files)
    try:
        with pytest.raises(Unreachable, match="cannot listen"):
            Listener(f"127.0.0.1:{listener.port}", Metrics(), lambda: True)
        context = ssl.create_default_context(cafile=str(authority.ca_file))
        url = f"https://127.0.0.1:{listener.port}/live"
        with pytest.raises(OSError):  # noqa: PT011  the handshake or the first read, as TLS has it
            urllib.request.urlopen(url, timeout=10, context=context)
        context.load_cert_chain(tmp_path / "c.pem", tmp_path / "k.pem")
        with urllib.request.urlopen(url, timeout=10, context=context) as answer:
            assert answer.read() == b"live\n"
    finally:
        listener.close()
