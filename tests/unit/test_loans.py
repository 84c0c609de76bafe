"""What is lent to whom, and until when."""

from cloud.loans import Loans

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


def test_an_object_is_lent_to_its_device_alone_and_until_its_time() -> None:
    loans = Loans()
    loans.lend("cam-1", "work", frozenset({A, B}), 10.0)
    assert loans.holds("cam-1", A, 9.9)
    assert not loans.holds("cam-1", A, 10.0)
    assert not loans.holds("cam-1", C, 0.0)
    assert not loans.holds("cam-2", A, 0.0)


def test_the_end_of_one_work_leaves_what_another_one_lent() -> None:
    loans = Loans()
    loans.lend("cam-1", "first", frozenset({A, B}), 10.0)
    loans.lend("cam-1", "second", frozenset({B, C}), 10.0)
    loans.end("cam-1", "second")
    assert loans.objects(0.0) == {A, B}
    loans.end("cam-1", "second")
    assert loans.holds("cam-1", B, 0.0)


def test_a_device_that_was_removed_and_a_time_that_is_over_leave_nothing() -> None:
    loans = Loans()
    loans.lend("cam-1", "first", frozenset({A}), 10.0)
    loans.lend("cam-2", "second", frozenset({B}), 5.0)
    loans.forget("cam-1")
    assert loans.objects(0.0) == {B}
    assert loans.objects(5.0) == frozenset()
