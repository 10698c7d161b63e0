"""Two containers of compile artifacts: torch's own, read with bounds, and our section around its contents.

A section is ``magic | manifest length (4 bytes) | SHA-256 of manifest | manifest (JSON) | contents``. The manifest
has the fingerprint and, for each artifact, type, key, size and SHA-256; so every byte is under a digest.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Final, NoReturn

from torchhal._fingerprint import Fingerprint
from torchhal.errors import CacheIntegrityError

MAGIC: Final = b"THCACHE1"
FORMAT: Final = 1
MAX_MANIFEST: Final = 64 << 20
"""Bytes; a manifest has about 200 for each artifact."""
_HEADER: Final = len(MAGIC) + 4 + 32
_TORCH_VERSION: Final = 1
"""``_ENCODING_VERSION`` of torch/utils/_appending_byte_serializer.py."""


@dataclass(frozen=True)
class Artifact:
    """One entry of one of torch's caches."""

    kind: str
    """torch's name of the cache: ``inductor``, ``aot_autograd``, ``autotune``, ``pgo``, ``precompile``, ..."""
    key: str
    content: bytes = field(repr=False)

    @cached_property
    def identity(self) -> str:
        """Digest over all three fields."""
        return digest(json.dumps([self.kind, self.key, digest(self.content)]).encode())


@dataclass(frozen=True)
class Section:
    """One verified section."""

    name: str
    fingerprint: Fingerprint
    artifacts: tuple[Artifact, ...]


def digest(data: bytes) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


# ---------------------------------------------------------------------------- our sections


def encode_section(made_in: Fingerprint, artifacts: Sequence[Artifact]) -> bytes:
    """The bytes of a section; equal contents give equal bytes."""
    entries = [
        {"type": a.kind, "key": a.key, "size": len(a.content), "sha256": digest(a.content)} for a in artifacts
    ]
    content = {"format": FORMAT, "fingerprint": made_in.to_dict(), "artifacts": entries}
    manifest = json.dumps(content, sort_keys=True).encode()
    header = MAGIC + len(manifest).to_bytes(4, "big") + hashlib.sha256(manifest).digest()
    return b"".join([header, manifest, *(a.content for a in artifacts)])


def decode_section(name: str, data: bytes) -> Section:
    """The section in ``data``, once every byte is verified; ``name`` is for messages.

    Raises:
        CacheIntegrityError: it is not, or not all of, what :func:`encode_section` wrote.
    """
    if len(data) < _HEADER or not data.startswith(MAGIC):
        _refuse(
            name,
            f"expected a section that begins with {MAGIC!r} and got {len(data)} bytes that begin with {data[:8]!r}",
        )
    size = int.from_bytes(data[len(MAGIC) : len(MAGIC) + 4], "big")
    if size > MAX_MANIFEST or _HEADER + size > len(data):
        _refuse(name, f"its manifest would have {size} bytes, and {len(data) - _HEADER} follow the header")
    manifest = data[_HEADER : _HEADER + size]
    if hashlib.sha256(manifest).digest() != data[len(MAGIC) + 4 : _HEADER]:
        _refuse(name, "the SHA-256 of its manifest does not match")
    try:
        content = json.loads(manifest)
        if content["format"] != FORMAT:
            _refuse(
                name, f"it is of format {content['format']!r} and this version of torchhal reads {FORMAT}"
            )
        made_in = Fingerprint.from_dict(content["fingerprint"])
        artifacts = _contents(name, content["artifacts"], data, _HEADER + size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _refuse(name, f"its manifest is malformed ({type(error).__name__}: {error})")
    return Section(name, made_in, artifacts)


def _contents(name: str, entries: list[dict[str, Any]], data: bytes, start: int) -> tuple[Artifact, ...]:
    artifacts = []
    for entry in entries:
        kind, key, size = str(entry["type"]), str(entry["key"]), int(entry["size"])
        content = data[start : start + size] if size >= 0 else b""
        if size < 0 or len(content) != size:
            _refuse(name, f"it ends before the {size} bytes of its {kind} artifact {key!r}")
        if digest(content) != entry["sha256"]:
            _refuse(name, f"the SHA-256 of its {kind} artifact {key!r} does not match")
        fault = path_fault(key)
        if fault:
            _refuse(name, f"the key {key!r} of an {kind} artifact {fault}")
        artifacts.append(Artifact(kind, key, content))
        start += size
    if start != len(data):
        _refuse(name, f"{len(data) - start} bytes follow its last artifact")
    return tuple(artifacts)


def path_fault(key: str) -> str:
    """Why torch must not use ``key`` as a path in its cache directory; empty when it may."""
    if not key or any(ord(c) < 32 for c in key):
        return "is empty or has control characters"
    if PurePosixPath(key).is_absolute() or PureWindowsPath(key).anchor:
        return "is an absolute path"
    if ".." in PureWindowsPath(key).parts:
        return "leads out of the cache directory"
    return ""


def _refuse(name: str, reason: str) -> NoReturn:
    raise CacheIntegrityError(
        f"the cache section '{name}' can not be trusted: {reason}. Delete it from the store, and compile again"
    )


# ---------------------------------------------------------------------------- torch's container


def parse_torch(data: bytes) -> list[Artifact]:
    """The artifacts of what ``torch.compiler.save_cache_artifacts`` returned, sections of a type joined.

    The layout is CRC-32 | version (8 bytes) | sections; a section is type | count | (key | content) * count;
    strings are base64, and everything has its length before it in 8 bytes, big-endian
    (torch/compiler/_cache.py, torch/utils/_appending_byte_serializer.py).

    Raises:
        CacheIntegrityError: ``data`` is not of that form.
    """
    if len(data) < 12 or zlib.crc32(data[4:]).to_bytes(4, "big") != data[:4]:
        _refuse_torch(f"its CRC-32 does not match its {len(data)} bytes")
    reader = _Reader(data, 4)
    version = reader.number()
    if version != _TORCH_VERSION:
        _refuse_torch(f"it is of version {version} and this version of torchhal reads {_TORCH_VERSION}")
    artifacts = []
    while reader.at < len(data):
        kind = reader.text()
        artifacts += [Artifact(kind, reader.text(), reader.blob()) for _ in range(reader.count())]
    return artifacts


def emit_torch(artifacts: Sequence[Artifact]) -> bytes:
    """A container of torch's with one section for each type, which is all its reader can take."""
    parts = [_TORCH_VERSION.to_bytes(8, "big")]
    for kind in dict.fromkeys(a.kind for a in artifacts):
        same = [a for a in artifacts if a.kind == kind]
        parts += [_sized(base64.b64encode(kind.encode())), len(same).to_bytes(8, "big")]
        for artifact in same:
            parts += [_sized(base64.b64encode(artifact.key.encode())), _sized(artifact.content)]
    body = b"".join(parts)
    return zlib.crc32(body).to_bytes(4, "big") + body


def _sized(data: bytes) -> bytes:
    return len(data).to_bytes(8, "big") + data


class _Reader:
    def __init__(self, data: bytes, at: int) -> None:
        self.data = data
        self.at = at

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            _refuse_torch(f"a length of {size} at byte {self.at} passes its end at {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self) -> int:
        return int.from_bytes(self.take(8), "big")

    def count(self) -> int:
        """How many artifacts follow: each has at least the two lengths of its key and content."""
        count = self.number()
        if count > (len(self.data) - self.at) // 16:
            _refuse_torch(
                f"a count of {count} artifacts at byte {self.at} passes its end at {len(self.data)}"
            )
        return count

    def blob(self) -> bytes:
        return self.take(self.number())

    def text(self) -> str:
        try:
            return base64.b64decode(self.blob(), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            _refuse_torch(f"the name before byte {self.at} is not base64 ({error})")


def _refuse_torch(reason: str) -> NoReturn:
    raise CacheIntegrityError(f"torch's container of compile artifacts can not be read: {reason}")
