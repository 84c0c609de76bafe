"""The one strict decoder: JSON and YAML in, frozen dataclasses out, and back.

A file or message is checked once, here, and is from then on a value whose existence is the proof. An unknown key is an
error that names the line and the nearest right key. Field types: `str int float bool`, `X | None`, `Literal[...]`,
`tuple[X, ...]`, `tuple[X, Y]`, `Mapping[str, X]`, nested dataclasses; `Annotated[X, Limits(...)]` narrows them and
`Annotated[X, Doc("...")]` describes them in the published JSON Schema.
"""

import dataclasses
import difflib
import functools
import itertools
import json
import math
import re
import struct
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from skills.errors import FormatError

MAX_JSON_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_YAML_NODES = 1 << 19  # aliases let a small text stand for very many
MAX_FRAME_HEADER_BYTES = 64 << 10

T = TypeVar("T")
Where = Callable[[tuple[str | int, ...]], str]


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a value: numbers by `min`/`max`/`one_of`, strings by `pattern` (full match), strings and lists by `max_items`."""

    min: float | None = None
    max: float | None = None
    pattern: str | None = None
    max_items: int | None = None
    hint: str = ""
    one_of: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Doc:
    """What a field means, in one sentence for the published schema."""

    text: str


def decode_json(cls: type[T], data: bytes | str, source: str, max_bytes: int = MAX_JSON_BYTES) -> T:
    """Decode one JSON document into `cls`.

    Raises:
        FormatError: too large, not JSON, an unknown or missing key, a value of another type or outside its limits.
    """
    if len(data) > max_bytes:
        raise FormatError(f"{source} has {len(data)} bytes, the limit is {max_bytes}")
    try:
        raw = json.loads(data, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{source} is not JSON: {error}") from None
    return cast("T", _decode(cls, raw, (), lambda path: source + (f" at {_dotted(path)}" if path else "")))


def decode_yaml(cls: type[T], text: str, source: str) -> T:
    """Decode one YAML document into `cls`; every error names `source` and the line.

    Raises:
        FormatError: as for JSON, and where the text is no YAML.
    """
    import yaml

    try:
        _check_depth(text, source)
        node = yaml.compose(text, Loader=_safe_loader())
        raw = None if node is None else _plain(node, source, itertools.count(1))
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise FormatError(f"{source}{line}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FormatError(f"{source} is not YAML: {error}") from None
    if raw is None:
        raise FormatError(f"{source} is empty")

    def where(path: tuple[str | int, ...]) -> str:
        return f"{source} line {_line_of(node, path)}"

    return cast("T", _decode(cls, raw, (), where))


def encode_json(value: object) -> bytes:
    """Return the canonical bytes: sorted keys, no spaces, UTF-8; fields that hold their default are left out."""
    return json.dumps(
        to_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def encode_yaml(value: object, header: str = "") -> str:
    """Return YAML in the order of the fields, below `header` as comment lines."""
    import yaml

    comment = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    text: str = yaml.safe_dump(to_plain(value), sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    return comment + text


def to_plain(value: object) -> Any:
    """Return `value` as JSON's own types, without the fields that hold their default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if field.name == "format" or not _is_default(field, item):
                plain[field.name.rstrip("_")] = to_plain(item)
        return plain
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    return value


def json_schema(cls: type) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of `cls`, for editors and for other languages."""
    definitions: dict[str, Any] = {}
    root = _schema(cls, definitions)
    name = root["$ref"].rsplit("/", 1)[1]
    body = definitions.pop(name)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **body,
        **({"$defs": definitions} if definitions else {}),
    }


def pack_frame(header: Mapping[str, object], body: bytes | memoryview = b"") -> bytes:
    """Join a small JSON header and an opaque body: u32 big-endian header length, header, body."""
    head = json.dumps(header, separators=(",", ":")).encode()
    return b"".join((struct.pack(">I", len(head)), head, body))


def unpack_frame(data: bytes | memoryview, max_bytes: int) -> tuple[dict[str, Any], memoryview]:
    """Split what `pack_frame` joined.

    Raises:
        FormatError: longer than `max_bytes`, cut short, or a header that is no JSON object.
    """
    view = memoryview(data)
    if len(view) > max_bytes:
        raise FormatError(f"a frame of {len(view)} bytes came, the limit is {max_bytes}")
    if len(view) < 4:
        raise FormatError(f"a frame of {len(view)} bytes is too short for its length field")
    (length,) = struct.unpack(">I", view[:4])
    if length > MAX_FRAME_HEADER_BYTES or 4 + length > len(view):
        raise FormatError(f"a frame announces a header of {length} bytes and has {len(view) - 4}")
    try:
        header = json.loads(bytes(view[4 : 4 + length]))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"a frame's header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise FormatError("a frame's header is not a JSON object")
    return header, view[4 + length :]


# --- decoding -------------------------------------------------------------------------------------


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _decode(kind: Any, raw: Any, path: tuple[str | int, ...], where: Where) -> Any:
    if len(path) > MAX_DEPTH:
        raise FormatError(f"{where(path)}: nested deeper than {MAX_DEPTH} levels")
    origin = get_origin(kind)
    if origin is Annotated:
        inner, *notes = get_args(kind)
        value = _decode(inner, raw, path, where)
        for note in notes:
            if isinstance(note, Limits) and value is not None:
                _check_limits(value, note, path, where)
        return value
    if origin in (Union, types.UnionType):
        return _decode_union(get_args(kind), raw, path, where)
    if origin is Literal:
        if raw not in get_args(kind) or isinstance(raw, bool) is not isinstance(get_args(kind)[0], bool):
            allowed = ", ".join(repr(item) for item in get_args(kind))
            raise FormatError(
                f"{where(path)}: {_name(path)} is {_show(raw)}, expected one of {allowed}{_near(raw, get_args(kind))}"
            )
        return raw
    if origin is tuple:
        return _decode_tuple(get_args(kind), raw, path, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(raw, dict):
            raise FormatError(f"{where(path)}: {_name(path)} is {_show(raw)}, expected a mapping")
        return {key: _decode(get_args(kind)[1], item, (*path, key), where) for key, item in raw.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(cast("type", kind), raw, path, where)
    return _decode_scalar(kind, raw, path, where)


def _decode_union(kinds: tuple[Any, ...], raw: Any, path: tuple[str | int, ...], where: Where) -> Any:
    if raw is None and type(None) in kinds:
        return None
    (kind, *others) = [item for item in kinds if item is not type(None)]
    for other in others:
        try:
            return _decode(kind, raw, path, where)
        except FormatError:
            kind = other
    return _decode(kind, raw, path, where)


def _decode_tuple(kinds: tuple[Any, ...], raw: Any, path: tuple[str | int, ...], where: Where) -> tuple[Any, ...]:
    if not isinstance(raw, (list, tuple)):
        raise FormatError(f"{where(path)}: {_name(path)} is {_show(raw)}, expected a list")
    if len(kinds) == 2 and kinds[1] is ...:
        return tuple(_decode(kinds[0], item, (*path, at), where) for at, item in enumerate(raw))
    if len(raw) != len(kinds):
        raise FormatError(f"{where(path)}: {_name(path)} has {len(raw)} entries, expected {len(kinds)}")
    return tuple(
        _decode(kind, item, (*path, at), where) for at, (kind, item) in enumerate(zip(kinds, raw, strict=True))
    )


def _decode_dataclass(cls: type, raw: Any, path: tuple[str | int, ...], where: Where) -> Any:
    if not isinstance(raw, dict):
        raise FormatError(
            f"{where(path)}: {_name(path)} is {_show(raw)}, expected a mapping with the keys of {cls.__name__}"
        )
    fields = {field.name.rstrip("_"): field for field in dataclasses.fields(cls) if field.init}
    for key in raw:
        if key not in fields:
            advice = _near(key, tuple(fields)) or f", expected one of {', '.join(fields)}"
            raise FormatError(f"{where((*path, key))}: unknown key {_show(key)}{advice}")
    values = {}
    for key, field in fields.items():
        if key in raw:
            values[field.name] = _decode(_hints(cls)[field.name], raw[key], (*path, key), where)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise FormatError(f"{where(path)}: {_name(path)} lacks the key '{key}'")
    try:
        return cls(**values)
    except FormatError as error:
        raise FormatError(f"{where(path)}: {error}") from None


def _decode_scalar(kind: Any, raw: Any, path: tuple[str | int, ...], where: Where) -> Any:
    if kind is Any or kind is object:
        return raw
    if kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        try:
            raw = float(raw)
        except OverflowError:
            raise FormatError(f"{where(path)}: {_name(path)} is {_show(raw)}, expected {_KINDS[kind]}") from None
    if type(raw) is not kind or (kind is float and not math.isfinite(raw)):
        raise FormatError(f"{where(path)}: {_name(path)} is {_show(raw)}, expected {_KINDS.get(kind, str(kind))}")
    return raw


_KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _check_limits(value: Any, limits: Limits, path: tuple[str | int, ...], where: Where) -> None:
    if isinstance(value, (int, float)):
        if limits.min is not None and value < limits.min:
            raise FormatError(f"{where(path)}: {_name(path)} is {value}, the least is {limits.min:g}")
        if limits.max is not None and value > limits.max:
            raise FormatError(f"{where(path)}: {_name(path)} is {value}, the most is {limits.max:g}")
        if limits.one_of and value not in limits.one_of:
            allowed = ", ".join(f"{item:g}" for item in limits.one_of)
            raise FormatError(f"{where(path)}: {_name(path)} is {value:g}, expected one of {allowed}")
    if limits.pattern is not None and isinstance(value, str) and not re.fullmatch(limits.pattern, value):
        raise FormatError(f"{where(path)}: {_name(path)} is {_show(value)}, expected {limits.hint or limits.pattern}")
    if limits.max_items is not None and hasattr(value, "__len__") and len(value) > limits.max_items:
        raise FormatError(f"{where(path)}: {_name(path)} has {len(value)} entries, the most is {limits.max_items}")
    if limits.min is not None and hasattr(value, "__len__") and len(value) < limits.min:
        raise FormatError(f"{where(path)}: {_name(path)} has {len(value)} entries, the least is {limits.min:g}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice")
        found[key] = value
    return found


def _dotted(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def _name(path: tuple[str | int, ...]) -> str:
    return f"'{_dotted(path)}'" if path else "the document"


def _show(raw: Any) -> str:
    text = repr(raw)
    return text if len(text) <= 60 else text[:57] + "…"


def _near(word: Any, choices: tuple[Any, ...]) -> str:
    near = difflib.get_close_matches(str(word), [str(choice) for choice in choices], 1, 0.6)
    return f", did you mean {near[0]!r}?" if near else ""


def _is_default(field: "dataclasses.Field[Any]", value: object) -> bool:
    if field.default is not dataclasses.MISSING:
        return bool(value == field.default) and type(value) is type(field.default)
    return field.default_factory is not dataclasses.MISSING and bool(value == field.default_factory())


# --- YAML with lines ------------------------------------------------------------------------------


def _safe_loader() -> Any:
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _check_depth(text: str, source: str) -> None:
    """Look at the nesting before anything recurses: libyaml's composer, in C, would end the process."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=_safe_loader()):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise FormatError(
                f"{source} line {event.start_mark.line + 1 if event.start_mark else 1}: nested deeper than {MAX_DEPTH} levels"
            )


def _plain(node: Any, source: str, seen: "itertools.count[int]", depth: int = 0) -> Any:
    import yaml

    if depth > MAX_DEPTH or next(seen) > MAX_YAML_NODES:
        limit = f"nested deeper than {MAX_DEPTH} levels" if depth > MAX_DEPTH else f"more than {MAX_YAML_NODES} entries"
        raise FormatError(f"{source} line {node.start_mark.line + 1}: {limit}")
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None:
                raise FormatError(f"{source} line {key_node.start_mark.line + 1}: a key must be a plain word")
            if key in found:
                raise FormatError(f"{source} line {key_node.start_mark.line + 1}: the key {key!r} stands twice")
            found[key] = _plain(value_node, source, seen, depth + 1)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, source, seen, depth + 1) for item in node.value]
    constructor = yaml.constructor.SafeConstructor()
    value = constructor.construct_object(node)
    if value is not None and not isinstance(value, (str, int, float, bool)):
        return node.value  # a date or other YAML 1.1 speciality: keep the text as written
    return value


def _line_of(node: Any, path: tuple[str | int, ...]) -> int:
    import yaml

    line = node.start_mark.line + 1
    for part in path:
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                if key_node.value == part:
                    node, line = value_node, key_node.start_mark.line + 1
                    break
            else:
                return int(line)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return int(line)


# --- JSON Schema ----------------------------------------------------------------------------------


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin = get_origin(kind)
    if origin is Annotated:
        inner, *notes = get_args(kind)
        schema = dict(_schema(inner, definitions))
        for note in notes:
            if isinstance(note, Doc):
                schema["description"] = note.text
            elif isinstance(note, Limits):
                schema |= _schema_limits(note, schema.get("type"))
        return schema
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(item, definitions) for item in get_args(kind)]}
    if origin is Literal:
        return {"enum": list(get_args(kind))}
    if origin is tuple:
        kinds = get_args(kind)
        if len(kinds) == 2 and kinds[1] is ...:
            return {"type": "array", "items": _schema(kinds[0], definitions)}
        return {
            "type": "array",
            "prefixItems": [_schema(item, definitions) for item in kinds],
            "minItems": len(kinds),
            "maxItems": len(kinds),
        }
    if origin is not None and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _schema(get_args(kind)[1], definitions)}
    if dataclasses.is_dataclass(kind):
        return _schema_dataclass(cast("type", kind), definitions)
    return {"type": _SCHEMA_TYPES[kind]} if kind in _SCHEMA_TYPES else {}


_SCHEMA_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def _schema_dataclass(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    if cls.__name__ not in definitions:
        body: dict[str, Any] = {"type": "object", "additionalProperties": False}
        definitions[cls.__name__] = body
        if cls.__doc__ and not cls.__doc__.startswith(cls.__name__ + "("):
            body["description"] = cls.__doc__.split("\n\n")[0].replace("\n", " ").strip()
        body["properties"] = {
            f.name.rstrip("_"): _schema(_hints(cls)[f.name], definitions) for f in dataclasses.fields(cls) if f.init
        }
        body["required"] = [
            f.name.rstrip("_")
            for f in dataclasses.fields(cls)
            if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
    return {"$ref": f"#/$defs/{cls.__name__}"}


def _schema_limits(limits: Limits, kind: object) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    if limits.pattern is not None:
        schema["pattern"] = f"^(?:{limits.pattern})$"
    names = {"array": ("minItems", "maxItems"), "string": ("minLength", "maxLength")}.get(
        str(kind), ("minimum", "maximum")
    )
    if limits.min is not None:
        schema[names[0]] = limits.min
    if limits.max is not None:
        schema["maximum"] = limits.max
    if limits.max_items is not None:
        schema[names[1]] = limits.max_items
    if limits.one_of:
        schema["enum"] = list(limits.one_of)
    return schema
