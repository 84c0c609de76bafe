"""How the agent of a data directory is: asked of the running one, else read from its disk."""

import contextlib
import http.client
import json
from pathlib import Path
from typing import Any

from edge_agent.agent import RUN_FILE
from edge_agent.identity import load_identity
from edge_agent.store import Store
from skills.errors import FormatError
from skills.wire import to_plain

DEADLINE_S = 5.0


def read_status(data: Path) -> dict[str, Any]:
    """Return the status as plain values.

    Raises:
        NotFound: the device is not enrolled.
    """
    identity = load_identity(data)
    running = _ask(data)
    if running is not None:
        return running
    store = Store(data)
    skills = []
    for skill in store.skills():
        with contextlib.suppress(FormatError):
            skills.append(to_plain(store.pointer(skill)))
    return {
        "device": identity.device,
        "running": False,
        "controller": identity.controller.url,
        "skills": [
            {
                "skill": pointer["skill"],
                "version": pointer.get("active", {}).get("version"),
                "manifest_sha256": pointer.get("active", {}).get("manifest"),
                "variants": pointer.get("active", {}).get("variants", {}),
                "phase": "stopped",
                "refused": pointer.get("refused", {}),
            }
            for pointer in skills
        ],
    }


def _ask(data: Path) -> dict[str, Any] | None:
    try:
        run = json.loads((data / RUN_FILE).read_bytes())
        connection = http.client.HTTPConnection("127.0.0.1", int(run["port"]), timeout=DEADLINE_S)
        connection.request("GET", "/status")
        answer = json.loads(connection.getresponse().read(1 << 20))
        connection.close()
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return None
    return answer if isinstance(answer, dict) and answer.get("device") == run.get("device") else None
