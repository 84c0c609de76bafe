"""Whom a tail lets in, and how much it takes in at once."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.authority import Authority
from cloud.tail.budget import ByteBudget
from cloud.tail.guard import Allowed, Guard, NotPermitted
from skills.errors import FormatError, NotFound, Refused, TrustError
from skills.files import write_atomic
from skills.wire import encode_json

PLAN, OTHER = "0" * 16, "1" * 16


def test_a_certificate_is_refused_from_the_moment_it_is_revoked(tmp_path: Path, csr: Callable[[], str]) -> None:
    authority = Authority(tmp_path / "ca", ())
    first, second = (authority.certify(csr(), "cam-1") for _ in range(2))
    guard = Guard(crl=authority.crl_file)
    guard.check_certificate(first.cert_pem.encode())
    authority.revoke([first.serial])
    with pytest.raises(TrustError, match="was revoked"):
        guard.check_certificate(first.cert_pem.encode())
    guard.check_certificate(second.cert_pem.encode())


def test_a_device_may_use_what_the_newest_table_gives_it_and_nothing_else(tmp_path: Path) -> None:
    table = tmp_path / "allowed.json"
    write_atomic(table, encode_json(Allowed({"a": {PLAN: ("c1",)}})))
    guard = Guard(allowed=table)
    guard.check("a", PLAN)
    for device, plan in (("a", OTHER), ("b", PLAN), ("", PLAN)):
        with pytest.raises(NotPermitted, match="may not use the plan"):
            guard.check(device, plan)
    write_atomic(table, encode_json(Allowed({"b": {PLAN: ("c1",)}})))  # as long as the one before
    guard.check("b", PLAN)
    with pytest.raises(NotPermitted):
        guard.check("a", PLAN)


def test_a_file_that_cannot_be_read_lets_nobody_in_until_it_can(tmp_path: Path, csr: Callable[[], str]) -> None:
    authority, table = Authority(tmp_path / "ca", ()), tmp_path / "allowed.json"
    pem = authority.certify(csr(), "a").cert_pem.encode()
    write_atomic(table, encode_json(Allowed({"a": {PLAN: ("c1",)}})))
    guard = Guard(authority.crl_file, table)
    questions = {authority.crl_file: lambda: guard.check_certificate(pem), table: lambda: guard.check("a", PLAN)}
    for file, question in questions.items():
        good = file.read_bytes()
        for damage in (lambda path: write_atomic(path, b"{"), os.unlink):
            damage(file)
            with pytest.raises((TrustError, NotPermitted), match="cannot tell"):
                question()
        write_atomic(file, good)
        question()


def test_a_tail_does_not_start_without_the_files_it_is_to_go_by(tmp_path: Path) -> None:
    with pytest.raises((NotFound, FormatError), match="cannot be read"):
        Guard(crl=tmp_path / "crl.pem")
    for damaged in (
        '{"devices": {"a": {"../x": []}}}',
        f'{{"devices": {{"a": {{"{PLAN}": ["c0"]}}}}}}',
        '{"devices": {"a": ["x"]}}',
    ):
        (tmp_path / "allowed.json").write_text(damaged)
        with pytest.raises(FormatError, match="the table of allowed plans"):
            Guard(allowed=tmp_path / "allowed.json")


def test_a_device_may_use_the_cuts_that_the_table_gives_it_and_no_others(tmp_path: Path) -> None:
    table = tmp_path / "allowed.json"
    write_atomic(table, encode_json(Allowed({"a": {PLAN: ("c2", "c1")}, "b": {PLAN: ()}})))
    guard = Guard(allowed=table)
    guard.check("a", PLAN, "c2")
    with pytest.raises(NotPermitted, match=f"a may not use the cut 'input' of plan {PLAN}, allowed are: c1, c2"):
        guard.check("a", PLAN, "input")
    with pytest.raises(NotPermitted, match="allowed are: none"):
        guard.check("b", PLAN, "c1")
    assert guard.plans() == {PLAN}
    assert Guard().plans() is None


@given(st.lists(st.integers(0, 60), max_size=20))
def test_no_more_bytes_are_held_than_the_budget_and_what_is_given_back_can_be_taken(sizes: list[int]) -> None:
    budget, held = ByteBudget(100), []
    for size in sizes:
        if sum(held) + size <= 100:
            budget.take(size)
            held.append(size)
        else:
            with pytest.raises(Refused, match="try again later"):
                budget.take(size)
        assert budget.held == sum(held)
    for size in held:
        budget.give(size)
    budget.take(100)
