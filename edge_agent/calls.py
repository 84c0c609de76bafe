"""Calls to a tail, which edge_agent/link.py makes: the channel, what is asked of it, what its answers and refusals mean."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skills import oip
from skills.errors import FormatError, MissingExtra
from skills.files import read_bytes

LOADING = ("split-refused", "loading")  # with UNAVAILABLE in the trailer: the plan is not there yet, the tail is
MAX_KEY_BYTES = 1 << 20
TLS_FILES = ("ca.pem", "key.pem", "cert.pem")


def request(header: Mapping[str, Any], frame: bytes, deadline_us: int) -> Any:
    """Return a request of our own protocol: one frame, and as parameters which plan, cut and coding it is of.

    Raises:
        KeyError: the worker's header lacks one of them.
    """
    made = oip.messages().ModelInferRequest(model_name=str(header["plan"]))
    made.inputs.add(name="frame", datatype="UINT8", shape=[len(frame)])
    made.raw_input_contents.append(frame)
    for key in ("plan", "cut", "codec"):
        made.parameters[f"split.{key}"].string_param = str(header[key])
    if "reply" in header:
        made.parameters["split.reply"].string_param = str(header["reply"])
    made.parameters["split.deadline_us"].int64_param = deadline_us
    return made


def plain_request(header: Mapping[str, Any], body: bytes, _: int) -> Any:
    """Return a request that any server of the protocol understands: named tensors, no parameters of ours.

    Raises:
        KeyError, TypeError, ValueError: the worker's header lacks something, or says more bytes than came.
    """
    name = header["plan"] if header["cut"] == "input" else f"{header['plan']}.{header['cut']}"
    made, at = oip.messages().ModelInferRequest(model_name=str(name)), 0
    for tensor, datatype, shape, size in header["tensors"]:
        if type(size) is not int or not 0 <= size <= len(body) - at:
            raise ValueError("its tensors are longer than what came")
        made.inputs.add(name=tensor, datatype=datatype, shape=shape)
        made.raw_input_contents.append(body[at : at + size])
        at += size
    return made


def raw(response: Any) -> Any:
    """Return the response with its tensors raw, as some servers do not send them; None when it cannot be read."""
    try:
        return oip.to_response(oip.from_response(response))
    except FormatError:
        return None


def assumed_ms(header: Mapping[str, Any]) -> float:
    """Return what the plan says that the tail takes, 0 where it says nothing: stock servers do not tell."""
    said = header.get("tail_ms")
    return float(said) if isinstance(said, (int, float)) and said >= 0 else 0.0


def kind(error: Any) -> str:
    """Return what a call that failed says of the tail and of the plan, in the words that a worker is told."""
    import grpc

    codes = grpc.StatusCode
    if error.code() is codes.UNAVAILABLE and LOADING in tuple(error.trailing_metadata() or ()):
        return "loading"
    return {
        codes.UNAVAILABLE: "unavailable", codes.DEADLINE_EXCEEDED: "late", codes.CANCELLED: "late",
        codes.RESOURCE_EXHAUSTED: "exhausted", codes.UNAUTHENTICATED: "unavailable",
    }.get(error.code(), "invalid")  # fmt: skip


def channel(target: str, tls: Path | None) -> Any:
    """Return a channel to `target`, over TLS with the three files of the folder `tls`, without it in plain.

    Raises:
        MissingExtra: grpcio is not installed.
        NotFound, StorageError: a TLS file is missing or cannot be read.
    """
    try:
        import grpc
    except ImportError:
        raise MissingExtra("grpcio is not installed: pip install 'skerry[edge]'") from None
    options = (
        ("grpc.max_receive_message_length", oip.MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", oip.MAX_MESSAGE_BYTES),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5000),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),  # or a new channel would be the old connection
    )
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options)
    ca, key, certificate = (read_bytes(tls / name, "the TLS file", MAX_KEY_BYTES) for name in TLS_FILES)
    return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(ca, key, certificate), options=options)
