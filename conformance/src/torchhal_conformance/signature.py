"""Who answers for a report: an Ed25519 signature (RFC 8032) of its bytes, in a file beside it.

``openssl genpkey -algorithm ed25519 -out key.pem`` makes a key. Needs the package ``cryptography``, the extra ``sign``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ALGORITHM = "ed25519"


class SignatureError(ValueError):
    """A key or a signature is missing, damaged or somebody else's."""


def path_of(report: Path) -> Path:
    """Where the signature of a report lies."""
    return report.with_name(report.name + ".sig")


def sign(report: Path, key: Path) -> str:
    """Sign a report with a private key in PEM form; returns the public key, as verifiers name it.

    Raises:
        SignatureError: the file holds no Ed25519 private key without a password.
    """
    ed25519, serialization = _cryptography()
    try:
        private: Any = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise SignatureError(f"{key} holds no private key in PEM form without a password: {error}") from error
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise SignatureError(
            f"{key} holds a key of another kind; make one with `openssl genpkey -algorithm ed25519`"
        )
    public = private.public_key().public_bytes_raw().hex()
    content = {
        "algorithm": ALGORITHM,
        "public_key": public,
        "signature": private.sign(report.read_bytes()).hex(),
    }
    path_of(report).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return f"{ALGORITHM}:{public}"


def signer(report: Path) -> str | None:
    """The public key that signed a report as it is now; None where there is no signature.

    Raises:
        SignatureError: there is one, and it is not of these bytes, or is damaged.
    """
    path = path_of(report)
    if not path.exists():
        return None
    ed25519, _ = _cryptography()
    from cryptography.exceptions import InvalidSignature

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(content["public_key"]))
        signature = bytes.fromhex(content["signature"])
        if content["algorithm"] != ALGORITHM:
            raise ValueError(f"the algorithm is {content['algorithm']!r}, expected {ALGORITHM!r}")
        key.verify(signature, report.read_bytes())
    except InvalidSignature:
        raise SignatureError(
            f"the signature {path} is not of this report: one of the two was changed"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise SignatureError(f"{path} is no signature: {error}") from error
    return f"{ALGORITHM}:{content['public_key']}"


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise SignatureError(
            f'signatures need the package cryptography ({error}): pip install "torchhal-conformance[sign]"'
        ) from error
    return ed25519, serialization
