"""Transfers: every chunk is asked for until it came, within the window, whatever gets lost."""

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.fetch import LARGEST_WINDOW, Transfer


@given(st.integers(1, 300), st.sets(st.integers(0, 299)), st.randoms(use_true_random=False))
def test_every_chunk_arrives_whatever_gets_lost_and_what_is_there_is_never_asked_for(count, have, random):
    have = {index for index in have if index < count}
    transfer = Transfer(1, "a" * 64, count, set(have))
    for _ in range(5000):
        if transfer.done:
            break
        need = transfer.need()
        if need is None:
            transfer.idle()
            continue
        asked = [index for first, last in need.ranges for index in range(first, last)]
        assert not have & set(asked)
        assert len(transfer.in_flight) <= LARGEST_WINDOW
        for index in asked:
            if random.random() < 0.6:
                transfer.arrived(index)
    assert transfer.done
    assert transfer.have == set(range(count))


def test_the_window_grows_with_clean_rounds_and_halves_with_an_empty_one():
    transfer = Transfer(1, "a" * 64, 1000, set())
    sizes = []
    for _ in range(6):
        asked = [i for a, b in transfer.need().ranges for i in range(a, b)]
        sizes.append(len(asked))
        for index in asked:
            transfer.arrived(index)
    assert sizes == [4, 6, 9, 13, 16, 16]
    transfer.need()
    transfer.idle()
    assert transfer.window == 8


def test_five_empty_rounds_stall_and_one_chunk_ends_that():
    transfer = Transfer(1, "a" * 64, 10, set())
    for _ in range(5):
        assert not transfer.stalled
        transfer.need()
        transfer.idle()
    assert transfer.stalled
    transfer.arrived(0)
    assert not transfer.stalled


def test_the_wait_for_a_chunk_doubles_up_to_a_minute_and_is_spread():
    transfer = Transfer(1, "a" * 64, 10, set())
    waits = []
    for _ in range(8):
        waits.append(transfer.idle_s(0.0))
        transfer.idle()
    assert waits == [2, 4, 8, 16, 32, 60, 60, 60]
    assert transfer.idle_s(1.0) == 75
