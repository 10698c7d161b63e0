"""What a backend may claim in advance, family by family: one question for each field, and no until it is answered.

:class:`torchhal.problems.Capabilities` gathers them, and a Problem's features are named after their fields.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionClaims:
    """What a backend's attention does. Every answer is no until claimed."""

    dtypes: frozenset[torch.dtype] = frozenset()
    """Which element types may query, key and value have?"""
    layouts: frozenset[str] = frozenset()
    """Which of ``dense``, ``varlen`` and ``paged`` are served?"""
    causal: bool = False
    """Does ``is_causal`` hide keys after the query, aligned top-left?"""
    boolean_mask: bool = False
    """Does a boolean ``attn_mask`` of any broadcastable shape and strides hide where False?"""
    additive_mask: bool = False
    """Is a floating ``attn_mask`` of any broadcastable shape added to the scaled scores?"""
    gqa: bool = False
    """May there be fewer key heads than query heads, in any whole ratio?"""
    value_head_size: bool = False
    """May the head size of values differ from that of queries and keys?"""
    lse: bool = False
    """Can the natural-logarithm log-sum-exp of each row be returned?"""
    max_scores: bool = False
    """Is each row's largest score, as it enters the softmax, returned after the LSE, and -inf where a row sees no key?"""
    score_mod: bool = False
    """Is a captured function applied to each score, in float32?"""
    mask_mod: bool = False
    """Is a captured mask function applied, and are the empty blocks of its BlockMask skipped?"""
    captured_tensors: bool = False
    """May those functions read captured tensors?"""
    dropout: bool = False
    """Are probabilities dropped by the counter-based generator of the reference?"""
    mixed_dtypes: bool = False
    """May query, key and value have different element types?"""
    quantized_kv: bool = False
    """May keys and values in pages be of an 8-bit type among ``dtypes``, int8 or float8_e4m3fn, with a float32 scale for
    each head or for each token and head?"""
    backward: bool = False
    """Do gradients reach query, key and value?"""
    mask_gradient: bool = False
    """Do gradients reach a floating ``attn_mask``?"""
    captured_gradient: bool = False
    """Do gradients reach captured tensors?"""


@dataclass(frozen=True)
class MatmulClaims:
    """What a backend's fused matrix product does."""

    dtypes: frozenset[torch.dtype] = frozenset()
    batched: bool = False
    """May ``a`` and ``b`` have broadcastable batch dimensions?"""
    bias: bool = False
    """Is a bias of shape (N,) added before the epilogue?"""
    a_prologue: bool = False
    """Is a captured function applied to each element of ``a`` as it is read?"""
    b_prologue: bool = False
    """Is a captured function applied to each element of ``b`` as it is read?"""
    epilogue: bool = False
    """Is a captured function applied to each accumulated element before it is stored?"""
    auxiliary_outputs: bool = False
    """May the epilogue return several outputs?"""
    captured_tensors: bool = False
    """May those functions read captured tensors?"""
    packed_int8: bool = False
    """Is an int8 packed weight dequantised inside the product?"""
    packed_int4: bool = False
    """Is an int4 packed weight dequantised inside the product?"""
    packed_gguf: bool = False
    """Are blocks of a GGUF file (q4_0, q4_1, q8_0) dequantised inside the product?"""
    mixed_dtypes: bool = False
    """May ``a`` and ``b`` have different element types?"""
    backward: bool = False
    """Do gradients reach ``a``, ``b`` and ``bias``?"""
    captured_gradient: bool = False
    """Do gradients reach captured tensors?"""


@dataclass(frozen=True)
class ForeachClaims:
    """What a backend's foreach_map does."""

    dtypes: frozenset[torch.dtype] = frozenset()
    in_place: bool = False
    """May results be written over operands or into ``out``?"""
    scalars: bool = False
    """May operands be numbers or lists of numbers?"""
    mixed_dtypes: bool = False
    """May element types vary along the lists?"""
    several_outputs: bool = False
    """May the function return a tuple?"""
    captured_tensors: bool = False
    """May the function read captured tensors?"""
    backward: bool = False
    """Do gradients reach the operands?"""
    captured_gradient: bool = False
    """Do gradients reach captured tensors?"""
    reduction: bool = False
    """Are results summed, or their largest or any true one taken, at each position, whatever the number of threads in one
    order?"""


@dataclass(frozen=True)
class ContextParallelClaims:
    """What a backend's context parallelism does."""

    schemes: frozenset[str] = frozenset()
    """Which schemes, besides ``auto``, can be asked for by name?"""


@dataclass(frozen=True)
class CacheStoreClaims:
    """Which cache stores a backend brings."""

    schemes: frozenset[str] = frozenset()
    """Which URL schemes are served?"""


@dataclass(frozen=True)
class DeployClaims:
    """Which deployment tasks a backend serves."""

    tasks: frozenset[str] = frozenset()
    """Which of ``compile_options``, ``quantizer``, ``package`` and ``profiler``?"""
