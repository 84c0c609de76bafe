"""The one door to Zstandard (RFC 8878): the standard library's from Python 3.14 on, its backport before."""

from collections.abc import Iterable, Iterator
from typing import Any

from skills.errors import FormatError

PIECE_BYTES = 256 << 10
WINDOW_LOG = 23  # 8 MiB: what a decoder should support (RFC 8878, section 3.1.1.1.2), and what level 19 asks for


def compress(data: bytes | memoryview, level: int) -> bytes:
    """Return one zstd frame that announces its content size."""
    return bytes(_module().compress(data, level))


def decompress(data: bytes | memoryview, max_bytes: int) -> bytes:
    """Return the content of one zstd frame, of at most `max_bytes`; nothing beyond the limit is ever produced.

    Raises:
        FormatError: not one whole frame, its content is larger, or it asks for a window of more than 8 MiB.
    """
    zstd = _module()
    try:
        decompressor = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG})
        content = decompressor.decompress(bytes(data), max_bytes + 1)
    except zstd.ZstdError as error:
        raise FormatError(f"compressed data is damaged: {error}") from None
    if len(content) > max_bytes or (len(content) == max_bytes and not decompressor.eof):
        raise FormatError(f"compressed data unpacks to more than the announced {max_bytes} bytes")
    if not decompressor.eof or decompressor.unused_data:
        raise FormatError("compressed data is cut short or has something behind it")
    return bytes(content)


def decompress_pieces(pieces: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    """Yield the content of one zstd frame that comes in pieces, at most `PIECE_BYTES` at once.

    Memory: a piece of each and a window of at most 8 MiB. Whoever takes the content must not use any of it before the end:
    damage may show only there.

    Raises:
        FormatError: not one whole frame, its content is larger than `max_bytes`, or it asks for a larger window.
    """
    zstd = _module()
    decompressor = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG})
    produced = 0
    try:
        for piece in pieces:
            if decompressor.eof:
                raise FormatError("compressed data has something behind it")
            content = decompressor.decompress(piece, PIECE_BYTES)
            while content:
                produced += len(content)
                if produced > max_bytes:
                    raise FormatError(f"compressed data unpacks to more than the announced {max_bytes} bytes")
                yield bytes(content)
                if decompressor.eof:
                    break
                content = decompressor.decompress(b"", PIECE_BYTES)
    except zstd.ZstdError as error:
        raise FormatError(f"compressed data is damaged: {error}") from None
    if not decompressor.eof or decompressor.unused_data:
        raise FormatError("compressed data is cut short or has something behind it")


def _module() -> Any:
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        from backports import zstd
    return zstd
