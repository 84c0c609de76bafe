"""The one door to Zstandard (RFC 8878): the standard library's from Python 3.14 on, its backport before."""

from typing import Any

from skills.errors import FormatError


def compress(data: bytes | memoryview, level: int) -> bytes:
    """Return one zstd frame that announces its content size."""
    return bytes(_module().compress(data, level))


def decompress(data: bytes | memoryview, max_bytes: int) -> bytes:
    """Return the content of one zstd frame, of at most `max_bytes`; nothing beyond the limit is ever produced.

    Raises:
        FormatError: not one whole frame, or its content is larger.
    """
    zstd = _module()
    try:
        decompressor = zstd.ZstdDecompressor()
        content = decompressor.decompress(bytes(data), max_bytes + 1)
    except zstd.ZstdError as error:
        raise FormatError(f"compressed data is damaged: {error}") from None
    if len(content) > max_bytes or (len(content) == max_bytes and not decompressor.eof):
        raise FormatError(f"compressed data unpacks to more than the announced {max_bytes} bytes")
    if not decompressor.eof or decompressor.unused_data:
        raise FormatError("compressed data is cut short or has something behind it")
    return bytes(content)


def _module() -> Any:
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        from backports import zstd
    return zstd
