"""Who is measured on a case: our backends, other calls of theirs as yardsticks, and torch's own attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module, metadata
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask

from torchhal.attention_call import Call, build_problem
from torchhal.bench.accuracy import Expectation
from torchhal.bench.cases import OWN, Case, Inputs
from torchhal.problems import AttentionProblem, Decline, Plan
from torchhal.registry import REFERENCE, Backend

SDPA: Final = "torch sdpa"
SDPA_DENSE: Final = "torch sdpa, dense mask"
SDPA_PADDED: Final = "torch sdpa, padded"
SDPA_GATHERED: Final = "torch sdpa, pages gathered"
UNFUSED: Final = "torch, unfused"
FLEX: Final = "torch flex, compiled"
FLEX_FLASH: Final = "torch flex, compiled, flash"
READ: Final = "torch sum, same bytes"
FLASH4: Final = "flash-attn-4"
"""The distribution of FlashAttention-4, and its functions called directly; they align causal calls at the bottom right."""
OF: Final = ":"
"""Between a backend and a variant of its plan, where they are named together."""

_MOST_SCORES: Final = 1 << 30
"""Bytes of scores past which the reference, which keeps them all, is not run."""

Attention = Callable[[], Any]
View = Callable[[Any], Tensor]


def unchanged(result: Any) -> Tensor:
    """The result as it is: (B, Hq, L, Ev)."""
    assert isinstance(result, Tensor), f"expected a tensor and got {type(result).__name__}"
    return result


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case."""

    name: str
    call: Attention | None = None
    view: View = unchanged
    """Brings the result into the shape of the expectation, outside the timed call."""
    ours: bool = False
    """Whether it is a backend of torchhal, not a peer."""
    not_run: str = ""
    """Why there is nothing to call."""
    yardstick: str = ""
    """Of another call of a backend: what requirements call it, ``own dense``; empty for all others."""
    backend: str = ""
    """Whose call it is; empty for peers."""
    expected: Expectation | None = None
    """What a yardstick has to give, where that is not what the case has to."""


Wrap = Callable[[Backend, Attention], Attention]


def _directly(backend: Backend, call: Attention) -> Attention:
    return call


@dataclass(frozen=True)
class Own:
    """A call that our backends are asked to serve: the case's, or with a label another that it is held against."""

    call: Call
    view: View = unchanged
    label: str = ""
    """``dense`` makes it the candidate ``NAME, dense`` and the yardstick ``own dense``."""
    wrap: Wrap = _directly
    """What is timed, from the planned call."""
    expected: Callable[[], Expectation] | None = None

    def problem(self) -> AttentionProblem:
        """The Problem that backends are asked."""
        return build_problem(self.call)

    def candidates(self, case: Case, backend: Backend) -> list[Candidate]:
        """The backend's planned call, or why there is none; and on an accelerator each variant of the plan."""
        name = f"{backend.name}, {self.label}" if self.label else backend.name
        yardstick = OWN + self.label if self.label else ""
        made = functools.partial(Candidate, name, ours=True, yardstick=yardstick, backend=backend.name)
        answer = backend.ask(self.problem())
        if isinstance(answer, Decline):
            return [made(not_run=f"declined: {answer}")]
        if backend.name == REFERENCE and 4 * case.scores > _MOST_SCORES:
            return [made(not_run=f"keeps all scores, {4 * case.scores / 2**30:.1f} GiB here")]
        expected = None if self.expected is None else self.expected()
        found = [made(self._planned(backend, answer), view=self.view, expected=expected)]
        for variant, plan in named_variants(name, answer).items() if answer.variants else ():
            call = self._planned(backend, plan)
            found.append(replace(found[0], name=variant, call=call, yardstick=yardstick and OWN + variant))
        return found

    def _planned(self, backend: Backend, plan: Plan) -> Attention:
        call = self.call
        scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
        given = (call.query, call.key, call.value, call.attn_mask, scale, call.operands)
        return self.wrap(backend, functools.partial(plan.run, *given))


@dataclass(frozen=True)
class Bound:
    """A case with its tensors."""

    own: tuple[Own, ...]
    """The measured call first, then those it is held against."""
    peers: Callable[[bool], list[Candidate]]
    """Torch's equivalents; with True compiled flex_attention too, which takes seconds."""
    expected: Callable[[], Expectation]

    def problem(self) -> AttentionProblem:
        """The Problem of the measured call."""
        return self.own[0].problem()

    def ours(self, case: Case, backend: Backend) -> list[Candidate]:
        """The backend on the case and, where it serves that, on what it is held against."""
        first, *others = (functools.partial(own.candidates, case, backend) for own in self.own)
        found = first()
        return found if found[0].not_run else [*found, *(c for other in others for c in other())]


def named_variants(name: str, plan: Plan) -> dict[str, Plan]:
    """The variants of a backend's plan, as ``backend:variant``; the plan as it is where it comes in none."""
    made = {f"{name}{OF}{variant}": plan.variant(variant) for variant in plan.variants}
    return {key: chosen for key, chosen in made.items() if chosen is not None} or {name: plan}


# ---------------------------------------------------------------------------- peers


def sdpa(inputs: Inputs, mask: Tensor | None = None, is_causal: bool = False) -> Attention:
    """Torch's scaled_dot_product_attention on these tensors."""
    query, key, value, _ = inputs
    grouped = query.shape[1] != key.shape[1]
    return functools.partial(
        F.scaled_dot_product_attention, query, key, value, mask, is_causal=is_causal, enable_gqa=grouped
    )


def each_fused(
    inputs: Inputs, is_causal: bool, wrap: Callable[[Attention], Attention], view: View = unchanged
) -> list[Candidate]:
    """On an accelerator each fused kernel that scaled_dot_product_attention chooses among, and FlashAttention-4 where it is
    installed, directly; what can not serve the call says so when it is run.
    """
    if inputs.query.device.type == "cpu" or inputs.attn_mask is not None:
        return []
    kinds = [kind for kind in SDPBackend.__members__.values() if kind.name.endswith("_ATTENTION")]
    found = [
        Candidate(
            f"{SDPA}, {kind.name.removesuffix('_ATTENTION').lower()}",
            wrap(_by_kernel(kind, inputs, is_causal)),
            view,
        )
        for kind in kinds
    ]
    return [*found, Candidate(FLASH4, wrap(flash4(inputs, is_causal)), view)] if has_flash4() else found


def _by_kernel(kind: SDPBackend, inputs: Inputs, is_causal: bool) -> Attention:
    call = sdpa(inputs, None, is_causal)

    def run() -> Any:
        with sdpa_kernel(kind):
            return call()

    return run


@functools.cache
def has_flash4() -> bool:
    """Whether FlashAttention-4 is installed."""
    try:
        return bool(metadata.version(FLASH4))
    except metadata.PackageNotFoundError:
        return False


def flash4(inputs: Inputs, is_causal: bool) -> Attention:
    """FlashAttention-4 on these tensors, as somebody would call it: its tensors are (B, L, H, D)."""
    query, key, value = (t.transpose(1, 2) for t in inputs[:3])

    def run() -> Any:
        out, *_ = import_module("flash_attn.cute").flash_attn_func(query, key, value, causal=is_causal)
        return out.transpose(1, 2)

    return run


def reading(size: float, device: torch.device) -> Candidate:
    """Reading ``size`` bytes, for calls that memory limits: what it gives in the same run, from a buffer as large."""
    count = max(1, int(size) // 4)
    data = torch.ones(count, device=device)
    total = torch.full((1, 1, 1, 1), float(count), dtype=torch.float64, device=device)
    expected = Expectation(torch.zeros(1, dtype=torch.int64, device=device), total, 1e-4 * count)
    return Candidate(READ, data.sum, view=lambda found: found.view(1, 1, 1, 1), expected=expected)


def causal_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The ``mask_mod`` that hides keys after the query."""
    return q >= k


def flexes(
    inputs: Inputs,
    block_mask: BlockMask | None = None,
    score_mod: Any = None,
    wrap: Callable[[Attention], Attention] = lambda call: call,
    view: View = unchanged,
) -> list[Candidate]:
    """Compiled flex_attention; and on an accelerator with FlashAttention-4 the same by its kernels."""
    found = [Candidate(FLEX, wrap(flex(inputs, block_mask, score_mod)), view)]
    if inputs.query.device.type != "cpu" and has_flash4():
        by_flash = flex(inputs, block_mask, score_mod, {"BACKEND": "FLASH"})
        found.append(Candidate(FLEX_FLASH, wrap(by_flash), view))
    return found


def flex(
    inputs: Inputs,
    block_mask: BlockMask | None = None,
    score_mod: Any = None,
    kernel_options: Any = None,
) -> Attention:
    """Compiled flex_attention on these tensors, compiled anew: a graph for changing shapes would be a slower one."""
    from torch.nn.attention.flex_attention import flex_attention

    query, key, value, _ = inputs
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = query.shape[1] != key.shape[1]
    return functools.partial(
        compiled, query, key, value, score_mod=score_mod, block_mask=block_mask, enable_gqa=grouped,
        kernel_options=kernel_options,
    )  # fmt: skip


def block_mask(mask_mod: Any, inputs: Inputs) -> BlockMask:
    """The BlockMask of a ``mask_mod`` for every sequence and head of these tensors."""
    from torch.nn.attention.flex_attention import create_block_mask

    query, key = inputs.query, inputs.key
    return create_block_mask(
        mask_mod, None, None, query.shape[2], key.shape[2], device=str(query.device), BLOCK_SIZE=128
    )
