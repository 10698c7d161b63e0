"""The attention calls that ``torchhal bench attention`` times, and how they are chosen by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

import torch

from torchhal.bench.backward import Backward
from torchhal.bench.block_mask import TORCH, MakeBlockMask
from torchhal.bench.candidates import FLEX, READ, SDPA, SDPA_DENSE, SDPA_PADDED
from torchhal.bench.cases import Case, Requirement
from torchhal.bench.choice import named
from torchhal.bench.dense import AlibiSoftCap, Dense, Window
from torchhal.bench.first_call import FirstCall
from torchhal.bench.layouts import Documents, PagedDecode

_TYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_SHORT: Final = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_F32_BF16: Final = (torch.float32, torch.bfloat16)


def _each_type(case: Case, types: Iterable[torch.dtype] = _TYPES) -> list[Case]:
    return [replace(case, name=f"{case.name}-{_SHORT[t]}", dtype=t) for t in types]


def _gqa(batch: int, keys: int, name: str) -> Dense:
    needed = (Requirement(READ, 0.8), Requirement(SDPA, 1.6), Requirement(FLEX, 1.6))
    return Dense(
        name, batch=batch, heads=32, kv_heads=8, length=1, keys=keys, head_size=128, requirements=needed
    )


def _paged(batch: int, keys: int) -> PagedDecode:
    needed = (Requirement("own dense", 0.9),)
    return PagedDecode(
        f"paged-decode-b{batch}-s{keys}", batch=batch, heads=32, kv_heads=8, keys=keys, head_size=128,
        requirements=needed,
    )  # fmt: skip


def _quantized(stored: torch.dtype, name: str) -> PagedDecode:
    return PagedDecode(
        f"paged-decode-{name}-b8-s2048",
        batch=8,
        heads=32,
        kv_heads=8,
        keys=2048,
        head_size=128,
        stored=stored,
    )


def _window(name: str, length: int, window: int) -> Window:
    needed = (Requirement(SDPA_DENSE, 8.0),)
    return Window(
        name, heads=8, kv_heads=8, length=length, keys=length, window=window, requirements=needed
    ).against_dense(1.4)  # fmt: skip


def _alibi(size: int) -> AlibiSoftCap:
    needed = (Requirement("own plain", 0.7), Requirement(FLEX, 2.0))
    return AlibiSoftCap(f"alibi-softcap-2048-d{size}", head_size=size, requirements=needed)


def _backward(dtype: torch.dtype, ratio: float) -> list[Case]:
    case = Backward("backward-causal-2048-d64", causal=True, requirements=(Requirement(SDPA, ratio),))
    return _each_type(case, (dtype,))


ATTENTION: Final[tuple[Case, ...]] = (
    *_each_type(Dense("causal-2048-d64", causal=True)),
    *_each_type(Dense("causal-2048-d128", causal=True, head_size=128)),
    *_each_type(Dense("causal-4096-d64", length=4096, keys=4096, causal=True)),
    *_each_type(Dense("causal-4096-d128", length=4096, keys=4096, causal=True, head_size=128)),
    *_each_type(Dense("full-2048-d64")),
    *_each_type(_gqa(8, 2048, "decode-gqa-d128"), _F32_BF16),
    *_each_type(_gqa(1, 8192, "decode-gqa-b1-s8192-d128"), (torch.bfloat16,)),
    *_each_type(_gqa(32, 1024, "decode-gqa-b32-s1024-d128"), (torch.bfloat16,)),
    *_each_type(_paged(8, 2048), _F32_BF16),
    *_each_type(_quantized(torch.int8, "int8"), (torch.bfloat16,)),
    *_each_type(_quantized(torch.float8_e4m3fn, "float8"), (torch.bfloat16,)),
    *_each_type(Dense("causal-8192-d64", heads=8, kv_heads=8, length=8192, keys=8192, causal=True), _F32_BF16),
    *_each_type(Dense("window-mask-2048-d64", windowed=True), _F32_BF16),
    *_each_type(_window("window-512-8192-d64", 8192, 512), _F32_BF16),
    *_each_type(_alibi(128)),
    *_each_type(Documents("documents-d64", requirements=(Requirement(SDPA_PADDED, 2.5),)), _F32_BF16),
    *_backward(torch.float32, 1.1),
    *_backward(torch.bfloat16, 1.6),
    FirstCall("first-call-new-mod", heads=8, kv_heads=8, length=512, keys=512, requirements=(Requirement(FLEX, 100.0),)),
    *(
        MakeBlockMask(
            f"block-mask-{name}-65536",
            length=65536,
            keys=65536,
            window=window,
            requirements=(Requirement(TORCH, 1000.0),),
        )
        for name, window in (("causal", None), ("window", 512))
    ),
    *_each_type(Dense("small-causal-64-d64", heads=8, kv_heads=8, length=64, keys=64, causal=True), _F32_BF16),
    *_each_type(Dense("small-decode-128-d64", heads=9, kv_heads=3, length=1, keys=128), _F32_BF16),
)  # fmt: skip
"""Prefill and decoding as models do them, at lengths where kernels differ; masks, functions, layouts and gradients;
and calls so small that overhead decides."""

LONG_DOCUMENTS: Final = (8192, 6144, 4096, 4096, 3072, 2048, 1536, 1024, 1024, 768, 512, 256)
"""32768 rows in all."""


def _on_accelerators() -> Iterable[Case]:
    """Prefill and gradients of 4 sequences with 16 query heads over 4, decoding with 32 over 8, in bfloat16."""
    few: dict[str, Any] = {"batch": 4, "heads": 16, "kv_heads": 4, "dtype": torch.bfloat16}
    long: dict[str, Any] = {**few, "length": 4096, "keys": 4096}
    decode: dict[str, Any] = {
        "heads": 32,
        "kv_heads": 8,
        "length": 1,
        "head_size": 128,
        "dtype": torch.bfloat16,
    }
    for size in (64, 128):
        for causal, name in ((True, "causal"), (False, "full")):
            yield Dense(f"{name}-4096-d{size}", head_size=size, causal=causal, **long)
            yield Backward(f"backward-{name}-4096-d{size}", head_size=size, causal=causal, **long)
        yield AlibiSoftCap(f"alibi-softcap-4096-d{size}", head_size=size, **long)
        yield Window(
            f"window-1024-8192-d{size}", head_size=size, window=1024, **{**few, "length": 8192, "keys": 8192}
        )
        yield Documents(f"documents-d{size}", head_size=size, lengths=LONG_DOCUMENTS, **{**few, "batch": 1})
    for length in (512, 1024, 2048):
        for causal, name in ((True, "causal"), (False, "full")):
            yield Dense(
                f"{name}-{length}-d128",
                head_size=128,
                causal=causal,
                **{**few, "length": length, "keys": length},
            )
    for batch, keys in ((16, 8192), (1, 32768), (64, 2048)):
        yield Dense(f"decode-gqa-b{batch}-s{keys}", batch=batch, keys=keys, **decode)
    for page in (16, 128):
        yield PagedDecode(f"paged-decode-page{page}-b16-s8192", batch=16, keys=8192, page_size=page, **decode)
    for keys in (256, 1024):
        yield Dense(f"host-decode-b1-s{keys}", keys=keys, **decode)


ACCELERATED: Final[tuple[Case, ...]] = tuple(_on_accelerators())
"""What accelerators are measured on: lengths that fill them, and calls so short that the host decides."""

MEMORY: Final[tuple[Case, ...]] = (
    Dense("causal", heads=8, kv_heads=8, causal=True),
    Window("window-512", heads=8, kv_heads=8, window=512),
    AlibiSoftCap("alibi-softcap", heads=8, kv_heads=8),
)
"""What ``--memory`` measures at several lengths."""


CPU: Final = torch.device("cpu")


def chosen(patterns: str | None, device: torch.device = CPU) -> list[Case]:
    """The cases for a device that :func:`torchhal.bench.choice.named` finds."""
    return named("attention", ATTENTION if device.type == "cpu" else ACCELERATED, patterns)
