"""A signature holds for the bytes that were signed, by the key that signed them, and for nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, x25519

from torchhal_conformance import signature
from torchhal_conformance.signature import SignatureError


def pem(key: ed25519.Ed25519PrivateKey | x25519.X25519PrivateKey, path: Path) -> Path:
    form = serialization.PrivateFormat.PKCS8
    plain = serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    # The first test vector of RFC 8032, section 7.1.
    secret = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    return pem(ed25519.Ed25519PrivateKey.from_private_bytes(secret), tmp_path / "key.pem")


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "report.jsonl"
    path.write_bytes(b"")
    return path


RFC_PUBLIC = "ed25519:d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
RFC_SIGNATURE = (
    "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
    "d25bf5f0595bbe24655141438e7a100b"
)


def test_the_signature_is_that_of_the_standard(key: Path, report: Path) -> None:
    assert signature.sign(report, key) == RFC_PUBLIC
    assert json.loads(signature.path_of(report).read_text())["signature"] == RFC_SIGNATURE
    assert signature.signer(report) == RFC_PUBLIC


def test_a_report_without_a_signature_has_no_signer(report: Path) -> None:
    assert signature.signer(report) is None


def test_a_changed_report_is_not_signed_any_more(key: Path, report: Path) -> None:
    signature.sign(report, key)
    report.write_bytes(b"\n")
    with pytest.raises(SignatureError, match="is not of this report: one of the two was changed"):
        signature.signer(report)


@pytest.mark.parametrize(
    ("field", "value"),
    [("signature", "00"), ("public_key", "zz"), ("algorithm", "none"), ("signature", None)],
)
def test_a_damaged_signature_is_refused(key: Path, report: Path, field: str, value: object) -> None:
    signature.sign(report, key)
    path = signature.path_of(report)
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(SignatureError):
        signature.signer(report)


def test_a_key_of_another_kind_is_refused_with_the_command_that_makes_one(
    report: Path, tmp_path: Path
) -> None:
    other = pem(x25519.X25519PrivateKey.generate(), tmp_path / "other.pem")
    with pytest.raises(SignatureError, match="openssl genpkey -algorithm ed25519"):
        signature.sign(report, other)
    other.write_text("no key")
    with pytest.raises(SignatureError, match="holds no private key in PEM form"):
        signature.sign(report, other)
