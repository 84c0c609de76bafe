"""The inference protocol: both forms read back what they wrote, and refuse what does not follow it."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skills import oip
from skills.errors import FormatError


def arrays() -> dict[str, np.ndarray]:
    return {
        "scores": np.array([[0.5, -1.25]], np.float32),
        "image": np.arange(12, dtype=np.uint8).reshape(1, 2, 6),
        "ids": np.array([2**40, -3], np.int64),
        "flags": np.array([True, False]),
        "words": np.array([b"one", b"", b"\xfftwo"], object),
    }


def same(left: dict[str, np.ndarray], right: object) -> None:
    assert isinstance(right, dict)
    assert list(left) == list(right)
    for name, array in left.items():
        assert array.shape == right[name].shape
        assert array.dtype == right[name].dtype
        assert np.array_equal(array, right[name])


def test_a_rest_call_reads_back_with_its_id_parameters_and_outputs() -> None:
    call = oip.Call(arrays(), "7", {"priority": 1, "mode": "fast"}, ("label",), binary=True)
    body, length = oip.encode_call(call)
    back = oip.decode_call(body, length)
    same(arrays(), dict(back.arrays))
    assert (back.id, dict(back.parameters), back.outputs, back.binary) == (
        "7",
        {"priority": 1, "mode": "fast"},
        ("label",),
        True,
    )


def test_typed_contents_that_do_not_fit_their_shape_are_refused_before_they_are_unpacked() -> None:
    for kind, add in (("INT64", {"int64_contents": [300] * 200_000}), ("BYTES", {"bytes_contents": [b""] * 200_000})):
        request = oip.messages().ModelInferRequest()
        tensor = request.inputs.add(name="x", datatype=kind, shape=[1])
        for field, values in add.items():
            getattr(tensor.contents, field).extend(values)
        tracemalloc.start()
        try:
            with pytest.raises(FormatError, match="has 200000 values, its shape needs 1"):
                oip.from_request(request)
            assert tracemalloc.get_traced_memory()[1] < 100_000
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("kind", ["INT8", "INT64", "FP64", "BYTES"])
def test_a_request_takes_no_more_memory_than_is_foreseen(kind: str, raw: bool) -> None:
    request, count = oip.messages().ModelInferRequest(), 50_000
    tensor = request.inputs.add(name="x", datatype=kind, shape=[count])
    values = np.array([b"abc"] * count, object) if kind == "BYTES" else np.full(count, 100).astype(oip.DTYPES[kind])
    if raw:
        request.raw_input_contents.append(oip.to_raw(values))
    else:
        getattr(tensor.contents, oip.CONTENTS[kind]).extend(values.tolist())
    tracemalloc.start()
    try:
        array = oip.from_request(request).arrays["x"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert array.tolist() == values.tolist()
    assert peak <= request.ByteSize() + oip.unpacked_bytes(request) + 50_000


def test_more_parameters_outputs_or_letters_than_may_be_are_refused() -> None:
    for spoil in (
        lambda request: [request.parameters[str(at)].SetInParent() for at in range(65)],
        lambda request: [request.outputs.add() for _ in range(65)],
        lambda request: setattr(request.inputs[0], "name", "x" * 513),
        lambda request: request.inputs[0].shape.extend([1] * 9),
    ):
        request = oip.to_request("m", oip.Call({"x": np.zeros(1, np.float32)}))
        oip.from_request(request)
        spoil(request)
        with pytest.raises(FormatError):
            oip.from_request(request)


@pytest.mark.parametrize("binary", [True, False])
def test_a_rest_answer_reads_back_raw_or_as_json(binary: bool) -> None:
    sent = {name: array for name, array in arrays().items() if name != "words"} | {
        "words": np.array([b"one", b"two"], object)
    }
    body, length = oip.encode_answer(oip.Answer(sent, "digits", "1.0.0", "7"), binary)
    back = oip.decode_answer(body, length)
    same(sent, dict(back.arrays))
    assert (back.model, back.version, back.id) == ("digits", "1.0.0", "7")
    assert (length == len(body)) is not binary


def test_a_plain_json_call_as_curl_sends_it_is_understood() -> None:
    body = json.dumps(
        {"inputs": [{"name": "x", "shape": [1, 2, 2], "datatype": "FP32", "data": [[[1, 2], [3, 4.5]]]}]}
    ).encode()
    call = oip.decode_call(body)
    assert call.arrays["x"].tolist() == [[[1, 2], [3, 4.5]]]
    assert not call.binary


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        ({"shape": [2], "datatype": "FP32", "data": [1]}, "has 1 values, its shape"),
        ({"shape": [1], "datatype": "FP33", "data": [1]}, "is 'FP33', known are"),
        ({"shape": [1], "datatype": "INT8", "data": [999]}, "does not hold"),
        ({"shape": [1], "datatype": "INT64", "data": [1.5]}, "a value of another kind"),
        ({"shape": [-1], "datatype": "FP32", "data": [1]}, "no shape of at most"),
        ({"shape": [1], "datatype": "FP32"}, "neither 'data' nor"),
        (
            {"shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": 4}},
            "announces 4 raw bytes, 0 are left",
        ),
    ],
)
def test_a_tensor_that_contradicts_itself_is_refused_in_one_sentence(tensor: dict[str, object], sentence: str) -> None:
    body = json.dumps({"inputs": [{"name": "x", **tensor}]}).encode()
    with pytest.raises(FormatError, match=sentence):
        oip.decode_call(body)


def test_a_body_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(FormatError, match="the limit is 10"):
        oip.decode_call(b"x" * 11, None, max_bytes=10)


@given(data=st.binary(max_size=200), length=st.one_of(st.none(), st.integers(-1, 300)))
def test_any_body_is_a_call_or_a_format_error(data: bytes, length: int | None) -> None:
    for body in (data, b'{"inputs":[{"name":"x","shape":[1],"datatype":"UINT8"' + data):
        with pytest.raises(FormatError):
            oip.decode_call(body, length)


def test_a_grpc_request_and_response_read_back() -> None:
    call = oip.Call(arrays(), "9", {"split.deadline_us": 5000, "split.cut": "c1"}, ("label",))
    request = oip.messages().ModelInferRequest.FromString(oip.to_request("photos", call).SerializeToString())
    back = oip.from_request(request)
    same(arrays(), dict(back.arrays))
    assert (back.id, dict(back.parameters), back.outputs) == (
        "9",
        {"split.deadline_us": 5000, "split.cut": "c1"},
        ("label",),
    )
    response = oip.to_response(oip.Answer(arrays(), "photos", "1", "9"))
    same(arrays(), dict(oip.from_response(response).arrays))


def test_typed_contents_of_other_clients_are_read_too() -> None:
    request = oip.messages().ModelInferRequest()
    request.inputs.add(name="a", datatype="INT8", shape=[2]).contents.int_contents.extend([-1, 5])
    request.inputs.add(name="b", datatype="FP32", shape=[1, 1]).contents.fp32_contents.append(0.5)
    found = oip.from_request(request).arrays
    assert found["a"].tolist() == [-1, 5]
    assert found["b"].tolist() == [[0.5]]


@given(
    st.binary(max_size=64),
    st.sampled_from(["UINT8", "FP32", "BYTES", "BOOL", "X"]),
    st.lists(st.integers(-1, 9), max_size=3),
)
def test_raw_contents_that_do_not_fit_are_a_format_error(raw: bytes, kind: str, shape: list[int]) -> None:
    request = oip.messages().ModelInferRequest()
    request.inputs.add(name="x", datatype=kind, shape=shape)
    request.raw_input_contents.append(raw)
    try:
        found = oip.from_request(request).arrays["x"]
    except FormatError:
        return
    assert list(found.shape) == shape


def test_the_field_numbers_are_those_of_the_public_protocol() -> None:
    pb, head = oip.messages(), {"model_name": 1, "model_version": 2, "id": 3, "parameters": 4}
    numbers = {
        name: {field.name: field.number for field in pb.DESCRIPTOR.message_types_by_name[name].fields}
        for name in (
            "ModelInferRequest",
            "ModelInferResponse",
            "InferParameter",
            "InferTensorContents",
            "ModelMetadataResponse",
        )
    }
    assert numbers == {
        "ModelInferRequest": {**head, "inputs": 5, "outputs": 6, "raw_input_contents": 7},
        "ModelInferResponse": {**head, "outputs": 5, "raw_output_contents": 6},
        "InferParameter": {"bool_param": 1, "int64_param": 2, "string_param": 3, "double_param": 4, "uint64_param": 5},
        "InferTensorContents": {
            "bool_contents": 1, "int_contents": 2, "int64_contents": 3, "uint_contents": 4, "uint64_contents": 5,
            "fp32_contents": 6, "fp64_contents": 7, "bytes_contents": 8,
        },
        "ModelMetadataResponse": {"name": 1, "versions": 2, "platform": 3, "inputs": 4, "outputs": 5},
    }  # fmt: skip
    assert pb.DESCRIPTOR.package == "inference"
