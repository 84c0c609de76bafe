"""The strict decoder: what goes in comes out, and anything else is one clear error."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Literal

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skills.errors import FormatError
from skills.wire import (
    Limits,
    decode_json,
    decode_yaml,
    encode_json,
    encode_yaml,
    json_schema,
    pack_frame,
    to_plain,
    unpack_frame,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Wheel:
    size: Annotated[int, Limits(min=1, max=99)]
    spokes: float = 1.5


@dataclasses.dataclass(frozen=True, slots=True)
class Cart:
    name: Annotated[str, Limits(pattern="[a-z]+", hint="lower-case letters")]
    wheels: Annotated[tuple[Wheel, ...], Limits(max_items=4)] = ()
    colours: Mapping[str, int] = dataclasses.field(default_factory=dict)
    brake: Literal["hand", "foot"] | None = None
    pair: tuple[int, int] = (1, 2)
    open_: bool = False


wheels = st.builds(Wheel, st.integers(1, 99), st.floats(allow_nan=False, allow_infinity=False))
carts = st.builds(
    Cart,
    st.text("abc", min_size=1),
    st.lists(wheels, max_size=4).map(tuple),
    st.dictionaries(st.text(max_size=5), st.integers()),
    st.sampled_from(["hand", "foot", None]),
    st.tuples(st.integers(), st.integers()),
    st.booleans(),
)


@given(carts)
def test_what_is_encoded_decodes_to_the_same_value_and_fits_its_schema(cart: Cart) -> None:
    assert decode_json(Cart, encode_json(cart), "cart") == cart
    jsonschema.validate(to_plain(cart), json_schema(Cart))


@given(st.text("abc", min_size=1), st.integers(1, 99))
def test_yaml_round_trips_through_a_person_readable_text(name: str, size: int) -> None:
    cart = Cart(name, (Wheel(size),), brake="hand")
    assert decode_yaml(Cart, encode_yaml(cart, "made by hand\nsecond line"), "cart.yaml") == cart


@given(st.binary(max_size=200))
def test_any_bytes_give_a_value_or_the_documented_error(data: bytes) -> None:
    for decode in (lambda: decode_json(Cart, data, "x"), lambda: unpack_frame(data, 100)):
        try:
            decode()
        except FormatError as error:
            assert str(error)


@given(st.text(max_size=200))
def test_any_text_as_yaml_gives_a_value_or_the_documented_error(text: str) -> None:
    try:
        decode_yaml(Cart, text, "x.yaml")
    except FormatError as error:
        assert str(error).startswith("x.yaml")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("name: a\nwheals: []\n", 2, "unknown key 'wheals', did you mean 'wheels'?"),
        ("name: a\nwheels:\n  - size: 3\n  - size: 100\n", 4, "'wheels[1].size' is 100, the most is 99"),
        ("name: A1\n", 1, "'name' is 'A1', expected lower-case letters"),
        ("wheels: []\n", 1, "the document lacks the key 'name'"),
        ("name: a\nbrake: hnad\n", 2, "did you mean 'hand'?"),
        ("name: a\nname: b\n", 2, "the key 'name' stands twice"),
        ("name: a\nopen: 1\n", 2, "'open' is 1, expected true or false"),
        ("name: a\npair: [1]\n", 2, "'pair' has 1 entries, expected 2"),
        ("name: a\nwheels: [{size: yes}]\n", 2, "'wheels[0].size' is True, expected a whole number"),
        ("name: [a\n", 2, "not YAML"),
    ],
)
def test_an_error_names_the_line_and_the_nearest_right_key(text: str, line: int, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        decode_yaml(Cart, text, "cart.yaml")
    assert f"cart.yaml line {line}" in str(caught.value)
    assert said in str(caught.value)


def test_a_document_over_its_limit_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(FormatError, match="the limit is 10"):
        decode_json(Cart, b" " * 11, "cart", max_bytes=10)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(FormatError):
        decode_yaml(Cart, "name: " + "[" * 3000, "cart.yaml")
    with pytest.raises(FormatError):
        decode_json(Cart, b"[" * 100_000, "cart")


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5)), st.binary(max_size=50))
def test_a_frame_comes_apart_as_it_was_packed(header: dict[str, object], body: bytes) -> None:
    head, rest = unpack_frame(pack_frame(header, body), 10_000)
    assert (head, bytes(rest)) == (header, body)


def test_canonical_bytes_do_not_depend_on_the_order_of_keys() -> None:
    assert encode_json({"b": 1, "a": 2}) == b'{"a":2,"b":1}' == encode_json(json.loads('{"a":2,"b":1}'))


def test_yaml_that_nests_deeper_than_any_recursion_is_one_sentence() -> None:
    with pytest.raises(FormatError, match="line 1: nested deeper than"):
        decode_yaml(Cart, "[" * 200_000, "cart.yaml")


def test_yaml_whose_aliases_stand_for_too_much_is_one_sentence() -> None:
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(FormatError, match="more than"):
        decode_yaml(Cart, "\n".join(["l0: &l0 [a, b]", *levels]), "cart.yaml")


def test_a_whole_number_that_no_float_holds_is_one_sentence() -> None:
    with pytest.raises(FormatError, match="expected a number"):
        decode_json(Wheel, '{"size": 1, "spokes": 1' + "0" * 400 + "}", "wheel")
