"""The tail's service called as gRPC would call it: what is refused, with which status, before which work."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloud.tail import store as store_module
from cloud.tail.budget import ByteBudget
from cloud.tail.engine import Engine
from cloud.tail.guard import Allowed, Guard, NotPermitted
from cloud.tail.layout import lay_out
from cloud.tail.metrics import Metrics
from cloud.tail.server import make_service
from cloud.tail.store import Store, install
from cloud.tail.warmer import Warmer
from edge_agent import calls, link
from skills import codec, oip
from skills.files import write_atomic
from skills.split_plan import load_plan, plan_hash
from skills.wire import encode_json, encode_yaml


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


def test_nothing_of_a_request_is_unpacked_before_it_is_allowed_and_counted(
    engine: Engine, plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked = []
    from_request = oip.from_request
    monkeypatch.setattr(oip, "from_request", lambda request: unpacked.append(1) or from_request(request))
    request = oip.messages().ModelInferRequest(model_name=plan)
    tensor = request.inputs.add(name="x", datatype="BYTES", shape=[100_000])
    tensor.contents.bytes_contents.extend([b""] * 100_000)  # two bytes each on the wire

    def nobody(device: str, name: str, cut: str | None) -> None:
        raise NotPermitted("it is not assigned")

    store = Store(tmp_path / "tails")
    room = request.ByteSize() + 100_000 * 8
    for allow, budget, sentence in (
        (nobody, ByteBudget(), "it is not assigned"),
        (anybody, ByteBudget(room), "try again later"),
    ):
        service = make_service(store, engine, lambda: True, allow, budget, Metrics())
        with pytest.raises(Aborted, match=sentence):
            service.ModelInfer(request, Context())
        assert budget.held == 0
    assert not unpacked
    budget = ByteBudget()
    with pytest.raises(Aborted, match="the tensor 'x' is BYTES"):
        make_service(store, engine, lambda: True, anybody, budget, Metrics()).ModelInfer(request, Context())
    assert (len(unpacked), budget.held) == (1, 0)


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


@pytest.fixture
def serve(engine: Engine, plan: str, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that asks the service and returns (status or None, sentence or answer)."""
    metrics = Metrics()
    service = make_service(Store(tmp_path / "tails"), engine, lambda: True, anybody, ByteBudget(), metrics)

    def ask(request: Any) -> tuple[str | None, Any]:
        context = Context()
        try:
            return None, service.ModelInfer(request, context)
        except Aborted as refusal:
            return context.code.name, str(refusal)

    ask.metrics = metrics  # type: ignore[attr-defined]
    return ask


REFUSALS = ("INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
Requests = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["", "PLAN", "PLAN.c1", "PLAN.input", "PLAN.local", "PLAN.c99", "../..", "x" * 999]),
        "tensors": st.lists(
            st.tuples(
                st.sampled_from(["x", "frame", ""]),
                st.sampled_from(["FP32", "UINT8", "BYTES", "FP16", "BOOL", "INT4", ""]),
                st.lists(st.sampled_from([-1, 0, 1, 2, 12, 144, 1 << 31, 1 << 62]), max_size=9),
                st.binary(max_size=64) | st.just(bytes(576)) | st.just(b"\xff" * 576),
            ),
            max_size=3,
        ),
        "raw": st.booleans(),
        "parameters": st.dictionaries(
            st.sampled_from(["split.plan", "split.cut", "split.codec", "split.reply", "split.deadline_us"]),
            st.sampled_from(["PLAN", "c1", "input", "local", "u8", "jpeg q1", "", -1, 0, 1, 5_000_000, 1 << 62, True]),
        ),
        "outputs": st.lists(st.sampled_from(["logits", "nothing", ""]), max_size=2),
    }
)


def built(parts: dict[str, Any], plan: str) -> Any:
    request = oip.messages().ModelInferRequest(model_name=parts["model"].replace("PLAN", plan))
    for name, kind, shape, data in parts["tensors"]:
        tensor = request.inputs.add(name=name, datatype=kind, shape=shape)
        if parts["raw"]:
            request.raw_input_contents.append(data)
        else:
            tensor.contents.fp32_contents.extend(data[:8])
    for key, value in parts["parameters"].items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
        setattr(request.parameters[key], kind, plan if value == "PLAN" else value)
    for name in parts["outputs"]:
        request.outputs.add(name=name)
    return request


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=Requests)
def test_any_request_at_all_is_answered_or_refused_in_one_sentence(
    serve: Callable[..., Any], plan: str, parts: dict[str, Any]
) -> None:
    code, said = serve(built(parts, plan))
    if code is not None:
        assert code in REFUSALS
        assert said
        assert len(said) <= 1000


def test_nan_and_infinity_are_refused_in_plain_mode_as_in_compact(
    serve: Callable[..., Any], plan: str, planned_net: Any
) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        x = planned_net.x[:1].copy()
        x[0, 0, 3, 3] = bad
        assert serve(oip.to_request(plan, oip.Call({"x": x}))) == (
            "INVALID_ARGUMENT", "the tensor 'x' holds NaN or infinity",
        )  # fmt: skip


def test_a_bomb_is_refused_before_it_unpacks_and_a_frame_of_another_plan_for_its_hash(
    serve: Callable[..., Any], compact: Callable[[], Any], planned_net: Any
) -> None:
    from skills import zstd

    cut = load_plan((planned_net.folder / "split.yaml").read_text()).cut("input")
    free = cut.tensors[0].shape.count(-1)
    for claimed in (1, 1 << 20, (1 << 32) - 1):
        body = zstd.compress(bytes(300 << 20), 1)
        head = (
            codec.MAGIC
            + bytes([codec.VERSION, 1])
            + b"".join(size.to_bytes(4, "big") for size in (*[claimed] * free, len(body)))
        )
        request = compact()
        request.raw_input_contents[0] = head + body
        request.inputs[0].shape[0] = len(head) + len(body)
        code, said = serve(request)
        assert code == "INVALID_ARGUMENT", said
    request = compact()
    request.parameters["split.plan"].string_param = "f" * 16
    code, said = serve(request)
    assert (code, "lies here" in said) == ("INVALID_ARGUMENT", True)
    assert b'skerry_tail_refused_total{reason="invalid"} 4.0' in serve.metrics.text()  # type: ignore[attr-defined]


def test_a_cut_that_is_not_allowed_is_refused_in_both_modes_before_the_plan_is_loaded(
    engine: Engine, compact: Callable[[], Any], plan: str, planned_net: Any, tmp_path: Path
) -> None:
    import grpc

    table = tmp_path / "allowed.json"
    write_atomic(table, encode_json(Allowed({"cam-1": {plan: ("c1",)}})))
    store = Store(tmp_path / "tails")
    guard, metrics = Guard(allowed=table), Metrics()
    service = make_service(store, engine, lambda: True, guard.check, ByteBudget(), metrics)
    for request in (compact(), oip.to_request(plan, oip.Call({"x": planned_net.x[:1]}))):
        context = Context()
        with pytest.raises(Aborted, match="cam-1 may not use the cut 'input' of plan .*, allowed are: c1"):
            service.ModelInfer(request, context)
        assert context.code is grpc.StatusCode.PERMISSION_DENIED
    assert not store.loaded()
    assert b'skerry_tail_refused_total{reason="permission"} 2.0' in metrics.text()


def test_while_draining_a_request_is_told_that_the_tail_is_unavailable(
    engine: Engine, serve: Callable[..., Any], compact: Callable[[], Any]
) -> None:
    assert serve(compact())[0] is None
    engine.drain(0)
    assert serve(compact())[0] == "UNAVAILABLE"


def test_every_answer_and_refusal_is_counted(serve: Callable[..., Any], compact: Callable[[], Any], plan: str) -> None:
    for _ in range(2):
        assert serve(compact())[0] is None
    serve(oip.to_request("0" * 16, oip.Call({})))
    text = serve.metrics.text().decode()  # type: ignore[attr-defined]
    assert f'skerry_tail_requests_total{{cut="input",plan="{plan}"}} 2.0' in text
    assert f'skerry_tail_request_seconds_count{{cut="input",plan="{plan}"}} 2.0' in text
    assert 'skerry_tail_refused_total{reason="plan"} 1.0' in text


def test_what_a_device_asks_to_learn_its_links_width_is_refused_and_not_counted(
    serve: Callable[..., Any], engine: Engine, tmp_path: Path
) -> None:
    request = calls.request(link.PROBE, bytes(link.PROBE_BYTES), link.PROBE_DEADLINE_US)
    code, _ = serve(request)
    assert code == "INVALID_ARGUMENT"
    assert b"refused_total{" not in serve.metrics.text()  # type: ignore[attr-defined]
    request.parameters["split.plan"].string_param = "f" * 16
    serve(request)
    assert b'refused_total{reason="invalid"} 1.0' in serve.metrics.text()  # type: ignore[attr-defined]


def test_only_the_monotonic_clock_is_read_so_that_a_clock_that_jumps_changes_nothing() -> None:
    import cloud.tail
    import edge_agent.link

    folder, agent = Path(cloud.tail.__file__).parent, Path(edge_agent.link.__file__).parent
    names = ("calls", "link", "tail_client", "estimator", "infer")
    for file in (*folder.glob("*.py"), *(agent / f"{name}.py" for name in names)):
        text = file.read_text()
        assert "time.time" not in text, file
        assert "datetime" not in text, file


class Warmth:
    """A warmer over a folder of plans and a table that the test changes."""

    def __init__(self, tails: Path) -> None:
        self.store, self.metrics = Store(tails), Metrics()
        self.allowed: frozenset[str] | None = None
        self.warmer = Warmer(self.store, lambda: self.allowed, self.metrics, 0.01)


def test_plans_are_warm_and_measured_before_they_are_asked_for_two_versions_at_once_and_old_ones_go(
    planned_net: Any, plan: str, tmp_path: Path
) -> None:
    tails = tmp_path / "tails"
    warmth = Warmth(tails)
    assert not warmth.warmer.done
    text = (planned_net.folder / "split.yaml").read_text()
    # A second version: the same model cut at fewer places has another hash.
    newer = load_plan(text)
    newer = dataclasses.replace(newer, cuts=tuple(one for one in newer.cuts if one.name != "c1"))
    warmth.warmer.look()
    assert warmth.store.loaded() == (plan,)
    lay_out(newer, encode_yaml(newer), lambda file: (planned_net.folder / file).read_bytes(), tails)
    warmth.warmer.look()
    assert set(warmth.store.loaded()) == {plan, plan_hash(newer)}
    assert all(warmth.store.get(name).pace.batching for name in warmth.store.loaded())
    assert f'skerry_tail_max_batch{{after="0",plan="{plan}"}}' in warmth.metrics.text().decode()
    warmth.allowed = frozenset({plan_hash(newer)})  # no device is told the old one any more
    warmth.warmer.look()
    assert warmth.store.loaded() == (plan_hash(newer),)
    assert plan.encode() not in warmth.metrics.text()
    shutil.rmtree(tails / plan_hash(newer))
    warmth.warmer.look()
    assert warmth.store.loaded() == ()


def test_a_plan_that_does_not_load_is_tried_once_and_holds_up_no_other(
    planned_net: Any, plan: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "tails" / ("f" * 16)
    broken.mkdir()
    (broken / "split.yaml").write_text("nonsense: 1")
    warmth = Warmth(tmp_path / "tails")
    for _ in range(2):
        warmth.warmer.look()
    assert warmth.store.loaded() == (plan,)
    assert [record.message.split()[1] for record in caplog.records if "unusable" in record.message] == [
        f"plan={'f' * 16}"
    ]


def test_a_plan_that_had_to_make_room_is_measured_again_when_a_request_brings_it_back(
    planned_net: Any, plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_LOADED", 1)
    tails = tmp_path / "tails"
    other = load_plan((planned_net.folder / "split.yaml").read_text())
    other = dataclasses.replace(other, cuts=tuple(one for one in other.cuts if one.name != "c1"))
    lay_out(other, encode_yaml(other), lambda file: (planned_net.folder / file).read_bytes(), tails)
    warmth = Warmth(tails)
    warmth.warmer.look()
    (held,) = warmth.store.loaded()
    warmth.warmer.look()
    assert warmth.store.loaded() == (held,)  # the other one does not push it out again by itself
    (gone,) = {plan, plan_hash(other)} - {held}
    back = warmth.store.get(gone)
    assert not back.pace.batching
    warmth.warmer.look()
    assert back.pace.batching
    assert warmth.store.loaded() == (gone,)


def test_a_plan_that_could_not_be_loaded_is_measured_once_a_request_has_loaded_it(plan: str, tmp_path: Path) -> None:
    warmth, file = Warmth(tmp_path / "tails"), tmp_path / "tails" / plan / "split.yaml"
    text = file.read_text()
    file.write_text("nonsense: 1")
    warmth.warmer.look()
    file.write_text(text)
    warmth.warmer.look()
    assert warmth.store.loaded() == ()
    loaded = warmth.store.get(plan)
    warmth.warmer.look()
    assert loaded.pace.batching
