"""Memory for what is large comes in large pages where the system gives them, and is a tensor like any other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from torchhal import _memory, paged_cache

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _large_pages_of(tensor: torch.Tensor) -> int:
    """Bytes of large pages in the mappings that hold a tensor."""
    begin, end, found, inside = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(bound, 16) for bound in bounds.groups())
            inside = first < end and begin < last
        elif inside and line.startswith("AnonHugePages:"):
            found += int(line.split()[1]) << 10
    return found


@pytest.mark.skipif(
    not SWITCH.exists() or "[never]" in SWITCH.read_text(), reason="this system gives no large pages"
)
def test_the_pages_of_a_cache_lie_in_large_pages_of_memory() -> None:
    cache = paged_cache.PagedKVCache(pages=1024, page_size=16, kv_heads=8, head_size=128, dtype=torch.float32)
    cache.key_pages.zero_()
    assert _large_pages_of(cache.key_pages) >= cache.key_pages.nbytes // 2, "a scarce machine gives fewer"


@pytest.mark.parametrize("advised", [True, False], ids=["advice is taken", "there is none to give"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 3), (1 << 10, 1 << 11)], ids=str)
def test_a_large_tensor_is_as_torch_makes_it(
    shape: tuple[int, int], advised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not advised:
        monkeypatch.setattr(_memory, "_madvise", lambda: None)
    made = _memory.large(shape, torch.float16)
    plain = torch.empty(shape, dtype=torch.float16)
    assert (made.shape, made.stride(), made.dtype, made.device) == (
        plain.shape, plain.stride(), plain.dtype, plain.device,
    )  # fmt: skip


def test_advice_covers_the_whole_tensor_and_begins_at_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    import mmap

    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    monkeypatch.setattr(_memory, "_madvise", lambda: lambda *given: asked.append(given) or -1)
    made = _memory.large((3, 1 << 20), torch.float32)
    ((begin, length, advice),) = asked
    assert begin % mmap.PAGESIZE == 0
    assert begin <= made.data_ptr()
    assert begin + length == made.data_ptr() + made.nbytes
    assert advice == 14
    _memory.large((1 << 10,), torch.float32)
    _memory.large((1 << 24,), torch.float32, "meta")
    assert len(asked) == 1, "neither what is small nor what is elsewhere"
