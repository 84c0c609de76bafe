"""How numbers are said to people: one form everywhere. Pure."""


def readable(count: int) -> str:
    """Return bytes as people read them: 812 B, 46.1 kB, 18.6 MB, 1.25 GB."""
    if count < 1000:
        return f"{count} B"
    if count < 999_950:
        return f"{count / 1000:.1f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
