"""Which devices a selector means."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.selector import check_labels, parse_selector
from skills.errors import UsageError


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("all", True),
        ("name=cam-1", True),
        ("name=cam-2", False),
        ("site=north", True),
        ("site=north,arch=aarch64", True),
        (" site = north , arch = aarch64 ", True),
        ("site=north,arch=x86_64", False),
        ("floor=2", False),
    ],
)
def test_every_condition_must_hold(text: str, meant: bool) -> None:
    assert parse_selector(text).matches("cam-1", "aarch64", {"site": "north"}) is meant


@pytest.mark.parametrize("text", ["", "north", "=x", "site=", "site=a=b", "site=a,,b=c", "Site=x", "site=a b", "*"])
def test_another_text_is_refused_with_the_three_forms(text: str) -> None:
    with pytest.raises(UsageError, match="write all, name=NAME or key=value"):
        parse_selector(text)


def test_a_selector_prints_as_it_is_read() -> None:
    assert str(parse_selector(" site=a , arch=b ")) == "site=a,arch=b"
    assert str(parse_selector("all")) == "all"


@given(st.text(max_size=40))
def test_any_text_is_a_selector_or_the_documented_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse_selector(str(parse_selector(text))) == parse_selector(text)


@pytest.mark.parametrize(
    "labels", [{"name": "x"}, {"arch": "x"}, {"a b": "c"}, {"a": ""}, {f"k{n}": "v" for n in range(33)}]
)
def test_labels_that_no_selector_could_name_are_refused(labels: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        check_labels(labels)
