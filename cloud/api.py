"""The controller's REST API: JSON, a bearer token, OpenAPI at /openapi.json, every error as {"error", "code"}.

`code` is the exit code that a command would end with (docs/exit-codes.md). Handlers run in the controller's one event loop
and hand everything to the parts that own it.
"""

import hmac
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

import skills
from cloud.authority import MAX_CSR_BYTES
from cloud.delivery import MAX_RELAY_BYTES
from cloud.fleet import device_json
from cloud.orders import check_verb
from cloud.registry import MAX_TARGETS_BYTES, release_json
from skills.errors import (
    DeadlineExceeded,
    FormatError,
    MissingExtra,
    NotFound,
    Refused,
    SkerryError,
    StorageError,
    TrustError,
    Unreachable,
    UsageError,
)
from skills.wire import to_plain

if TYPE_CHECKING:
    from cloud.controller import Controller

MAX_BODY_BYTES = 2 << 20  # of everything but objects
MAX_DEADLINE_MS = 120_000
STATUS: dict[type[SkerryError], int] = {
    UsageError: 400,
    FormatError: 400,
    NotFound: 404,
    TrustError: 403,
    Refused: 409,
    Unreachable: 503,
    StorageError: 507,
    DeadlineExceeded: 504,
    MissingExtra: 501,
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class InviteBody(_Body):
    """An invitation for one device."""

    labels: dict[str, str] = {}
    ttl_s: float = 86_400


class EnrollBody(_Body):
    """A device that wants to join: the token (whole, or the secret inside it) and a request for its certificate."""

    token: str = Field(max_length=4096)
    csr_pem: str = Field(max_length=MAX_CSR_BYTES)
    name: str | None = Field(default=None, max_length=63)


class ReleaseBody(_Body):
    """A release: the digest of the manifest, and the signed targets that list it."""

    manifest_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    targets_json: str = Field(max_length=MAX_TARGETS_BYTES)


class RolloutBody(_Body):
    """Bring a release (the newest one when no version is given) to devices."""

    skill: str = Field(max_length=63)
    version: str | None = Field(default=None, max_length=32)
    selector: str = Field(max_length=2000)
    canary: str | None = Field(default=None, max_length=8)


class RollbackBody(_Body):
    """Bring devices back to what they served before."""

    skill: str = Field(max_length=63)
    selector: str = Field(max_length=2000)


class MeasureBody(_Body):
    """What a device is to measure: the digest of a work that was uploaded as lent, with all its parts."""

    work: str = Field(pattern="^[0-9a-f]{64}$")


def create_app(controller: "Controller") -> FastAPI:
    """Return the API of a controller."""
    app = FastAPI(title="Skerry controller", version=skills.__version__, docs_url="/docs", redoc_url=None)
    bearer = HTTPBearer(auto_error=False)

    def authorised(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if given is None or not hmac.compare_digest(given.credentials.encode(), controller.token.encode()):
            raise HTTPException(401, "the token is missing or wrong: give the one that skerry up printed")

    _answer_errors(app, controller)
    _open_routes(app, controller)
    _fleet_routes(app, controller, [Depends(authorised)])
    _release_routes(app, controller, [Depends(authorised)])
    _rollout_routes(app, controller, [Depends(authorised)])
    _relay_routes(app, controller, [Depends(authorised)])
    return app


def _open_routes(app: FastAPI, controller: "Controller") -> None:
    @app.get("/v1/ca", response_class=PlainTextResponse, tags=["joining"])
    async def ca() -> str:
        """Return the CA's certificate (PEM); a device compares it with the fingerprint in its invitation."""
        return controller.authority.ca_pem

    @app.post("/v1/enroll", tags=["joining"])
    async def enroll(body: EnrollBody) -> dict[str, str]:
        """Let a device join with a one-time token."""
        joined = controller.fleet.enroll(body.token, body.csr_pem, body.name)
        return {
            "device": joined.device,
            "cert_pem": joined.cert_pem,
            "ca_pem": controller.authority.ca_pem,
            "mqtt_url": controller.mqtt_url,
            "tail_url": controller.tail_url,
            "root_json": controller.registry.root_bytes.decode(),
            "director_pem": controller.registry.director_pem.decode(),
        }


def _fleet_routes(app: FastAPI, controller: "Controller", guard: list[Any]) -> None:
    @app.get("/v1/status", dependencies=guard, tags=["controller"])
    async def status() -> dict[str, Any]:
        """Say how the controller is."""
        return controller.status()

    @app.post("/v1/invites", dependencies=guard, tags=["joining"])
    async def invite(body: InviteBody) -> dict[str, str]:
        """Make a one-time invitation for one device."""
        token = controller.fleet.invite(controller.url, body.labels, body.ttl_s).token()
        return {"token": token, "url": controller.url, "command": f"skerry-agent enroll {token}"}

    @app.get("/v1/devices", dependencies=guard, tags=["devices"])
    async def devices() -> list[dict[str, Any]]:
        """List all devices."""
        wanted = controller.fleet.all_wanted()
        return [device_json(device, wanted.get(device.id, {})) for device in controller.fleet.devices()]

    @app.get("/v1/devices/{device}", dependencies=guard, tags=["devices"])
    async def device(device: str) -> dict[str, Any]:
        """Show one device."""
        return device_json(controller.fleet.device(device), controller.fleet.wanted(device))

    @app.delete("/v1/devices/{device}", dependencies=guard, tags=["devices"])
    async def remove(device: str) -> dict[str, str]:
        """Remove a device and revoke its certificate."""
        await controller.remove(device)
        return {"removed": device}

    @app.get("/v1/events", dependencies=guard, tags=["controller"])
    async def events(
        limit: Annotated[int, Query(ge=1, le=1000)] = 100, device: str | None = None
    ) -> list[dict[str, Any]]:
        """Return the audit, newest first."""
        names = ("id", "time", "kind", "device", "data")
        return [{name: getattr(event, name) for name in names} for event in controller.fleet.events(limit, device)]


def _release_routes(app: FastAPI, controller: "Controller", guard: list[Any]) -> None:
    @app.get("/v1/repository/{role}", dependencies=guard, tags=["releases"])
    async def repository(role: str) -> Response:
        """Return one file of the signed repository, verbatim."""
        return Response(controller.registry.role(role), media_type="application/json")

    @app.head("/v1/objects/{sha256}", dependencies=guard, tags=["releases"])
    @app.get("/v1/objects/{sha256}", dependencies=guard, tags=["releases"])
    async def object_exists(sha256: str) -> dict[str, Any]:
        """Say whether an object is there."""
        size = controller.registry.size_of(sha256)
        if size is None:
            raise NotFound(f"the controller has no object {sha256[:12]}…")
        return {"sha256": sha256, "size": size}

    @app.put("/v1/objects/{sha256}", dependencies=guard, tags=["releases"])
    async def put_object(sha256: str, request: Request, lent: bool = False) -> dict[str, Any]:
        """Upload an object; its name is the SHA-256 of the body. `lent`: only for a device to measure, then it goes."""
        return {"sha256": sha256, "size": await controller.registry.put(sha256, request.stream(), lent=lent)}

    @app.post("/v1/releases", dependencies=guard, tags=["releases"])
    async def release(body: ReleaseBody) -> dict[str, Any]:
        """Take in a signed release."""
        return release_json(await controller.accept(body.manifest_sha256, body.targets_json.encode()))

    @app.get("/v1/releases", dependencies=guard, tags=["releases"])
    async def releases() -> list[dict[str, Any]]:
        """List all releases, newest first."""
        return [release_json(row) for row in controller.registry.releases()]

    @app.get("/v1/releases/{skill}/{version}", dependencies=guard, tags=["releases"])
    async def one_release(skill: str, version: str) -> dict[str, Any]:
        """Show one release (`latest`: the newest) with its skill.yaml."""
        row = controller.registry.release(skill, None if version == "latest" else version)
        return {**release_json(row), "manifest": to_plain(controller.registry.manifest(row.manifest_sha256).skill)}


def _rollout_routes(app: FastAPI, controller: "Controller", guard: list[Any]) -> None:
    @app.post("/v1/rollouts", dependencies=guard, tags=["rollouts"])
    async def push(body: RolloutBody) -> dict[str, Any]:
        """Bring a release to devices."""
        return controller.push(body.skill, body.version, body.selector, body.canary)

    @app.post("/v1/rollbacks", dependencies=guard, tags=["rollouts"])
    async def rollback(body: RollbackBody) -> dict[str, Any]:
        """Bring devices back to what they served before."""
        return controller.rollback(body.skill, body.selector)

    @app.get("/v1/rollouts", dependencies=guard, tags=["rollouts"])
    async def rollouts(limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> list[dict[str, Any]]:
        """List rollouts, newest first, without their devices."""
        return controller.orders.rollouts(limit)

    @app.get("/v1/rollouts/{number}", dependencies=guard, tags=["rollouts"])
    async def rollout(number: int) -> dict[str, Any]:
        """Show one rollout with its devices."""
        return controller.orders.rollout(number)

    @app.post("/v1/rollouts/{number}/{verb}", dependencies=guard, tags=["rollouts"])
    async def change(number: int, verb: str) -> dict[str, Any]:
        """Pause, resume or abort a rollout."""
        controller.delivery.tell(controller.orders.change(number, check_verb(verb)))
        return controller.orders.rollout(number)


def _relay_routes(app: FastAPI, controller: "Controller", guard: list[Any]) -> None:
    deadline = Query(ge=1, le=MAX_DEADLINE_MS)

    @app.post("/v1/devices/{device}/infer", dependencies=guard, tags=["devices"])
    async def infer(
        device: str, skill: str, request: Request, deadline_ms: Annotated[int, deadline] = 10_000
    ) -> Response:
        """Ask a skill on a device: an Open Inference Protocol request, over the device's MQTT topics."""
        body = await _read(request, MAX_RELAY_BYTES)
        header = {"skill": skill, "json_len": _json_len(request, len(body))}
        answer, data = await controller.delivery.relay(device, "infer", header, body, deadline_ms / 1000)
        size = answer.get("json_len")
        headers = {"Inference-Header-Content-Length": str(size)} if isinstance(size, int) and size != len(data) else {}
        return Response(data, media_type="application/octet-stream" if headers else "application/json", headers=headers)

    @app.get("/v1/devices/{device}/logs", dependencies=guard, tags=["devices"])
    async def logs(
        device: str, lines: Annotated[int, Query(ge=1, le=2000)] = 100, deadline_ms: Annotated[int, deadline] = 10_000
    ) -> dict[str, Any]:
        """Return the last lines of a device's log."""
        _, data = await controller.delivery.relay(device, "logs", {"lines": lines}, b"", deadline_ms / 1000)
        return {"device": device, "lines": data.decode(errors="replace").splitlines()}

    @app.post("/v1/devices/{device}/measure", dependencies=guard, tags=["devices"])
    async def measure(device: str, body: MeasureBody, deadline_ms: Annotated[int, deadline] = 30_000) -> dict[str, Any]:
        """Have a device measure a work that was lent, or say how far it is. Ask again until `state` is `done`."""
        return await controller.measuring.ask(device, body.work, deadline_ms / 1000)


def _json_len(request: Request, size: int) -> int:
    given = request.headers.get("inference-header-content-length")
    if given is None:
        return size
    if not given.isdecimal() or int(given) > size:
        raise FormatError(f"Inference-Header-Content-Length is {given[:20]!r}, expected 0 to {size}")
    return int(given)


async def _read(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise FormatError(f"the request is larger than the limit of {limit} bytes")
    return bytes(body)


def _answer_errors(app: FastAPI, controller: "Controller") -> None:
    def answer(status: int, error: str, code: int) -> JSONResponse:
        return JSONResponse({"error": error, "code": code}, status)

    @app.exception_handler(SkerryError)
    async def _known(_request: Request, error: SkerryError) -> JSONResponse:
        return answer(
            next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500),
            str(error),
            error.exit_code,
        )

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        sentence = {
            404: f"the API has nothing at {request.url.path}",
            405: f"{request.url.path} does not take {request.method}",
        }.get(error.status_code, str(error.detail))
        code = {401: TrustError, 404: NotFound}.get(error.status_code, UsageError).exit_code
        return answer(error.status_code, sentence, code)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
        return answer(422, f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}", UsageError.exit_code)

    @app.exception_handler(Exception)
    async def _unknown(request: Request, error: Exception) -> JSONResponse:
        controller.journal.exception("api.broke", path=request.url.path)
        return answer(
            500, f"the controller failed ({type(error).__name__}); its log has the details", SkerryError.exit_code
        )

    @app.middleware("http")
    async def _limit(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        length = request.headers.get("content-length", "0")
        streamed = request.url.path.startswith("/v1/objects/")
        if not streamed and request.method in ("POST", "PUT", "DELETE"):
            if "transfer-encoding" in request.headers:
                return answer(411, "the request needs a Content-Length", UsageError.exit_code)
            if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
                return answer(
                    413, f"the request is larger than the limit of {MAX_BODY_BYTES} bytes", FormatError.exit_code
                )
        return await go_on(request)
