"""The containers of compile artifacts: cut, altered, hostile or foreign, nothing of them reaches torch."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchhal import _cache_format as fmt
from torchhal._cache_format import Artifact
from torchhal._fingerprint import fingerprint
from torchhal.errors import CacheIntegrityError

ARTIFACTS = [
    Artifact("inductor", "fabc", b"graph one"),
    Artifact("inductor", "fdef", b""),
    Artifact("autotune", "ab/best_config", b"{}"),
]
SECTION = fmt.encode_section(fingerprint(), ARTIFACTS)

texts = st.text(min_size=1, max_size=12)
artifacts = st.lists(
    st.builds(Artifact, st.sampled_from(["inductor", "pgo", "x"]), texts, st.binary(max_size=40))
)
quick = settings(max_examples=25, deadline=None)


def refused(content: bytes) -> str:
    with pytest.raises(CacheIntegrityError) as caught:
        fmt.decode_section("model/section", content)
    return str(caught.value)


def test_a_section_cut_anywhere_is_refused() -> None:
    for length in range(len(SECTION)):
        assert "the cache section 'model/section' can not be trusted" in refused(SECTION[:length])


@pytest.mark.parametrize("flip", [1, 0x80, 0xFF])
def test_a_section_with_any_byte_changed_is_refused(flip: int) -> None:
    for at in range(len(SECTION)):
        content = bytearray(SECTION)
        content[at] ^= flip
        assert "can not be trusted" in refused(bytes(content)), at


@quick
@given(extra=st.binary(min_size=1, max_size=20))
def test_a_section_with_bytes_after_its_end_is_refused(extra: bytes) -> None:
    with pytest.raises(CacheIntegrityError, match=f"{len(extra)} bytes follow its last artifact"):
        fmt.decode_section("s", SECTION + extra)


@pytest.mark.parametrize(
    "key", ["/etc/passwd", "../up", "a/../../b", "C:\\x", "a\\..\\..\\b", "\\\\host\\x", "a\0b", ""]
)
def test_a_key_that_leads_out_of_the_cache_directory_is_refused(key: str) -> None:
    content = fmt.encode_section(fingerprint(), [Artifact("autotune", key, b"x")])
    assert "of an autotune artifact" in refused(content)


@pytest.mark.parametrize("change", [b'"format": 2', b'"format": null'])
def test_another_format_is_refused_by_number(change: bytes) -> None:
    size = int.from_bytes(SECTION[8:12], "big")
    manifest = SECTION[44 : 44 + size].replace(b'"format": 1', change)
    content = SECTION[:8] + len(manifest).to_bytes(4, "big") + hashlib.sha256(manifest).digest() + manifest
    assert "this version of torchhal reads 1" in refused(content + SECTION[44 + size :])


@quick
@given(artifacts)
def test_sections_give_back_what_they_were_made_of(content: list[Artifact]) -> None:
    content = [a for a in content if not fmt.path_fault(a.key)]
    section = fmt.decode_section("s", fmt.encode_section(fingerprint(), content))
    assert list(section.artifacts) == content
    assert section.fingerprint == fingerprint()


# ---------------------------------------------------------------------------- torch's container


@quick
@given(artifacts)
def test_torch_reads_the_container_we_write(content: list[Artifact]) -> None:
    from torch.compiler._cache import CacheArtifactManager

    content = [replace(a, kind="inductor") for a in content]
    read = CacheArtifactManager.deserialize(fmt.emit_torch(content))
    assert read is not None
    assert [(a.key, a.content) for a in read.get("inductor", [])] == [(a.key, a.content) for a in content]


def test_repeated_sections_of_a_type_are_joined_where_torch_drops_the_first() -> None:
    from torch.compiler._cache import CacheArtifactManager

    parts = [fmt.emit_torch([a])[12:] for a in ARTIFACTS[:2]]
    body = (1).to_bytes(8, "big") + b"".join(parts)
    twice = zlib.crc32(body).to_bytes(4, "big") + body
    read = CacheArtifactManager.deserialize(twice)
    assert read is not None
    assert len(read["inductor"]) == 1, "torch has mended its reader; the joining here may go"
    assert fmt.parse_torch(twice) == ARTIFACTS[:2]


@quick
@given(st.binary(max_size=200))
def test_any_bytes_under_a_valid_checksum_are_refused_or_read_and_never_hang(noise: bytes) -> None:
    body = (1).to_bytes(8, "big") + noise
    container = zlib.crc32(body).to_bytes(4, "big") + body
    try:
        content = fmt.parse_torch(container)
    except CacheIntegrityError:
        return
    assert sum(len(a.content) + len(a.key) for a in content) <= len(noise)


@pytest.mark.parametrize("count", [2**63, 10**6])
def test_a_length_past_the_end_is_refused_at_once(count: int) -> None:
    for noise in (count.to_bytes(8, "big"), (4).to_bytes(8, "big") + b"eA==" + count.to_bytes(8, "big")):
        body = (1).to_bytes(8, "big") + noise
        with pytest.raises(CacheIntegrityError, match=f"of {count} .*passes its end"):
            fmt.parse_torch(zlib.crc32(body).to_bytes(4, "big") + body)


def test_a_broken_checksum_and_another_version_are_refused() -> None:
    with pytest.raises(CacheIntegrityError, match="CRC-32 does not match"):
        fmt.parse_torch(b"\0" * 40)
    body = (2).to_bytes(8, "big")
    with pytest.raises(CacheIntegrityError, match="of version 2 and this version of torchhal reads 1"):
        fmt.parse_torch(zlib.crc32(body).to_bytes(4, "big") + body)
