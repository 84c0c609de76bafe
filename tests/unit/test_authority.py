"""The CA, certificates and invitations."""

import contextlib
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding

from cloud import authority as module
from cloud.authority import Authority, Invitation, device_id, secret_digest, secret_of
from skills.errors import FormatError, StorageError, UsageError


def test_a_second_start_finds_the_same_authority(tmp_path: Path) -> None:
    first, second = Authority(tmp_path, ["10.0.0.1"]), Authority(tmp_path, ["10.0.0.1"])
    assert first.fingerprint == second.fingerprint
    assert first.server.cert.read_bytes() == second.server.cert.read_bytes()


def test_a_new_address_gets_a_new_server_certificate_from_the_same_authority(tmp_path: Path) -> None:
    first = Authority(tmp_path, [])
    before = first.server.cert.read_bytes()
    second = Authority(tmp_path, ["192.168.7.1", "gate.example"])
    assert second.fingerprint == first.fingerprint
    cert = x509.load_pem_x509_certificate(second.server.cert.read_bytes())
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {str(name.value) for name in names} == {"localhost", "127.0.0.1", "::1", "192.168.7.1", "gate.example"}
    assert before != second.server.cert.read_bytes()


def test_keys_are_for_their_owner_only(tmp_path: Path) -> None:
    Authority(tmp_path / "ca", [])
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "ca").glob("*.key")} == {0o600}
    assert (tmp_path / "ca").stat().st_mode & 0o777 == 0o700


def test_a_crash_between_key_and_certificate_is_mended_at_the_next_start(tmp_path: Path) -> None:
    Authority(tmp_path, [])
    for name in ("ca.pem", "server.pem", "crl.pem"):
        (tmp_path / name).unlink()
    again = Authority(tmp_path, [])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(again.server.cert, again.server.key)
    context.load_verify_locations(again.ca_file)


def test_a_foreign_key_beside_the_certificate_is_said_clearly(tmp_path: Path) -> None:
    Authority(tmp_path / "a", [])
    Authority(tmp_path / "b", [])
    (tmp_path / "a" / "ca.key").write_bytes((tmp_path / "b" / "ca.key").read_bytes())
    with pytest.raises(StorageError, match="restore both from the same backup"):
        Authority(tmp_path / "a", [])


def test_a_device_is_certified_under_its_id_whatever_its_request_says(tmp_path: Path, csr: Callable[[], str]) -> None:
    authority = Authority(tmp_path, [])
    cert = x509.load_pem_x509_certificate(authority.certify(csr(), "cam-1").cert_pem.encode())
    assert [name.value for name in cert.subject] == ["cam-1"]
    cert.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.ca_pem.encode()))
    usage = cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [x509.ExtendedKeyUsageOID.CLIENT_AUTH]
    assert cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False


def test_a_certificate_is_valid_at_any_time_a_board_without_a_clock_may_believe(
    tmp_path: Path, csr: Callable[[], str]
) -> None:
    cert = x509.load_pem_x509_certificate(Authority(tmp_path, []).certify(csr(), "cam-1").cert_pem.encode())
    assert cert.not_valid_before_utc.year == 1970
    assert cert.not_valid_after_utc.year == 9999


@pytest.mark.parametrize(
    "text", ["", "x", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "A" * 9000]
)
def test_what_is_no_request_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(FormatError, match="certificate request"):
        Authority(tmp_path, []).certify(text, "cam-1")


def test_a_request_for_another_kind_of_key_is_refused(tmp_path: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    with pytest.raises(FormatError, match="expected ECDSA P-256"):
        Authority(tmp_path, []).certify(request.public_bytes(Encoding.PEM).decode(), "cam-1")


def test_a_request_that_its_key_did_not_sign_is_refused(tmp_path: Path, csr: Callable[[], str]) -> None:
    request = x509.load_pem_x509_csr(csr().encode())
    der = bytearray(request.public_bytes(Encoding.DER))
    der[-1] ^= 1
    try:
        broken = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM).decode()
    except ValueError:
        pytest.fail("the last byte belongs to the signature")
    with pytest.raises(FormatError, match="not signed by its own key|not a certificate request"):
        Authority(tmp_path, []).certify(broken, "cam-1")


def test_revocations_are_all_in_the_list(tmp_path: Path, csr: Callable[[], str]) -> None:
    authority = Authority(tmp_path, [])
    serials = {authority.certify(csr(), name).serial for name in ("a", "b")}
    authority.revoke(serials)
    crl = x509.load_pem_x509_crl(authority.crl_file.read_bytes())
    assert {f"{entry.serial_number:x}" for entry in crl} == serials
    assert crl.is_signature_valid(x509.load_pem_x509_certificate(authority.ca_pem.encode()).public_key())  # type: ignore[arg-type]


def test_a_list_that_is_read_again_revokes_even_where_the_reader_keeps_the_old_one(
    tmp_path: Path, new_csr: Callable[[], tuple[str, bytes]]
) -> None:
    authority = Authority(tmp_path / "ca", [])
    request, key = new_csr()
    issued = authority.certify(request, "cam-1")
    cert_file, key_file = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert_file.write_text(issued.cert_pem)
    key_file.write_bytes(key)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.verify_mode = ssl.CERT_REQUIRED
    server.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    server.load_cert_chain(authority.server.cert, authority.server.key)
    server.load_verify_locations(authority.ca_file)
    server.load_verify_locations(authority.crl_file)
    client = ssl.create_default_context(cafile=authority.ca_file)
    client.load_cert_chain(cert_file, key_file)
    shake_hands(server, client)
    authority.revoke([issued.serial])
    server.load_verify_locations(authority.crl_file)
    with pytest.raises(ssl.SSLCertVerificationError, match="revoked"):
        shake_hands(server, client)


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (client.wrap_bio(down, up, server_hostname="localhost"), server.wrap_bio(up, down, server_side=True))
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()


@pytest.mark.parametrize("name", ["controller", "all", "server", "A", "a b", "a/b", "+", "-a", "a" * 64, "ü"])
def test_a_name_that_could_confuse_a_topic_or_a_role_is_no_device_id(name: str) -> None:
    with pytest.raises(UsageError, match="is not allowed"):
        device_id(name, "f" * 64)


def test_a_device_without_a_name_is_called_by_its_key() -> None:
    assert device_id(None, "0123456789abcdef" * 4) == "d-0123456789ab"


def test_the_secret_comes_out_of_the_token_and_only_its_digest_is_kept() -> None:
    invitation = Invitation("https://h:1", module.new_secret(), "f" * 64)
    assert secret_of(invitation.token()) == invitation.secret
    assert secret_of(invitation.secret) == invitation.secret
    assert invitation.secret not in secret_digest(invitation.secret)
