"""Zstandard in pieces: however the frame is cut up, the content is the same, and nothing beyond the limit is produced."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skills import zstd
from skills.bundle import WIRE_LEVEL
from skills.errors import FormatError


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@given(st.binary(max_size=3000), st.integers(1, 400), st.integers(1, 20))
def test_every_split_of_a_frame_gives_the_same_content(seed, size, times):
    content = seed * times
    assert b"".join(zstd.decompress_pieces(cut(zstd.compress(content, 3), size), len(content))) == content


def test_content_larger_than_a_piece_comes_in_pieces():
    content = bytes(3 * zstd.PIECE_BYTES + 1)
    pieces = list(zstd.decompress_pieces([zstd.compress(content, 19)], len(content)))
    assert b"".join(pieces) == content
    assert max(map(len, pieces)) <= zstd.PIECE_BYTES


@given(st.binary(max_size=300), st.integers(1, 50))
def test_any_bytes_are_content_or_the_documented_error(data, size):
    with contextlib.suppress(FormatError):
        assert len(b"".join(zstd.decompress_pieces(cut(data, size), 100))) <= 100


def test_content_beyond_the_limit_is_refused_before_it_is_produced():
    produced: list[bytes] = []
    with pytest.raises(FormatError, match="more than the announced 1000000 bytes"):
        produced.extend(zstd.decompress_pieces([zstd.compress(bytes(50 << 20), 3)], 1_000_000))
    assert sum(map(len, produced)) <= 1_000_000


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_frame_that_is_cut_short_or_followed_by_more_is_refused(size):
    wire = zstd.compress(b"some content" * 100, 3)
    for bad in (wire[:-1], wire + b"x", wire + wire, b""):
        with pytest.raises(FormatError, match=r"cut short|behind it"):
            list(zstd.decompress_pieces(cut(bad, size), 2000))


def test_a_frame_that_wants_a_window_larger_than_every_decoder_has_is_refused():
    module = zstd._module()
    wire = module.compress(bytes(32 << 20), options={module.CompressionParameter.window_log: zstd.WINDOW_LOG + 1})
    with pytest.raises(FormatError, match="damaged"):
        list(zstd.decompress_pieces([wire], 32 << 20))
    with pytest.raises(FormatError, match="damaged"):
        zstd.decompress(wire, 32 << 20)


@pytest.mark.parametrize("level", [1, WIRE_LEVEL])
def test_what_is_compressed_here_asks_for_no_larger_window(level):
    content = bytes(20 << 20)
    assert zstd.decompress(zstd.compress(content, level), len(content)) == content
