"""The local endpoint over real sockets: what a program on the device sees, and what a rude one gets."""

import asyncio
import contextlib
import json

import pytest

from edge_agent.plan import Installed
from edge_agent.serve import LocalEndpoint
from edge_agent.service import Service
from edge_agent.usage import UsageLog
from edge_agent.workers import Load
from edge_agent.workers_fake import FakeWorker, FakeWorkers
from skills.errors import FormatError, Unreachable
from skills.manifest import Model, Skill, Stage, Tensor, Variant

TENSOR = Tensor("x", "FP32", (-1, 4))
SKILL = Skill(
    "digits", "1.0.0", (TENSOR,), (Tensor("y", "INT64", (-1,)),),
    {"m": Model((Variant("v", "onnxruntime", "m.onnx"),))}, (Stage("run", "m", "run.py"),),
)  # fmt: skip


@contextlib.asynccontextmanager
async def endpoint(tmp_path, serving=True):
    service = Service(UsageLog(tmp_path), 4)
    workers = FakeWorkers()

    def answer(load, body):
        if body == b"bad":
            raise FormatError("the body is not JSON: bad")
        return b'{"echo":%d}' % len(body)

    workers.answer = answer
    if serving:
        load = Load("digits", "1.0.0", "a" * 64, tmp_path, tmp_path, {"m": "v"}, "local", 250)
        worker = await workers.start(load, lambda _: None)
        service.serve(SKILL, Installed("1.0.0", "a" * 64, "t"), worker)
        service.known({"digits"})
    made = LocalEndpoint(service, lambda: {"device": "d"}, max_bytes=10_000, deadline_s=5)
    await made.start("127.0.0.1", 0)
    try:
        yield made, service
    finally:
        await made.stop()
        service._usage.close()


async def exchange(port, raw, *, count=1):
    """Send bytes; return [(status, headers, body)] of `count` responses."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw)
    await writer.drain()
    answers = []
    async with asyncio.timeout(5):
        for _ in range(count):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if line)}
            body = await reader.readexactly(int(headers["content-length"]))
            answers.append((int(head[0].split()[1]), headers, body))
    writer.close()
    await writer.wait_closed()
    return answers


async def until(met):
    """Let the loop turn until something holds."""
    for _ in range(100_000):
        if met():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came to hold")


def get(path, host="127.0.0.1:1"):
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


def post(path, body, *more):
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *more]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/v2", 200, "binary_tensor_data"),
        ("/v2/health/live", 200, "true"),
        ("/v2/health/ready", 200, "true"),
        ("/v2/models/digits", 200, '"platform": "skerry"'),
        ("/v2/models/digits/versions/1.0.0", 200, '"INT64"'),
        ("/v2/models/digits/ready", 200, "true"),
        ("/v2/models/digits/versions/9.0.0", 404, "serves version 1.0.0, not 9.0.0"),
        ("/v2/models/nobody", 404, "there are: digits"),
        ("/v2/models/digits/infer", 405, "POST"),
        ("/status", 200, "device"),
        ("/nowhere", 404, "skills are at /v2/models/NAME"),
    ],
)
async def test_every_path_of_the_protocol_answers_in_json(tmp_path, path, status, words):
    async with endpoint(tmp_path) as (made, _):
        ((found, headers, body),) = await exchange(made.port, get(path))
        assert (found, headers["content-type"]) == (status, "application/json")
        assert words in body.decode()
        assert status == 200 or set(json.loads(body)) == {"error"}


async def test_a_device_without_skills_is_live_and_not_ready(tmp_path):
    async with endpoint(tmp_path, serving=False) as (made, _):
        assert (await exchange(made.port, get("/v2/health/live")))[0][0] == 200
        assert (await exchange(made.port, get("/v2/health/ready")))[0][0] == 503


async def test_questions_on_one_connection_are_answered_in_order(tmp_path):
    async with endpoint(tmp_path) as (made, _):
        raw = b"".join(post("/v2/models/digits/infer", b"x" * n) for n in (1, 2, 3))
        answers = await exchange(made.port, raw, count=3)
        assert [json.loads(body)["echo"] for _, _, body in answers] == [1, 2, 3]


@pytest.mark.parametrize(
    ("raw", "status", "words"),
    [
        (post("/v2/models/digits/infer", b"bad"), 400, "not JSON"),
        (post("/v2/models/digits/infer", b"xx", "Inference-Header-Content-Length: 3"), 400, "expected 0 to 2"),
        (post("/v2/models/digits/infer", b"xx", "Inference-Header-Content-Length: -1"), 400, "expected 0 to 2"),
        (post("/v2/models/digits/infer", b"x" * 10_001), 413, "the limit of 10000 bytes"),
        (post("/v2/models/nobody/infer", b"{}"), 404, "nobody"),
        (post("/v2", b"{}"), 405, "POST"),
        (get("/v2", host="evil.example"), 403, "localhost only"),
        (b"\x16\x03\x01 hello\r\n\r\n", 400, "not an HTTP request"),
        (b"GET /" + b"a" * 100_000, 431, "not an HTTP request"),
    ],
)
async def test_a_rude_request_gets_one_sentence_and_the_next_client_is_served(tmp_path, raw, status, words):
    async with endpoint(tmp_path) as (made, _):
        ((found, _, body),) = await exchange(made.port, raw)
        assert found == status
        assert words in json.loads(body)["error"]
        assert (await exchange(made.port, get("/v2")))[0][0] == 200


async def test_a_client_that_hangs_up_half_way_leaves_nothing_behind(tmp_path):
    async with endpoint(tmp_path) as (made, _):
        for raw in (b"", b"POST /v2/mod", post("/v2/models/digits/infer", b"x" * 100)[:-50]):
            _, writer = await asyncio.open_connection("127.0.0.1", made.port)
            writer.write(raw)
            writer.close()
            await writer.wait_closed()
        assert (await exchange(made.port, get("/v2")))[0][0] == 200


async def test_request_bodies_share_one_budget_and_what_goes_beyond_it_is_refused_until_there_is_room(tmp_path):
    async with endpoint(tmp_path) as (made, service):
        worker = service.find("digits").worker
        worker.hold = asyncio.Event()
        asked = [
            asyncio.create_task(exchange(made.port, post("/v2/models/digits/infer", b"x" * 9_000))) for _ in range(2)
        ]
        await until(lambda: made.held_bytes == 18_000)
        ((status, _, body),) = await exchange(made.port, post("/v2/models/digits/infer", b"x" * 3_000))
        assert status == 503
        assert "18000 bytes are being answered already" in json.loads(body)["error"]
        ((status, _, _),) = await exchange(made.port, get("/v2/health/live"))
        assert status == 200
        worker.hold.set()
        assert [answer[0][0] for answer in await asyncio.gather(*asked)] == [200, 200]
        assert made.held_bytes == 0
        assert (await exchange(made.port, post("/v2/models/digits/infer", b"x" * 3_000)))[0][0] == 200


async def test_a_client_that_hangs_up_gives_its_share_of_the_budget_back(tmp_path):
    async with endpoint(tmp_path) as (made, _):
        _, writer = await asyncio.open_connection("127.0.0.1", made.port)
        writer.write(post("/v2/models/digits/infer", b"x" * 9_000)[:-50])
        await until(lambda: made.held_bytes > 0)
        writer.close()
        await writer.wait_closed()
        await until(lambda: made.held_bytes == 0)


async def test_a_taken_port_is_one_sentence(tmp_path):
    async with endpoint(tmp_path) as (made, service):
        other = LocalEndpoint(service, dict, max_bytes=1, deadline_s=1)
        with pytest.raises(Exception, match="cannot listen on 127.0.0.1"):
            await other.start("127.0.0.1", made.port)


def test_a_worker_hears_how_long_its_asker_still_waits(tmp_path):
    heard = []

    async def story():
        async with endpoint(tmp_path, serving=False) as (_, service):

            class Hearing(FakeWorker):
                async def call(self, header, body, deadline_s):
                    heard.append(header["left_s"])
                    if len(heard) == 1:
                        serve_anew()
                        raise Unreachable("it died over it")
                    return await super().call(header, body, deadline_s)

            def serve_anew():
                load = Load("digits", "1.0.0", "a" * 64, tmp_path, tmp_path, {"m": "v"}, "local", 250)
                service.serve(SKILL, Installed("1.0.0", "a" * 64, "t"), Hearing(FakeWorkers(), load, lambda _: None))

            serve_anew()
            await service.infer("digits", None, b"{}", 2, 5.0)

    asyncio.run(story())
    assert 5.0 >= heard[0] > heard[1] > 0
