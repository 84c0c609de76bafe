"""Which devices: `all`, `name=NAME`, or `k=v,k2=v2` over labels, `arch` and `name` (a comma means *and*). Pure."""

import dataclasses
import re
from collections.abc import Mapping

from skills.errors import UsageError

LABEL_KEY = r"[a-z][a-z0-9_.-]{0,62}"
LABEL_VALUE = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
RESERVED = ("name", "arch", "all")


@dataclasses.dataclass(frozen=True, slots=True)
class Selector:
    """Conditions that a device must all fulfil; no condition means every device."""

    conditions: tuple[tuple[str, str], ...]

    def matches(self, name: str, arch: str, labels: Mapping[str, str]) -> bool:
        """Say whether a device is meant."""
        facts = {**labels, "name": name, "arch": arch}
        return all(facts.get(key) == value for key, value in self.conditions)

    def __str__(self) -> str:
        return ",".join(f"{key}={value}" for key, value in self.conditions) or "all"


def parse_selector(text: str) -> Selector:
    """Read a selector.

    Raises:
        UsageError: not of the form above.
    """
    if text.strip() == "all":
        return Selector(())
    conditions = []
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not re.fullmatch(LABEL_KEY, key) or not re.fullmatch(LABEL_VALUE, value):
            raise UsageError(
                f"the selector {text!r} is not understood at {part.strip()!r}: write all, name=NAME or key=value,key=value"
            )
        conditions.append((key, value))
    return Selector(tuple(conditions))


def check_labels(labels: Mapping[str, str]) -> None:
    """Refuse labels that no selector could name.

    Raises:
        UsageError: a key or value with other characters, a reserved key, or more than 32 labels.
    """
    if len(labels) > 32:
        raise UsageError(f"{len(labels)} labels, the limit is 32")
    for key, value in labels.items():
        if key in RESERVED:
            raise UsageError(f"the label '{key}' is reserved: every device has it already")
        if not re.fullmatch(LABEL_KEY, key) or not re.fullmatch(LABEL_VALUE, value):
            raise UsageError(
                f"the label {key}={value} is not allowed: use letters, digits, '.', '_' and '-' (the key in lower case)"
            )
