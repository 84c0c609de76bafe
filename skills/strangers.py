"""The guard of our generic package names: `cloud` and `skills` exist on PyPI too, and would install over ours silently."""

import re
from importlib import metadata

from skills.errors import SkerryError

PACKAGES = ("cloud", "compress", "edge_agent", "skills")
_OURS = re.compile(rf"^({'|'.join(PACKAGES)})/__init__\.py,", re.MULTILINE)


def check() -> None:
    """Refuse to go on when another distribution has installed files under one of our package names.

    Raises:
        SkerryError: which distribution, and what to do.
    """
    for distribution in metadata.distributions():
        record = distribution.read_text("RECORD") or ""
        found = _OURS.search(record)
        if found and (name := distribution.metadata["Name"]) != "skerry":
            raise SkerryError(
                f"the distribution {name!r} owns the package {found[1]!r}, which Skerry needs: "
                f"install Skerry in an environment of its own (python -m venv), without {name}"
            )
