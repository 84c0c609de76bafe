"""A client of the controller's REST API. Every call has a deadline; every failure is an error of `skills.errors`."""

import dataclasses
import ssl
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cloud.access import Access
from cloud.views import DeviceView, EventView, MeasureView, ReleaseView, RolloutView, view
from skills.errors import DeadlineExceeded, FormatError, NotFound, TrustError, Unreachable, error_for

if TYPE_CHECKING:
    import httpx

    from skills.manifest import Skill
    from skills.oip import Answer, Call

DEADLINE_S = 15.0
UPLOAD_DEADLINE_S = 120.0
GRACE_S = 5.0  # beyond a deadline that the controller keeps itself


@dataclasses.dataclass(frozen=True, slots=True)
class Invite:
    """A one-time invitation and the line to paste on the device."""

    token: str
    url: str
    command: str


class Client:
    """Talks to one controller; use it as a context manager."""

    def __init__(
        self, access: Access, *, deadline_s: float = DEADLINE_S, transport: "httpx.BaseTransport | None" = None
    ) -> None:
        """Prepare to talk; nothing is sent yet.

        Raises:
            NotFound: the CA's file is not there.
            FormatError: it holds no certificate.
        """
        import httpx

        self.access = access
        self._http = httpx.Client(
            base_url=access.url,
            headers={"Authorization": f"Bearer {access.token}"},
            timeout=deadline_s,
            verify=_trusting(access.ca) if transport is None else True,
            transport=transport,
            trust_env=False,  # a proxy for the web is none for the fleet
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    # --- looking ----------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return how the controller is."""
        return _object(self._json("GET", "/v1/status"), "the status")

    def devices(self) -> tuple[DeviceView, ...]:
        """Return all devices."""
        return tuple(
            view(DeviceView, raw, "a device") for raw in _list(self._json("GET", "/v1/devices"), "the devices")
        )

    def device(self, device: str) -> DeviceView:
        """Return one device.

        Raises:
            NotFound: no such device.
        """
        return view(DeviceView, self._json("GET", f"/v1/devices/{_segment(device)}"), "the device")

    def releases(self) -> tuple[ReleaseView, ...]:
        """Return all releases, newest first."""
        return tuple(
            view(ReleaseView, raw, "a release") for raw in _list(self._json("GET", "/v1/releases"), "the releases")
        )

    def rollouts(self) -> tuple[RolloutView, ...]:
        """Return the newest rollouts, newest first, without their devices."""
        return tuple(
            view(RolloutView, raw, "a rollout") for raw in _list(self._json("GET", "/v1/rollouts"), "the rollouts")
        )

    def rollout(self, number: int) -> RolloutView:
        """Return one rollout with its devices."""
        return view(RolloutView, self._json("GET", f"/v1/rollouts/{number}"), "the rollout")

    def events(self, limit: int = 100, device: str | None = None) -> tuple[EventView, ...]:
        """Return the audit, newest first."""
        query = {"limit": str(limit), **({"device": device} if device else {})}
        return tuple(
            view(EventView, raw, "an event")
            for raw in _list(self._json("GET", "/v1/events", params=query), "the audit")
        )

    def logs(self, device: str, lines: int, deadline_s: float = 10.0) -> tuple[str, ...]:
        """Return the last lines of a device's own log.

        Raises:
            Unreachable, DeadlineExceeded: the device is not there, or does not answer in time.
        """
        query = {"lines": str(lines), "deadline_ms": str(int(deadline_s * 1000))}
        path = f"/v1/devices/{_segment(device)}/logs"
        raw = _object(self._json("GET", path, params=query, timeout=deadline_s + GRACE_S), "the log")
        return tuple(str(line) for line in _list(raw.get("lines"), "the lines"))

    # --- joining ----------------------------------------------------------------------------------

    def invite(self, labels: Mapping[str, str], ttl_s: float) -> Invite:
        """Make a one-time invitation for one device."""
        raw = self._json("POST", "/v1/invites", json={"labels": dict(labels), "ttl_s": ttl_s})
        return view(Invite, raw, "the invitation")

    def remove(self, device: str) -> None:
        """Remove a device and revoke its certificate."""
        self._json("DELETE", f"/v1/devices/{_segment(device)}")

    # --- releasing --------------------------------------------------------------------------------

    def metadata(self, role: str) -> bytes:
        """Return one file of the signed repository, verbatim."""
        return self._call("GET", f"/v1/repository/{role}").content

    def has_object(self, sha256: str) -> bool:
        """Say whether the controller has an object."""
        try:
            self._json("GET", f"/v1/objects/{sha256}")
        except NotFound:
            return False
        return True

    def put_object(self, sha256: str, data: bytes) -> None:
        """Upload an object."""
        self._json("PUT", f"/v1/objects/{sha256}", content=data, timeout=UPLOAD_DEADLINE_S)

    def lend_object(self, sha256: str, data: bytes) -> None:
        """Upload an object for a device to measure; the controller drops it when that is done."""
        self._json("PUT", f"/v1/objects/{sha256}", params={"lent": "true"}, content=data, timeout=UPLOAD_DEADLINE_S)

    def release(self, manifest_sha256: str, targets: bytes) -> ReleaseView:
        """Hand in a signed release.

        Raises:
            TrustError: the controller does not accept the signature, or a newer list is there already.
        """
        body = {"manifest_sha256": manifest_sha256, "targets_json": targets.decode()}
        return view(
            ReleaseView, self._json("POST", "/v1/releases", json=body, timeout=UPLOAD_DEADLINE_S), "the release"
        )

    def interface(self, skill: str, version: str | None = None) -> "Skill":
        """Return the skill.yaml of a release, the newest one when no version is given.

        Raises:
            NotFound: there is no such release.
        """
        from skills.manifest import Skill
        from skills.wire import decode_json, encode_json

        path = f"/v1/releases/{_segment(skill)}/{_segment(version or 'latest')}"
        raw = _object(self._json("GET", path), "the release")
        return decode_json(Skill, encode_json(raw.get("manifest")), "the release's manifest")

    # --- rolling out ------------------------------------------------------------------------------

    def push(self, skill: str, version: str | None, selector: str, canary: str | None) -> RolloutView:
        """Bring a release to devices."""
        body = {"skill": skill, "version": version, "selector": selector, "canary": canary}
        return view(RolloutView, self._json("POST", "/v1/rollouts", json=body), "the rollout")

    def rollback(self, skill: str, selector: str) -> RolloutView:
        """Bring devices back to what they served before."""
        return view(
            RolloutView, self._json("POST", "/v1/rollbacks", json={"skill": skill, "selector": selector}), "the rollout"
        )

    def change_rollout(self, number: int, verb: str) -> RolloutView:
        """Pause, resume or abort a rollout."""
        return view(RolloutView, self._json("POST", f"/v1/rollouts/{number}/{verb}"), "the rollout")

    # --- asking -----------------------------------------------------------------------------------

    def infer(self, device: str, skill: str, call: "Call", deadline_s: float = 10.0) -> "Answer":
        """Ask a skill on a device, over the device's MQTT topics.

        Raises:
            NotFound, Refused, Unreachable, DeadlineExceeded: what the device or the controller said.
        """
        from skills.oip import BINARY_HEADER, decode_answer, encode_call

        body, json_len = encode_call(call)
        response = self._call(
            "POST",
            f"/v1/devices/{_segment(device)}/infer",
            params={"skill": skill, "deadline_ms": str(int(deadline_s * 1000))},
            headers={BINARY_HEADER: str(json_len), "Content-Type": "application/octet-stream"},
            content=body,
            timeout=deadline_s + GRACE_S,
        )
        size = response.headers.get(BINARY_HEADER)
        if size is not None and not size.isdecimal():
            raise FormatError(f"the controller answered with {BINARY_HEADER}: {size[:20]!r}, expected a number")
        return decode_answer(response.content, None if size is None else int(size))

    def measure(self, device: str, work: str, deadline_s: float = 30.0) -> MeasureView:
        """Have a device measure a work that was lent, or see how far it is.

        Raises:
            NotFound, Refused, Unreachable, DeadlineExceeded: what the device or the controller said.
        """
        query, path = {"deadline_ms": str(int(deadline_s * 1000))}, f"/v1/devices/{_segment(device)}/measure"
        raw = self._json("POST", path, params=query, json={"work": work}, timeout=deadline_s + GRACE_S)
        return view(MeasureView, raw, "the measurement")

    # --- the one door -----------------------------------------------------------------------------

    def _json(self, method: str, path: str, **arguments: Any) -> object:
        response = self._call(method, path, **arguments)
        try:
            answer: object = response.json()
        except ValueError:
            raise FormatError(
                f"{self.access.url} does not answer like a Skerry controller: check the address"
            ) from None
        return answer

    def _call(self, method: str, path: str, **arguments: Any) -> "httpx.Response":
        import httpx

        try:
            response = self._http.request(method, path, **arguments)
        except httpx.TimeoutException:
            raise DeadlineExceeded(f"the controller at {self.access.url} did not answer in time") from None
        except httpx.ConnectError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise TrustError(
                    f"{self.access.url} shows a certificate that this user's CA file did not sign: "
                    "name the right one with --ca, or skerry login again"
                ) from None
            raise Unreachable(
                f"no controller answers at {self.access.url}: start it with skerry up, or name another"
            ) from None
        except (httpx.HTTPError, ssl.SSLError) as error:
            raise Unreachable(
                f"the connection to {self.access.url} broke: {str(error) or type(error).__name__}"
            ) from None
        if response.is_error:
            raise self._error(response)
        return response

    def _error(self, response: "httpx.Response") -> Exception:
        try:
            raw = response.json()
            return error_for(int(raw["code"]), str(raw["error"]))
        except (ValueError, KeyError, TypeError):
            return FormatError(
                f"{self.access.url} answered {response.status_code}, not as a Skerry controller does: check the address"
            )


def fetch_ca(url: str, deadline_s: float = DEADLINE_S) -> bytes:
    """Return the CA certificate (PEM) that a controller shows, without trusting it: the caller compares its fingerprint.

    It is one certificate, whatever else was sent: nobody would compare a second one.

    Raises:
        Unreachable: nobody answers.
        FormatError: it is no controller.
    """
    import httpx

    try:
        # The one call without verification: what comes back is only believed after a person compared its fingerprint.
        response = httpx.get(f"{url}/v1/ca", verify=False, timeout=deadline_s, trust_env=False)  # noqa: S501
    except httpx.HTTPError:
        raise Unreachable(f"no controller answers at {url}") from None
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        if not response.is_error:
            return x509.load_pem_x509_certificate(response.content).public_bytes(Encoding.PEM)
    except ValueError:
        pass
    raise FormatError(f"{url} does not answer like a Skerry controller: check the address")


def _trusting(ca: str | None) -> ssl.SSLContext:
    if ca is None:
        return ssl.create_default_context()
    if not Path(ca).is_file():
        raise NotFound(f"the CA file {ca} does not exist: skerry login writes one, --ca names one")
    try:
        return ssl.create_default_context(cafile=ca)
    except ssl.SSLError:
        raise FormatError(f"{ca} holds no certificate in PEM form") from None


def _segment(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="")


def _object(raw: object, what: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise FormatError(f"{what} is {type(raw).__name__}, expected an object: another version of the controller?")
    return raw


def _list(raw: object, what: str) -> list[Any]:
    if not isinstance(raw, list):
        raise FormatError(f"{what} is {type(raw).__name__}, expected a list: another version of the controller?")
    return raw
