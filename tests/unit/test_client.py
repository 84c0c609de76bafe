"""The API's client: every failure is one of our errors, every answer a checked value."""

from collections.abc import Callable

import httpx
import pytest

from cloud.access import Access
from cloud.client import Client
from skills.errors import DeadlineExceeded, FormatError, NotFound, Refused, SkerryError, TrustError, Unreachable

ACCESS = Access("https://controller:8443", "secret")
DEVICE = {
    "id": "porch", "labels": {"site": "a"}, "arch": "x86_64", "online": True, "seen": 1, "enrolled": 0.5, "counter": 3,
    "capabilities": None, "wanted": {}, "skills": [],
}  # fmt: skip


def client(answer: Callable[[httpx.Request], httpx.Response]) -> Client:
    return Client(ACCESS, transport=httpx.MockTransport(answer))


@pytest.mark.parametrize(
    ("code", "kind"), [(66, NotFound), (77, TrustError), (79, Refused), (75, DeadlineExceeded), (4242, SkerryError)]
)
def test_an_error_of_the_controller_is_the_same_error_here(code: int, kind: type[SkerryError]) -> None:
    with (
        client(lambda _: httpx.Response(409, json={"error": "because", "code": code})) as api,
        pytest.raises(kind, match="because"),
    ):
        api.devices()


def test_a_server_that_is_no_controller_is_said_to_be_none() -> None:
    with (
        client(lambda _: httpx.Response(502, text="<html>")) as api,
        pytest.raises(FormatError, match="check the address"),
    ):
        api.devices()
    with (
        client(lambda _: httpx.Response(200, text="<html>")) as api,
        pytest.raises(FormatError, match="check the address"),
    ):
        api.devices()


def test_silence_and_absence_are_told_apart() -> None:
    def silent(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("", request=request)

    def absent(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with client(silent) as api, pytest.raises(DeadlineExceeded):
        api.devices()
    with client(absent) as api, pytest.raises(Unreachable, match="skerry up"):
        api.devices()


def test_a_newer_controller_may_say_more_but_not_less() -> None:
    with client(lambda _: httpx.Response(200, json=[{**DEVICE, "novelty": 1}])) as api:
        (device,) = api.devices()
    assert (device.id, device.seen, dict(device.labels)) == ("porch", 1.0, {"site": "a"})
    lacking = {key: value for key, value in DEVICE.items() if key != "online"}
    with (
        client(lambda _: httpx.Response(200, json=[lacking])) as api,
        pytest.raises(FormatError, match="lacks 'online'"),
    ):
        api.devices()
    with (
        client(lambda _: httpx.Response(200, json=[{**DEVICE, "online": "yes"}])) as api,
        pytest.raises(FormatError, match="online is str"),
    ):
        api.devices()


def test_the_token_travels_and_a_device_name_cannot_leave_its_place_in_the_path() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=DEVICE)

    with client(answer) as api:
        api.device("../releases?x")
    assert seen[0].headers["authorization"] == "Bearer secret"
    assert seen[0].url.raw_path == b"/v1/devices/..%2Freleases%3Fx"
