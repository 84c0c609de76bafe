"""Does the broker still take this device's certificate? A removed device is not told: its connections just end."""

import socket
import ssl
from typing import Literal
from urllib.parse import urlsplit

from edge_agent.identity import Identity

Standing = Literal["known", "unknown", "foreign", "silent"]
REACH_S = 5.0
SILENCE_S = 2.0  # a broker that takes the certificate says nothing before it is spoken to
TRIES = 2  # a broker that just restarts ends a connection too, but not twice


def unknown(identity: Identity) -> str:
    """Return the sentence for a device that its controller has removed."""
    return (
        f"the controller no longer knows this device: enrol it again (remove {identity.files.folder}, "
        "then skerry-agent enroll with a new invitation)"
    )


def look(identity: Identity) -> Standing:
    """Shake hands with the broker as this device, without speaking MQTT: a session that runs is not disturbed.

    `unknown`: it refuses the certificate. `foreign`: what answers is not the broker of the pinned CA. `silent`: nobody
    answers in time, or a file of the identity cannot be read. Blocks for some seconds.
    """
    url = urlsplit(identity.controller.mqtt_url)
    try:
        context = ssl.create_default_context(cafile=str(identity.files.ca))
        context.load_cert_chain(identity.files.cert, identity.files.key)
    except OSError:
        return "silent"
    found: Standing = "silent"
    for _ in range(TRIES):
        found = _try(context, url.hostname or "", url.port or 8883)
        if found != "unknown":
            break
    return found


def _try(context: ssl.SSLContext, host: str, port: int) -> Standing:
    try:
        plain = socket.create_connection((host, port), timeout=REACH_S)
    except OSError:
        return "silent"
    with plain:
        try:
            with context.wrap_socket(plain, server_hostname=host) as secure:
                secure.settimeout(SILENCE_S)
                try:
                    # With TLS 1.3 the refusal comes after the handshake, with amqtt as a mere end.
                    return "known" if secure.recv(1) else "unknown"
                except TimeoutError:
                    return "known"
                except OSError:
                    return "unknown"
        except ssl.SSLCertVerificationError:
            return "foreign"
        except ssl.SSLError as error:
            return "unknown" if "ALERT" in (error.reason or "") else "foreign"
        except OSError:
            return "silent"
