"""The tail's service called as gRPC would call it: what is refused, with which status, before which work."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud.tail.budget import ByteBudget
from cloud.tail.engine import Engine
from cloud.tail.guard import NotPermitted
from cloud.tail.metrics import Metrics
from cloud.tail.server import make_service
from cloud.tail.store import Store, install
from skills import codec, oip
from skills.split import load_plan


def anybody(device: str, plan: str, cut: str | None) -> None:
    """Let everybody use everything."""


class Aborted(Exception):
    pass


class Context:
    """As much of a gRPC context as the service asks for."""

    code: Any = None

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_common_name": [b"cam-1"]}

    def time_remaining(self) -> float:
        return 20.0

    def is_active(self) -> bool:
        return True

    def set_trailing_metadata(self, pairs: object) -> None:
        pass

    def abort(self, code: Any, sentence: str) -> None:
        self.code = code
        raise Aborted(sentence)


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.drain(0)


@pytest.fixture
def plan(planned_net: Any, tmp_path: Path) -> str:
    return install(planned_net.folder, tmp_path / "tails")


@pytest.fixture
def compact(planned_net: Any, plan: str) -> Callable[[], Any]:
    """Return a compact request for the cut `input`."""

    def request() -> Any:
        cut = load_plan((planned_net.folder / "split.yaml").read_text()).cut("input")
        frame = codec.encode(cut.codings[0], cut.tensors, {"x": planned_net.x[:1]})
        parameters = {"split.plan": plan, "split.cut": "input", "split.codec": cut.codings[0].name}
        return oip.to_request("", oip.Call({"frame": np.frombuffer(frame, np.uint8)}, parameters=parameters))

    return request


def test_a_request_beyond_the_byte_budget_is_refused_before_it_is_decoded(
    engine: Engine, compact: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import grpc

    unpacked = []
    decode = codec.decode
    monkeypatch.setattr(codec, "decode", lambda *given: unpacked.append(1) or decode(*given))
    room = compact().ByteSize() + 4 * 12 * 12  # one FP32 picture
    for spare, code, decoded in ((-1, grpc.StatusCode.RESOURCE_EXHAUSTED, 0), (0, None, 1)):
        budget, context = ByteBudget(room + spare), Context()
        service = make_service(Store(tmp_path / "tails"), engine, lambda: True, anybody, budget, Metrics())
        if code is None:
            assert service.ModelInfer(compact(), context).outputs[0].name == "logits"
            engine.drain(5)
            assert budget.held == 0  # what was answered is held no more
        else:
            with pytest.raises(Aborted, match="try again later"):
                service.ModelInfer(compact(), context)
        assert context.code is code
        assert bool(unpacked) is bool(decoded)


def test_a_request_that_cannot_be_decoded_gives_its_bytes_back(
    engine: Engine, compact: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import grpc

    from skills.errors import FormatError

    def damaged(*given: object) -> None:
        raise FormatError("damaged")

    monkeypatch.setattr(codec, "decode", damaged)
    budget, context = ByteBudget(), Context()
    service = make_service(Store(tmp_path / "tails"), engine, lambda: True, anybody, budget, Metrics())
    with pytest.raises(Aborted, match="damaged"):
        service.ModelInfer(compact(), context)
    assert (context.code, budget.held) == (grpc.StatusCode.INVALID_ARGUMENT, 0)


def test_every_question_about_a_plan_asks_first_whether_the_device_may_use_it(
    engine: Engine, compact: Callable[[], Any], plan: str, tmp_path: Path
) -> None:
    import grpc

    asked = []

    def nobody(device: str, name: str, cut: str | None) -> None:
        asked.append((device, name, cut))
        raise NotPermitted("it is not assigned")

    store, pb = Store(tmp_path / "tails"), oip.messages()
    service = make_service(store, engine, lambda: True, nobody, ByteBudget(), Metrics())
    plain = oip.to_request(f"{plan}.c1", oip.Call({}))
    for call in (
        lambda context: service.ModelReady(pb.ModelReadyRequest(name=plan), context),
        lambda context: service.ModelMetadata(pb.ModelMetadataRequest(name=f"{plan}.c1"), context),
        lambda context: service.ModelInfer(compact(), context),
        lambda context: service.ModelInfer(plain, context),
    ):
        context = Context()
        with pytest.raises(Aborted, match="it is not assigned"):
            call(context)
        assert context.code is grpc.StatusCode.PERMISSION_DENIED
    assert asked == [("cam-1", plan, cut) for cut in (None, "c1", "input", "c1")]
    assert not store._loaded
