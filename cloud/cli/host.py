"""Commands about this machine's controller, and about which controller to talk to."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cloud.cli.command import command
from cloud.cli.connection import Ca, Token, Url, connect
from cloud.cli.screen import Screen
from skills.errors import Interrupted, NotFound, Refused, TrustError, UsageError

PANEL = "A controller on this machine"
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FOLDER",
        help="The controller's data folder.",
        show_default="~/.local/share/skerry/controller",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(
        app,
        "up",
        panel=PANEL,
        examples=("skerry up", "skerry up --listen 192.168.1.10", "skerry up --broker mqtts://broker.example:8883"),
    )(up)
    command(app, "down", panel=PANEL, examples=("skerry down",))(down)
    command(app, "status", panel=PANEL, examples=("skerry status", "skerry status --json"))(status)
    command(
        app,
        "login",
        panel=PANEL,
        examples=(
            "skerry login https://192.168.1.10:8443 --fingerprint 4f2a…",
            "skerry login https://skerry.example:8443 --ca ca.pem",
        ),
    )(login)


def up(
    screen: Screen,
    listen: Annotated[
        str | None,
        typer.Option(
            "--listen",
            metavar="ADDRESS",
            help="Address to listen on; 0.0.0.0 for every network.",
            show_default="127.0.0.1",
        ),
    ] = None,
    data: Data = None,
    broker: Annotated[
        str | None, typer.Option("--broker", metavar="URL", help="A broker that you run: mqtts://HOST:PORT.")
    ] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay, show the log, and stop it all on Ctrl-C.")
    ] = False,
    api_port: Annotated[
        int | None, typer.Option("--api-port", help="Port of the API; 0 takes any free one.", show_default="8443")
    ] = None,
    mqtt_port: Annotated[
        int | None, typer.Option("--mqtt-port", help="Port of the broker; 0 takes any free one.", show_default="8883")
    ] = None,
    tail_port: Annotated[
        int | None,
        typer.Option("--tail-port", help="Port of the tail server; 0 takes any free one.", show_default="8444"),
    ] = None,
) -> None:
    """Start a controller on this machine: API, broker, tail server, database.

    Everything lies in one data folder and is reachable from this machine only, unless --listen says otherwise.
    The commands of this user talk to it from now on.
    """
    from cloud import supervise
    from cloud.access import Access, keep_access
    from cloud.config import LOOPBACK, Settings, resolve_address

    folder = data_folder(data)
    settings = Settings(
        folder,
        listen=resolve_address(LOOPBACK if listen is None else listen),
        api_port=api_port,
        mqtt_port=mqtt_port,
        tail_port=tail_port,
        broker=broker,
    )
    with screen.progress("starting") as step:
        step("controller, broker and tail server", 0.3)
        running = supervise.start(settings, detach=not foreground)
    if running.already:
        supervise.check_same(running.run, settings, listen_given=listen is not None)
    run = running.run
    key = folder / "keys" / "publisher.pem"
    fingerprint = certificate_fingerprint(running.ca.read_bytes())
    config = keep_access(Access(run.url, running.token, str(running.ca), str(key) if key.is_file() else None))
    facts = {
        **{name: getattr(run, name) for name in ("url", "mqtt_url", "tail_url", "broker", "pid", "log")},
        "token": running.token,
        "ca": str(running.ca),
        "fingerprint": fingerprint,
        "data": str(folder),
        "config": str(config),
        "already": running.already,
    }
    rows = {
        "controller": f"{run.url}  (pid {run.pid}{', was running already' if running.already else ''})",
        "broker": f"{run.mqtt_url}  ({run.broker})",
        "tail": run.tail_url,
        "data": str(folder),
        "token": running.token,
        "config": f"{config}  (skerry reads all this there)",
    }
    if not run.url.startswith(("https://127.", "https://localhost", "https://[::1]")):
        rows["elsewhere"] = f"skerry login {run.url} --fingerprint {fingerprint}"
    screen.result(facts, lambda: _facts(rows))
    if foreground:
        _stay(screen, folder, Path(run.log))
    else:
        screen.say(
            "Next: [cyan]skerry devices invite[/cyan] prints the line for a device; [cyan]skerry down[/cyan] stops it all."
        )


def _stay(screen: Screen, folder: Path, log: Path) -> None:
    """Show the log until the controller ends, a SIGTERM comes (the usual end of a service) or somebody presses Ctrl-C.

    Raises:
        Interrupted: it was Ctrl-C; the controller is stopped.
    """
    import sys
    import time

    from cloud import supervise

    try:
        with log.open(encoding="utf-8", errors="replace") as lines:
            while supervise.status(folder) is not None:
                for line in lines:
                    sys.stderr.write(line)
                time.sleep(0.2)
    except KeyboardInterrupt:
        screen.say("stopping …")
        raise Interrupted("stopped by Ctrl-C, with the broker and the tail server") from None
    except SystemExit:  # what the command line makes of SIGTERM
        screen.say("stopping …")
    finally:
        supervise.stop(folder)


def down(screen: Screen, data: Data = None) -> None:
    """Stop the controller of this machine, with its broker and tail server.

    Devices go on serving what they have; they come back when the controller does.
    """
    from cloud import supervise

    folder = data_folder(data)
    stopped = supervise.stop(folder)
    screen.result(
        {"stopped": stopped, "data": str(folder)}, "stopped" if stopped else f"no controller was running on {folder}"
    )


def status(screen: Screen, url: Url = None, token: Token = None, ca: Ca = None) -> None:
    """Say how the controller is: its parts, devices, releases and open rollouts.

    The fingerprint is that of the CA by which the controller was recognised just now: compare it at a login elsewhere.
    """
    with connect(url, token, ca) as client:
        found = client.status()
        trusted = client.access.ca
    fingerprint = None if trusted is None else certificate_fingerprint(Path(trusted).read_bytes())
    more = {} if fingerprint is None else {"fingerprint": fingerprint}
    screen.result({**found, "fingerprint": fingerprint}, lambda: _facts({**_standing(found), **more}))


def login(
    screen: Screen,
    url: Annotated[str, typer.Argument(metavar="URL", help="The controller's address, https://HOST:PORT.")],
    token: Token = None,
    ca: Ca = None,
    fingerprint: Annotated[
        str | None,
        typer.Option("--fingerprint", help="SHA-256 of the controller's CA certificate, when you have no --ca file."),
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", metavar="FILE", help="The publisher's key with which you sign releases.")
    ] = None,
) -> None:
    """Remember a controller, its token and its CA for this user.

    The token is the one that `skerry up` printed on the controller's machine; without --token it is asked for. The
    controller's certificate is checked against --ca or --fingerprint; without either you are asked to compare it with
    what `skerry status` prints on the controller's machine.
    """
    import os
    import sys

    from cloud.access import Access, check_url, keep_access
    from cloud.client import Client, fetch_ca
    from skills.files import write_atomic, xdg_config

    url = check_url(url)
    if ca is None and url.startswith("https:"):
        pem = fetch_ca(url)
        shown = certificate_fingerprint(pem)
        if fingerprint is None:
            if not sys.stdin.isatty():
                raise UsageError(
                    f"{url} shows a CA with the fingerprint {shown}: if that is right, say so with --fingerprint"
                )
            question = (
                f"{url} shows a CA with the fingerprint {shown}. Does skerry status on its own machine say the same?"
            )
            if not typer.confirm(question):
                raise Refused(f"the fingerprint that {url} shows was not confirmed: nothing is kept")
        elif fingerprint.replace(":", "").lower() != shown:
            raise TrustError(
                f"{url} shows a CA with the fingerprint {shown}, not the one you gave: this is not that controller"
            )
        path = xdg_config("ca.pem")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(path, pem)
        ca = str(path)
    secret = (
        token
        or os.environ.get("SKERRY_TOKEN")
        or (typer.prompt("Token", hide_input=True) if sys.stdin.isatty() else None)
    )
    if not secret:
        raise UsageError("there is no token: give it with --token or SKERRY_TOKEN")
    access = Access(
        url, secret, None if ca is None else str(Path(ca).absolute()), None if key is None else str(key.absolute())
    )
    with Client(access) as client:
        found = client.status()
    config = keep_access(access)
    screen.result(
        {"url": url, "config": str(config), "version": found.get("version")}, f"logged in to {url}; kept in {config}"
    )


def certificate_fingerprint(pem: bytes) -> str:
    """Return the SHA-256 of a certificate, as invitations carry it.

    Raises:
        FormatError: it is no certificate.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    from skills.errors import FormatError

    try:
        return x509.load_pem_x509_certificate(pem).fingerprint(hashes.SHA256()).hex()
    except ValueError:
        raise FormatError("what the controller shows as its CA is no certificate") from None


def data_folder(data: Path | None) -> Path:
    """Return the controller's data folder, the usual one when none is given."""
    from skills.files import xdg_data

    return (xdg_data("controller") if data is None else data).absolute()


def _standing(found: dict[str, Any]) -> dict[str, str]:
    try:
        broker, tail, count = found["broker"], found["tail"], found["devices"]
        return {
            "controller": f"{found['url']}  (version {found['version']}, pid {found['pid']})",
            "broker": f"{broker['url']}  ({broker['kind']}, {'connected' if broker['connected'] else 'not connected'})",
            "tail": f"{tail['url']}  ({'running' if tail['pid'] else 'not running'})",
            "devices": f"{count['online']} online of {count['enrolled']}",
            "releases": str(found["releases"]),
            "rollouts": f"{found['rollouts']['open']} open",
            "data": str(found["data"]),
            "log": str(found["log"]),
        }
    except (KeyError, TypeError):
        raise NotFound("the controller's status lacks a part: another version of the controller?") from None


def _facts(rows: dict[str, str]) -> Any:
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, 2))
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for name, value in rows.items():
        made.add_row(name, Text(value))
    return made
