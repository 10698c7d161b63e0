"""The reference backend as a plugin: every hook answered by one file of this package, and no logic here.

The families' files are imported when first asked, so that finding the backends stays quick.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any, Final

import torch

from torchhal._checks import QUANTIZED
from torchhal.hookspecs import hookimpl
from torchhal.problems import (
    SPEC_VERSION,
    AttentionClaims,
    AttentionProblem,
    BackendInfo,
    CacheStoreClaims,
    CacheStoreProblem,
    Capabilities,
    ContextParallelClaims,
    ContextParallelProblem,
    Decline,
    DeployClaims,
    DeployProblem,
    ForeachClaims,
    ForeachProblem,
    MatmulClaims,
    MatmulProblem,
    Plan,
)

FLOATS: Final = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
INTEGERS: Final = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool))

ATTENTION: Final = AttentionClaims(
    dtypes=FLOATS | frozenset(QUANTIZED),
    layouts=frozenset(("dense", "varlen", "paged")),
    causal=True,
    boolean_mask=True,
    additive_mask=True,
    gqa=True,
    value_head_size=True,
    lse=True,
    max_scores=True,
    score_mod=True,
    mask_mod=True,
    captured_tensors=True,
    dropout=True,
    mixed_dtypes=True,
    quantized_kv=True,
    backward=True,
    mask_gradient=True,
    captured_gradient=True,
)

MATMUL: Final = MatmulClaims(
    dtypes=FLOATS,
    batched=True,
    bias=True,
    a_prologue=True,
    b_prologue=True,
    epilogue=True,
    auxiliary_outputs=True,
    captured_tensors=True,
    packed_int8=True,
    packed_int4=True,
    packed_gguf=True,
    mixed_dtypes=True,
    backward=True,
    captured_gradient=True,
)

FOREACH: Final = ForeachClaims(
    dtypes=FLOATS | INTEGERS,
    in_place=True,
    scalars=True,
    mixed_dtypes=True,
    several_outputs=True,
    captured_tensors=True,
    backward=True,
    captured_gradient=True,
    reduction=True,
)

CAPABILITIES: Final = Capabilities(
    attention=ATTENTION,
    matmul=MATMUL,
    foreach=FOREACH,
    context_parallel=ContextParallelClaims(schemes=frozenset(("all_gather",))),
    cache_store=CacheStoreClaims(schemes=frozenset(("file", "memory"))),
    deploy=DeployClaims(tasks=frozenset(("compile_options", "quantizer", "package", "profiler"))),
)


def probe() -> Mapping[str, Any]:
    """What ``torchhal doctor`` shows: the reference needs torch and nothing else, so it is always ready."""
    return {
        "status": "ready",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


@hookimpl
def torchhal_backend() -> BackendInfo:
    return BackendInfo(
        name="reference",
        vendor="torchhal",
        device_types=frozenset(),
        spec=f">={SPEC_VERSION},<2",
        capabilities=CAPABILITIES,
        probe=probe,
    )


@hookimpl
def torchhal_attention(problem: AttentionProblem) -> Plan | Decline:
    from torchhal.reference import attention

    return attention.plan(problem)


@hookimpl
def torchhal_matmul(problem: MatmulProblem) -> Plan | Decline:
    from torchhal.reference import matmul

    return matmul.plan(problem)


@hookimpl
def torchhal_foreach(problem: ForeachProblem) -> Plan | Decline:
    from torchhal.reference import foreach

    return foreach.plan(problem)


@hookimpl
def torchhal_context_parallel(problem: ContextParallelProblem) -> Plan | Decline:
    from torchhal.reference import context_parallel

    return context_parallel.plan(problem)


@hookimpl
def torchhal_cache_store(problem: CacheStoreProblem) -> Plan | Decline:
    from torchhal.reference import cache

    return cache.plan(problem)


@hookimpl
def torchhal_deploy(problem: DeployProblem) -> Plan | Decline:
    from torchhal.reference import deploy

    return deploy.plan(problem)
