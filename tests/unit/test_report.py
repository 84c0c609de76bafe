"""Messages of a device, and topics."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skills import topics
from skills.errors import FormatError
from skills.report import CHUNK_BYTES, Chunk, Need, decode_chunk, encode_chunk


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.binary(max_size=300), st.booleans())
def test_a_chunk_comes_out_as_it_went_in(transfer: int, index: int, data: bytes, gone: bool) -> None:
    chunk = Chunk(transfer, index, data, gone)
    assert decode_chunk(encode_chunk(chunk)) == chunk


@given(st.binary(max_size=60))
def test_any_bytes_are_a_chunk_or_a_format_error(data: bytes) -> None:
    try:
        assert encode_chunk(decode_chunk(data)) == data
    except FormatError as error:
        assert "chunk" in str(error)


def test_a_chunk_over_its_size_is_refused() -> None:
    with pytest.raises(FormatError):
        decode_chunk(encode_chunk(Chunk(1, 1, bytes(CHUNK_BYTES + 1))))


@pytest.mark.parametrize("ranges", [((3, 3),), ((5, 2),), ((0, 65),), ((0, 40), (40, 65))])
def test_a_need_is_bounded(ranges) -> None:
    with pytest.raises(FormatError):
        Need(1, "a" * 64, ranges)


def test_topics_come_apart_as_they_were_made() -> None:
    assert topics.parse_up(topics.up("cam-1", "state")) == ("cam-1", "state")
    assert topics.parse_down(topics.down("cam-1", "blk")) == ("cam-1", "blk")
    for wrong in ("", "sk/1/zz/cam-1/up/state", topics.up("cam-1", "state") + "/x", topics.down("cam-1", "cmd")):
        with pytest.raises(FormatError):
            topics.parse_up(wrong)
