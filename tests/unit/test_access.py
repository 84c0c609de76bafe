"""Where the command line looks for its controller."""

from pathlib import Path

import pytest

from cloud.access import Access, Flags, check_url, find_access, keep_access
from skills.errors import FormatError, NotFound, UsageError

KEPT = Access("https://kept:8443", "kept-token", "/kept/ca.pem", "/kept/publisher.pem")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return keep_access(KEPT)


def test_a_flag_wins_over_the_environment_and_that_over_the_file(config: Path) -> None:
    environment = {"SKERRY_TOKEN": "env-token", "SKERRY_CA": "/env/ca.pem"}
    assert find_access(Flags(token="flag-token"), environment, config) == Access(
        KEPT.url, "flag-token", "/env/ca.pem", KEPT.key
    )
    assert find_access(Flags(), environment, config).token == "env-token"
    assert find_access(Flags(), {}, config) == KEPT


def test_the_kept_token_is_never_offered_to_another_controller(config: Path) -> None:
    with pytest.raises(UsageError, match="there is no token for https://other:8443"):
        find_access(Flags(url="https://other:8443"), {}, config)


def test_without_any_source_the_message_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="skerry up"):
        find_access(Flags(), {}, tmp_path / "absent.yaml")


def test_the_file_is_readable_by_its_owner_only(config: Path) -> None:
    assert config.stat().st_mode & 0o777 == 0o600


def test_a_damaged_file_is_one_clear_error(config: Path) -> None:
    config.write_text("url: https://kept:8443\ntokn: x\n")
    with pytest.raises(FormatError, match="did you mean 'token'"):
        find_access(Flags(), {}, config)


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://kept:8443", "kept:8443", "https://", "https://x:99999", "https://x/path"]
)
def test_an_address_that_no_controller_could_have_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="expected https://HOST:PORT"):
        check_url(url)
