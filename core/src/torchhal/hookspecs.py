"""The contract between the core and its backends: the one file a backend author reads first.

A backend is an installed distribution with an entry point in the group ``torchhal.backends``, whose
object (a module or an instance) has functions marked with :data:`hookimpl`. It must implement
``torchhal_backend``; every other hook is optional, and answers one question:

    *Here is a Problem. Do you have a Plan for it, or why do you decline?*

Hooks are called when a plan is first needed, never per call: a Plan is cached for its Problem and its
``run`` is then called directly. A hook may take milliseconds; ``run`` should not waste a microsecond.

Rules common to every hook
    Must
        return a :class:`~torchhal.problems.Plan` that honours *every* field and feature of the problem,
        or a :class:`~torchhal.problems.Decline` with a code and a sentence. Nothing may be dropped,
        approximated or reinterpreted. ``None`` is read as "does not serve this family".
        promise in the Plan only what holds for every call of the problem: ``deterministic`` (the default),
        ``batch_invariant`` where no row's bits depend on the rest of the batch, ``workspace``. Each promise
        is checked as it is made.
    May
        compile, measure, look at the hardware, keep state of its own, accept keyword arguments in any
        order (pluggy passes by name; arguments that are not needed may be left out); give a Plan ``variants``, other functions
        like ``run`` for ``torchhal tune`` to measure on the user's machine.
    Must not
        touch tensors' data (a problem has none), change global torch state, start threads that outlive
        the call, or raise for a problem it merely can not do.
    Errors
        an exception out of a hook is kept, named with the backend in the Route, and treated as a decline
        with the code ``hook_error``; it never takes another backend down.

The specification has a version, :data:`~torchhal.problems.SPEC_VERSION`. A feature added later is a new
claim whose default is no, so the core declines on behalf of an older backend: it can not drop an
argument it has never heard of. An unknown hook name or argument is a load failure.
"""

# mypy: disable-error-code="empty-body"

from __future__ import annotations

from typing import Final

import pluggy

from torchhal.problems import (
    AttentionProblem,
    BackendInfo,
    CacheStoreProblem,
    ContextParallelProblem,
    Decline,
    DeployProblem,
    ForeachProblem,
    MatmulProblem,
    Plan,
)

PROJECT: Final = "torchhal"
"""pluggy project name; also the entry-point group is ``torchhal.backends``."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a plugin as an implementation: ``@torchhal.hookimpl``."""


@hookspec
def torchhal_backend() -> BackendInfo:
    """Who are you, what do you claim, and which hardware do you see?

    When called
        once, when the plugin is loaded; on every machine, with or without the hardware.
    Must
        return quickly (well under 100 ms) and without touching a device; the ``probe`` inside the
        answer looks at the hardware later, when asked. Claims are what the code can do on suitable
        hardware; whether this machine is suitable is decided by each hook, with a Decline.
    Errors
        an exception, a name that differs from the entry point's, or a specification range that excludes
        this core makes a load failure, shown by ``torchhal doctor`` and quoted wherever it could matter.
    Reference
        :mod:`torchhal.reference.plugin`.
    Checked by
        ``contract.identity``, ``contract.claims``.
    """


@hookspec
def torchhal_attention(problem: AttentionProblem) -> Plan | Decline | None:
    """Can you compute this attention?

    ``Plan.run(query, key, value, attn_mask, scale, operands)`` returns ``out``, ``(out, lse)`` when
    ``problem.return_lse``, or ``(out, lse, max_scores)`` when ``problem.return_max_scores``. Shapes by ``problem.layout``:

    ========  ================================  =====================================================
    layout    query; key, value                 ``operands`` (:class:`torchhal.operands.AttentionOperands`)
    ========  ================================  =====================================================
    dense     (B, Hq, L, E); (B, Hkv, S, E|Ev)  None, or with the mods' tensors
    varlen    (T, Hq, E); (Tk, Hkv, E|Ev)       ``cu_seqlens_q``, ``cu_seqlens_k``: (B + 1,) int32
    paged     (B, Hq, L, E);                    ``page_table`` (B, max_pages) int32, ``seq_lens`` (B,)
              (P, Hkv, page_size, E|Ev)         int32; query row i sits at seq_lens - L + i; with
                                                quantised pages ``key_scale`` and ``value_scale``
    ========  ================================  =====================================================

    Pages of int8 or float8_e4m3fn (the feature ``quantized_kv``; a backend claims the types it reads among its ``dtypes``)
    hold numbers that stand for themselves times a float32 scale: (Hkv,) where ``problem.key_scale`` or
    ``problem.value_scale`` is ``head``, (P, Hkv, page_size) where it is ``token``.

    ``attn_mask`` is None or broadcastable to (B, Hq, L, S); ``scale`` a float; ``operands.captured`` and
    ``operands.mask_captured`` the captured tensors of ``problem.score_mod`` and ``problem.mask_mod`` in
    graph order; ``operands.kv_num_blocks`` and ``operands.kv_indices`` (and the ``full_`` pair) the
    BlockMask; ``operands.dropout_p`` and ``operands.seed`` (a 0-dim int64 tensor) the dropout.

    When called
        once for each distinct problem, on a plan-cache miss.
    Must
        accumulate in float32 or wider; give 0 and an LSE of -inf to rows that see no key; never let the
        data of a hidden key or an unused page slot, or its scale, reach the output, NaN included; return the LSE as a
        natural logarithm, (B, Hq, L) or (T, Hq), float32 (float64 for float64); evaluate ``score_mod``
        on a float32 score (float64 for float64) with int32 indices; hide keys ``j > i`` when
        ``problem.is_causal`` (top-left alignment); accept any strides and lengths, zero included.
    May
        choose the memory layout of ``out``, as long as its shape is the query's with the value's head size.
    Errors
        ``run`` may raise for data it can not accept (a page index out of range), as
        :class:`~torchhal.errors.InvalidProblem`.
    Reference
        :func:`torchhal.reference.attention.attention`.
    Checked by
        ``attention.*``.
    """


@hookspec
def torchhal_matmul(problem: MatmulProblem) -> Plan | Decline | None:
    """Can you compute this fused matrix product?

    ``Plan.run(a, b, bias, operands)`` with a (..., M, K), b (..., K, N) or a packed weight of logical shape (K, N),
    bias (N,) or None, and ``operands`` (:class:`torchhal.operands.MatmulOperands`) with the captured tensors of each
    function; returns a tuple with one tensor (..., M, N) for each output of the epilogue, in ``problem.out_dtypes``.

    Of a packed weight ``problem.packing`` is the scheme: a :class:`torchhal.operands.PackedWeight` (the features
    ``packed_int8`` and ``packed_int4``) or a :class:`torchhal.operands.GGUFWeight` (``packed_gguf``). Its elements are those
    that their docstrings say, in float32 (float64 for float64), never rounded to the weight's own type.

    Functions take ``(value)`` or ``(value, batch, row, col)``, int32 indices counted in the operand they
    apply to (``a``: row m, col k; ``b``: row k, col n; epilogue: row m, col n). Prologues see the element
    in float32 (float64 for float64); the epilogue sees the accumulated sum plus bias, unrounded.

    When called
        once for each distinct problem, on a plan-cache miss.
    Must
        accumulate in float32 or wider, round once at the store; give ``epilogue(bias)`` for K = 0; name in
        ``Plan.unfused`` each prologue, bias, epilogue or dequantisation of the problem that is done in a pass of its own
        over a whole operand or result: a call with ``fusion="require"`` then goes to another backend.
    May
        move factors that commute with the product between prologue and epilogue; give ``Plan.bind``, which prepares products
        with packed weights that layers ask for again and again.
    Reference
        :func:`torchhal.reference.matmul.matmul`.
    Checked by
        ``matmul.*``.
    """


@hookspec
def torchhal_foreach(problem: ForeachProblem) -> Plan | Decline | None:
    """Can you map this function over lists of tensors?

    ``Plan.run(operands, captured, out)``: ``operands`` one entry for each of ``problem.operands`` (a list
    of tensors, a list of numbers, or one number or 0-dim tensor), ``captured`` the function's 0-dim captured
    tensors, ``out`` None or a tuple of lists of destination tensors; returns a tuple with a list of
    tensors for each output of the function. Tensors at the same position broadcast together. With
    ``problem.reduction`` these are 0-dim: what :func:`torchhal.reference.foreach.reduce` makes of each result.

    When called
        once for each distinct problem, on a plan-cache miss.
    Must
        give exactly what the function gives tensor by tensor in torch; leave operands alone unless they
        are in ``out``; accept empty tensors and lists of any length.
    Reference
        :func:`torchhal.reference.foreach.foreach_map`.
    Checked by
        ``foreach.*``.
    """


@hookspec
def torchhal_context_parallel(problem: ContextParallelProblem) -> Plan | Decline | None:
    """Can you run attention with its sequence sharded over these ranks?

    ``Plan.run(call, query, key, value, group)``, on every rank of the process group ``group``: query, key and value are this rank's
    shards along the sequence, in rank order, of lengths that may differ; ``call``
    (:class:`torchhal.context_parallel.LocalAttention`) runs attention on one device with a given offset of
    the query rows; returns ``out``, or ``(out, lse)``, for this rank's query rows.

    When called
        once for each distinct problem, when a ``with context_parallel(...)`` block is entered.
    Must
        equal attention over the whole sequence, gradients included; work for uneven shards.
    Reference
        :func:`torchhal.reference.context_parallel.all_gather_attention`.
    Checked by
        ``context_parallel.*``.
    """


@hookspec
def torchhal_cache_store(problem: CacheStoreProblem) -> Plan | Decline | None:
    """Can you keep compile caches at URLs of this scheme?

    ``Plan.run(url)`` opens the place and returns a :class:`torchhal.cache.CacheStore`.

    When called
        by ``torchhal.cache_store(url)``.
    Must
        make ``put`` atomic (a reader sees the old value, the new one, or none), report corruption instead
        of returning altered bytes, and be safe with several processes.
    Reference
        :class:`torchhal.reference.cache.FileStore`.
    Checked by
        ``cache_store.*``.
    """


@hookspec
def torchhal_deploy(problem: DeployProblem) -> Plan | Decline | None:
    """Can you help to deploy on this device?

    ``Plan.run`` by ``problem.task``:

    - ``compile_options``: ``run() -> dict[str, object]``, options for ``torch.compile(options=...)``;
    - ``quantizer``: ``run() -> Quantizer``, a PT2E quantizer for ``torch.export`` programs;
    - ``package``: ``run(exported_program, path) -> path``, an AOTInductor package;
    - ``profiler``: ``run() -> list[torch.profiler.ProfilerActivity]``.

    When called
        by the functions of :mod:`torchhal.deploy`.
    Must
        decline, naming the distribution to install, where something optional is missing.
    Reference
        :mod:`torchhal.reference.deploy`.
    Checked by
        ``deploy.*``.
    """


FAMILIES: Final = ("attention", "matmul", "foreach", "context_parallel", "cache_store", "deploy")
"""The families a problem can belong to; the seventh hook, ``torchhal_backend``, is about identity."""


def hook_name(family: str) -> str:
    """Name of the hook that serves ``family``."""
    return f"torchhal_{family}"
