"""Who may say that a release exists, and what a device may be told to run."""

import dataclasses
import datetime as dt

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from skills import signing
from skills.desired import Assignment, ObjectRef, WantedSkill, open_sealed, seal
from skills.errors import FormatError, TrustError

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
REF = ObjectRef("a" * 64, 10)
TARGET = signing.release_target("digits", "1.0.0")


@pytest.fixture(scope="module")
def keys() -> dict[str, Ed25519PrivateKey]:
    return {name: signing.new_key() for name in ("root", "publisher", "online", "foreign")}


def test_a_list_signed_by_a_listed_key_is_accepted_and_one_by_a_foreign_key_is_not(keys) -> None:
    root = signing.new_root(keys["root"], keys["publisher"], keys["online"], NOW)
    first = signing.new_targets(keys["publisher"], NOW)
    second = signing.add_release(first, TARGET, REF, keys["publisher"], NOW)
    assert signing.check_targets(root, second, first) == {TARGET: REF}
    with pytest.raises(TrustError, match="no key that the repository's root lists"):
        signing.check_targets(root, signing.add_release(first, TARGET, REF, keys["foreign"], NOW), first)


def test_a_release_never_changes_and_never_goes(keys) -> None:
    root = signing.new_root(keys["root"], keys["publisher"], keys["online"], NOW)
    empty = signing.new_targets(keys["publisher"], NOW)
    listed = signing.add_release(empty, TARGET, REF, keys["publisher"], NOW)
    with pytest.raises(TrustError, match="raise the version"):
        signing.add_release(listed, TARGET, ObjectRef("b" * 64, 10), keys["publisher"], NOW)
    dropped = signing.add_release(
        signing.add_release(empty, "x", REF, keys["publisher"], NOW), "y", REF, keys["publisher"], NOW
    )
    with pytest.raises(TrustError, match="changes or drops"):
        signing.check_targets(root, dropped, listed)
    with pytest.raises(TrustError, match="fetch it again"):
        signing.check_targets(root, listed, listed)


def test_metadata_travels_as_one_object(keys) -> None:
    root = signing.new_root(keys["root"], keys["publisher"], keys["online"], NOW)
    targets = signing.new_targets(keys["publisher"], NOW)
    snapshot, timestamp = signing.sign_online(targets, 3, keys["online"], NOW)
    found = signing.unpack_metadata(signing.pack_metadata({1: root}, timestamp, snapshot, targets))
    assert (found.root["1"].encode(), found.targets.encode()) == (root, targets)
    assert signing.metadata_version(timestamp) == 3
    assert signing.metadata_expires(timestamp) == NOW + signing.ONLINE_LIFETIME


def test_a_key_file_is_private_and_comes_back(tmp_path, keys) -> None:
    path = tmp_path / "root.pem"
    signing.save_key(keys["root"], path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert signing.public_pem(signing.load_key(path)) == signing.public_pem(keys["root"])
    path.write_text("not a key")
    with pytest.raises(FormatError, match="no usable key"):
        signing.load_key(path)


WANTED = WantedSkill("digits", "1.0.0", TARGET, REF)
LAST = Assignment("cam-1", 5, 0, REF, (WANTED,))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": "cam-2"}, "is for the device 'cam-2'"),
        ({"counter": 4}, "counter 4, 5 was already accepted"),
        ({"skills": ()}, "without a new counter"),
    ],
)
def test_a_foreign_or_older_assignment_is_refused(keys, change, said) -> None:
    sealed = seal(dataclasses.replace(LAST, **change), keys["online"])
    with pytest.raises(TrustError, match=said):
        open_sealed(sealed, signing.public_pem(keys["online"]), "cam-1", LAST)


def test_the_same_state_with_a_fresh_nonce_is_accepted(keys) -> None:
    fresh = dataclasses.replace(LAST, nonce="n", time=9)
    assert open_sealed(seal(fresh, keys["online"]), signing.public_pem(keys["online"]), "cam-1", LAST) == fresh


def test_an_assignment_of_another_key_is_refused(keys) -> None:
    with pytest.raises(TrustError, match="not signed by this device's controller"):
        open_sealed(seal(LAST, keys["foreign"]), signing.public_pem(keys["online"]), "cam-1", None)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_flipped_byte_of_an_assignment_goes_unnoticed(keys, at: int, flip: int) -> None:
    sealed = bytearray(seal(LAST, keys["online"]))
    sealed[at % len(sealed)] ^= flip
    with pytest.raises((TrustError, FormatError)):
        open_sealed(bytes(sealed), signing.public_pem(keys["online"]), "cam-1", None)
