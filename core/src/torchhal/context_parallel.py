"""``with context_parallel(mesh)``: attention whose sequence is sharded over the ranks of a process group."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from torchhal import _offsets, scope
from torchhal.errors import InvalidProblem
from torchhal.problems import ContextParallelProblem, Plan
from torchhal.registry import registry
from torchhal.selection import select

AUTO: Final = "auto"

_EAGER: Final = "context-parallel attention runs its collectives eagerly, between compiled graphs"


@dataclass(frozen=True, eq=False)
class AttentionArguments:
    """The arguments of one ``torchhal.attention`` call on this rank, as the caller gave them.

    ``query`` (B, Hq, L, E), ``key`` (B, Hkv, S, E) and ``value`` (B, Hkv, S, Ev) are this rank's shards.
    ``attn_mask`` is broadcastable to (B, Hq, L, all keys): this rank's rows, every rank's columns.
    ``block_mask`` covers the whole sequence, and ``score_mod`` sees positions in the whole sequence.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    score_mod: Callable[..., Any] | None = None
    block_mask: Any = None
    attn_mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    dropout_p: float = 0.0
    return_lse: bool = False
    return_max_scores: bool = False
    backend: str | None = None


@dataclass(frozen=True, eq=False)
class LocalAttention:
    """Attention on one device, with rows and keys counted in the whole sequence: what a scheme is built from."""

    arguments: AttentionArguments
    rank: int
    """This rank in the group."""
    query_lengths: tuple[int, ...]
    """Number of query rows of each rank, in rank order."""
    key_lengths: tuple[int, ...]
    """Number of keys of each rank, in rank order."""

    @property
    def query_offset(self) -> int:
        """Position in the whole sequence of this rank's first query row."""
        return sum(self.query_lengths[: self.rank])

    @property
    def key_offsets(self) -> tuple[int, ...]:
        """Position in the whole sequence of each rank's first key."""
        return tuple(itertools.accumulate(self.key_lengths[:-1], initial=0))

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_offset: int = 0,
        return_lse: bool | None = None,
    ) -> Any:
        """This rank's query rows against the consecutive keys that begin at position ``key_offset``.

        Chosen as any other ``torchhal.attention`` call, so the fastest installed kernel serves it.

        Args:
            query: (B, Hq, L, E), all of this rank's rows.
            key: (B, Hkv, S, E), keys ``key_offset`` to ``key_offset + S`` of the whole sequence.
            value: (B, Hkv, S, Ev).
            key_offset: position of the first of these keys.
            return_lse: overrides the caller's, for schemes that merge partial results.

        Returns:
            ``out`` (B, Hq, L, Ev), or ``(out, lse)`` with lse (B, Hq, L).
        """
        from torchhal.attention import attention

        given = self.arguments
        part = _offsets.locate(
            query,
            key,
            query_offset=self.query_offset,
            key_offset=key_offset,
            score_mod=given.score_mod,
            block_mask=given.block_mask,
            attn_mask=given.attn_mask,
            is_causal=given.is_causal,
        )
        with scope.changed(context_parallel=None):
            result = attention(
                part.query,
                key,
                value,
                score_mod=part.score_mod,
                block_mask=part.block_mask,
                attn_mask=part.attn_mask,
                is_causal=part.is_causal,
                scale=given.scale,
                enable_gqa=given.enable_gqa,
                dropout_p=given.dropout_p,
                return_lse=given.return_lse if return_lse is None else return_lse,
                backend=given.backend,
            )
        return part.own_rows(result)


@dataclass(frozen=True)
class ContextParallelBlock:
    """What is active inside a ``with context_parallel(...)`` block: hashable, so that it can stand in a guard."""

    plan: Plan
    group: Any
    """The ``torch.distributed.ProcessGroup``."""
    attention: Callable[[AttentionArguments], Any] = field(init=False)
    """This rank's rows of attention over the whole sequence, a break in a compiled graph."""

    def __post_init__(self) -> None:
        # Made here and not by a decorator: torch.compiler.disable imports Dynamo, 0.8 s that `import torchhal` has not.
        eager = torch.compiler.disable(self._attention, reason=_EAGER)  # type: ignore[no-untyped-call]
        object.__setattr__(self, "attention", eager)

    def _attention(self, arguments: AttentionArguments) -> Any:
        """This rank's rows of attention over the whole sequence; every rank of the group has to call it.

        Returns:
            ``out``, or ``(out, lse)`` when ``arguments.return_lse``.

        Raises:
            InvalidProblem: on every rank, when the shards of any two ranks do not fit together.
        """
        from torchhal import _shards

        lengths = _shards.exchange(arguments, self.group)
        call = LocalAttention(arguments, dist.get_rank(self.group), lengths.query, lengths.key)
        return self.plan.run(call, arguments.query, arguments.key, arguments.value, self.group)


@contextmanager
def context_parallel(mesh: Any, *, scheme: str = AUTO, backend: str | None = None) -> Iterator[None]:
    """Inside the block, ``torchhal.attention(query, key, value, ...)`` spans the ranks of ``mesh``.

    Query, key and value are this rank's shards along the sequence (dim 2), in rank order; lengths may differ
    from rank to rank, and may be zero. The result is this rank's rows of attention over the whole sequence,
    and gradients reach each rank's shards. The other arguments mean:

    - ``is_causal``, ``score_mod``, ``block_mask``: positions are those of the whole sequence; a ``BlockMask``
      is created for the whole sequence, the same on every rank;
    - ``attn_mask``: broadcastable to (B, Hq, this rank's rows, all keys);
    - ``dropout_p``: each rank draws from its own torch generator, so ranks that seed alike drop alike: seed
      each rank differently, for example ``torch.manual_seed(seed + rank)``;
    - gradients of tensors that ``score_mod`` captures are this rank's share; sum them over the ranks as for
      any replicated parameter.

    Every rank has to make the same calls in the same order, and run backward if any does. The block belongs to
    this thread: a region under activation checkpointing, which is run again during backward, has to contain
    the block. Blocks do not nest. Under torch.compile the call is a graph break.

    Args:
        mesh: a one-dimensional ``DeviceMesh``, or a ``ProcessGroup``.
        scheme: ``auto``, or a scheme that an installed backend brings, such as ``all_gather``.
        backend: name of the backend that runs the scheme; the attention inside is chosen by itself.

    Raises:
        InvalidProblem: torch.distributed is not initialised, the mesh has another rank, this process is not in
            it, the scheme is unknown, or a block is already active.
        Unsupported: no backend the policy allows runs the scheme; carries everyone's reason.
    """
    _refuse_nesting()
    group, device = _group_and_device(mesh)
    _check_scheme(scheme)
    problem = ContextParallelProblem(
        device=device,
        scheme=scheme,
        world_size=dist.get_world_size(group),
        process_group_backend=dist.get_backend(group),
    )
    selected = select(problem, backend)
    selected.record()
    assert selected.plan is not None, selected
    with scope.changed(context_parallel=ContextParallelBlock(selected.plan, group)):
        yield


def known_schemes() -> list[str]:
    """Every scheme that can be asked for by name with the installed backends."""
    claims = (b.info.capabilities.context_parallel for b in registry().backends.values())
    return sorted({AUTO}.union(*(claim.schemes for claim in claims if claim is not None)))


# ---------------------------------------------------------------------------- checks


def _refuse_nesting() -> None:
    if scope.active_context_parallel() is not None:
        raise InvalidProblem(
            "context_parallel() blocks do not nest: the sequence is already sharded over the mesh of the block "
            "around this one. Leave that block first, or use one mesh for both."
        )


def _check_scheme(scheme: str) -> None:
    known = known_schemes()
    if scheme not in known:
        raise InvalidProblem(
            f"context_parallel() expects a scheme out of {', '.join(known)} and got {scheme!r}"
        )


def _group_and_device(mesh: Any) -> tuple[Any, torch.device]:
    if not (dist.is_available() and dist.is_initialized()):
        raise InvalidProblem(
            "context_parallel() needs torch.distributed, which is not initialised in this process; call "
            "torch.distributed.init_process_group(...) or start the program with torchrun first"
        )
    if isinstance(mesh, dist.ProcessGroup):
        return _member_group(mesh), _device_of(mesh)
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise InvalidProblem(
            f"context_parallel() expects a one-dimensional DeviceMesh or a ProcessGroup and got {mesh!r}; for example "
            f"torch.distributed.device_mesh.init_device_mesh('cpu', ({dist.get_world_size()},))"
        )
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        example = f"mesh[{names[-1]!r}]" if names else "a mesh with mesh_dim_names, and mesh['name']"
        raise InvalidProblem(
            f"context_parallel() expects a one-dimensional DeviceMesh and got one of {mesh.ndim} dimensions "
            f"(shape {tuple(mesh.mesh.shape)}); pass the dimension that shards the sequence: {example}"
        )
    if mesh.get_coordinate() is None:
        raise InvalidProblem(_not_a_member(mesh.mesh.tolist()))
    return mesh.get_group(), torch.device(mesh.device_type)


def _member_group(group: Any) -> Any:
    if dist.get_rank(group) < 0:
        raise InvalidProblem(_not_a_member(dist.get_process_group_ranks(group)))
    return group


def _not_a_member(ranks: Any) -> str:
    return f"rank {dist.get_rank()} is not among the ranks {ranks} of the mesh; only members may enter context_parallel()"


def _device_of(group: Any) -> torch.device:
    """Where the group computes: the accelerator if it serves it alone, else the CPU."""
    served = {pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")}
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type in served and "cpu" not in served:
        return torch.device(accelerator.type)
    return torch.device("cpu")
