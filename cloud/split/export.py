"""split.yaml as people read and edit it: what may be edited comes first, every part says what it is."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from skills.split_plan import Plan, Policy
from skills.wire import Doc, to_plain

HEADER = """\
# A split plan: how this model is cut between a device and its tail in the cloud; docs/splitting.md explains every field.
# After an edit, `skerry split check` says in one sentence for each fault what is wrong."""
EDITABLE = (
    "policy", "private", "min_cut", "memory_mb", "network", "slowdown", "device", "max_drop", "metric", "samples",
    "whole", "reply_bytes", "verdicts",
)  # fmt: skip
ALWAYS = (
    "private",
    "min_cut",
    "memory_mb",
    "network",
)  # written even where they are as by default: they invite an edit
WHY = {
    "policy": "How the device decides between requests. Every line may be edited; `pin` makes it keep to one cut.",
    "network": "The link assumed until the device has measured its own.",
    "verdicts": "What the measurements said when the plan was made. Nothing reads this back: it is for you.",
    "model_sha256": (
        "From here on the two sides must agree: the tail knows the plan by a hash over segments, tensors and codings.\n"
        "Of a cut you may edit the measured costs, and `admitted` and `reply` of a coding; nothing else."
    ),
    "cuts": (
        "device_ms, tail_ms: the segments before and behind the cut, each run as a whole. codings: ways to write the tensors\n"
        "that cross, with bytes, milliseconds and the drop against the whole model, in percentage points."
    ),
    "replies": "Ways to write the answer for its way back, which a coding names as its reply; raw where that is sooner.",
    "segments": "The pieces of the model, ONNX files beside this one.",
    "shared": "Constants that several segments use, stored once.",
}


def commented(plan: Plan) -> str:
    """Return the plan as YAML with comments; `load_plan` reads it back as it was."""
    plain = to_plain(plan)
    plain["policy"] = {field.name: to_plain(getattr(plan.policy, field.name)) for field in dataclasses.fields(Policy)}
    plain |= {key: to_plain(getattr(plan, key)) for key in ALWAYS}
    said = _docs(Plan)
    first = [key for key in EDITABLE if key in plain]
    fixed = [key for key in plain if key not in EDITABLE]
    lines = [HEADER]
    for key in (*first, *fixed):
        text = WHY.get(key) or said.get(key, "")
        lines += ["", *(f"# {line}" for line in _sentence(text).splitlines())] if text else [""]
        lines += list(_policy(plain[key])) if key == "policy" else [_yaml({key: plain[key]})]
    return "\n".join(lines) + "\n"


def _policy(values: dict[str, Any]) -> Iterator[str]:
    said = _docs(Policy)
    yield "policy:"
    for key, value in values.items():
        line = f"  {_yaml({key: value})}"
        yield f"{line}  # {said[key]}" if key in said else line


def _docs(cls: type) -> dict[str, str]:
    found = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        for extra in get_args(hint)[1:] if get_origin(hint) is Annotated else ():
            if isinstance(extra, Doc):
                found[name] = extra.text
    return found


def _yaml(value: dict[str, Any]) -> str:
    import yaml

    # Left to itself the library writes a mapping of plain values in braces, which the whole document must not be.
    style = None if any(isinstance(one, (dict, list)) for one in value.values()) else False
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120, default_flow_style=style)
    return text.rstrip("\n")


def _sentence(text: str) -> str:
    whole = text[:1].upper() + text[1:]
    return whole if whole.endswith(".") else f"{whole}."
