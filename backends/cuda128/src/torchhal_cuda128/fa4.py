"""FlashAttention-4: which calls it can serve, and how it is called.

The distribution ``flash-attn-4`` (import name ``flash_attn.cute``) has kernels for Hopper and for data-centre Blackwell, written
in a Python dialect that is compiled when a kernel is first needed. It is optional: without it, the Triton kernels serve.
"""

from __future__ import annotations

from typing import Final

from packaging.specifiers import SpecifierSet

from torchhal.problems import Decline

FAMILIES: Final = frozenset({9, 10})
"""Compute capability majors with kernels here. It has some for 12 too, with mma.sync and without paged keys, split keys and
deterministic gradients; they were never run here, and 12 is not a newer 10."""
VERSIONS: Final = SpecifierSet(">=4.0.0b36,<4.1", prereleases=True)
"""Releases whose functions are those that are called here."""


def unavailable(version: str | None) -> Decline | None:
    """Why an installed version (None: there is none) is not used, or None where it is."""
    if version is None:
        return Decline(
            "fa4_missing",
            "FlashAttention-4 is not installed; it is optional and makes long prefill and training faster",
        )
    if version not in VERSIONS:
        return Decline(
            "fa4_incompatible", f"flash-attn-4 is {version}; this backend was written for {VERSIONS}"
        )
    return None
