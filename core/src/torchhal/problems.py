"""The words of the contract: Problem, Plan, Decline, Capabilities.

A Problem is frozen, hashable and serialisable, and never holds data or a length that may vary at run
time; so it can key the plan cache, stand in a lock file, and travel through a compiled graph as text.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Final

import torch

from torchhal._text import decode, encode, short
from torchhal.claims import (
    AttentionClaims,
    CacheStoreClaims,
    ContextParallelClaims,
    DeployClaims,
    ForeachClaims,
    MatmulClaims,
)
from torchhal.errors import InvalidProblem
from torchhal.pointwise import Graph

__all__ = [
    "PROBLEMS", "SPEC_VERSION",
    "Problem", "AttentionProblem", "MatmulProblem", "ForeachProblem", "ContextParallelProblem", "CacheStoreProblem",
    "DeployProblem",
    "Plan", "Decline", "FUSIONS",
    "AttentionClaims", "MatmulClaims", "ForeachClaims", "ContextParallelClaims", "CacheStoreClaims", "DeployClaims",
    "Capabilities", "BackendInfo",
]  # fmt: skip

SPEC_VERSION = "1.0"
"""Version of the hook specification. The minor number grows with every new feature or optional argument."""


# ---------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    """One question the core asks backends: everything about a call that decides how to run it."""

    family: ClassVar[str] = ""

    device: torch.device
    """Where the tensors are, index included: several accelerators in one process are normal."""

    features: frozenset[str] = frozenset()
    """What the call asks for. Each name is a field of the family's claims, in :class:`Capabilities`."""

    @cached_property
    def dtypes(self) -> frozenset[torch.dtype]:
        """Every floating or integer type a backend has to accept to serve this problem."""
        return frozenset()

    @cached_property
    def text(self) -> str:
        """Canonical JSON of the problem: equal problems have equal text, in every process."""
        values = {f.name: encode(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return json.dumps({"family": self.family, **values}, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_text(text: str) -> Problem:
        """The problem whose :attr:`text` this is.

        Raises:
            InvalidProblem: the text is not that of a problem of this specification version.
        """
        try:
            fields = json.loads(text)
            kind = PROBLEMS[fields.pop("family")]
            return kind(**{name: decode(value) for name, value in fields.items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected = f"expected the text of a problem of specification {SPEC_VERSION}"
            raise InvalidProblem(f"{expected}, and could not read it ({error}): {text[:200]}") from error

    def summary(self) -> str:
        """One line for a person: the family and the fields that are not at their defaults."""
        parts = [f"{self.device}"]
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name in ("device", "features") or value is None or value == item.default:
                continue
            parts.append(f"{item.name}={short(value)}")
        if self.features:
            parts.append("features=" + "+".join(sorted(self.features)))
        return f"{self.family}({', '.join(parts)})"


@dataclass(frozen=True)
class AttentionProblem(Problem):
    """``softmax(score_mod(query @ key.T * scale) + mask) @ value`` in one of the public layouts."""

    family: ClassVar[str] = "attention"

    layout: str = "dense"
    """``dense`` (B, H, L, E), ``varlen`` (T, H, E) with cumulative lengths, or ``paged`` keys and values."""
    query_dtype: torch.dtype = torch.float32
    key_dtype: torch.dtype = torch.float32
    value_dtype: torch.dtype = torch.float32
    query_heads: int = 1
    key_heads: int = 1
    head_size: int = 64
    value_head_size: int = 64
    is_causal: bool = False
    return_lse: bool = False
    return_max_scores: bool = False
    """Whether row maxima come after the LSE, which is then asked for too."""
    mask_dtype: torch.dtype | None = None
    """Type of ``attn_mask`` (bool: True takes part; floating: added to the scaled score), None without one."""
    score_mod: Graph | None = None
    mask_mod: Graph | None = None
    block_size: tuple[int, int] | None = None
    """Query and key block sizes of a BlockMask, None without one."""
    page_size: int | None = None
    key_scale: str | None = None
    """How keys in pages are scaled: ``head``, one scale for each head, or ``token``, one for each token and head; None where
    they are not quantised."""
    value_scale: str | None = None
    """The same for values."""
    dropout: bool = False

    @cached_property
    def dtypes(self) -> frozenset[torch.dtype]:
        return frozenset((self.query_dtype, self.key_dtype, self.value_dtype))


@dataclass(frozen=True)
class MatmulProblem(Problem):
    """``epilogue(a_prologue(a) @ b_prologue(b) + bias)``, accumulated in float32 (float64 for float64)."""

    family: ClassVar[str] = "matmul"

    a_dtype: torch.dtype = torch.float32
    b_dtype: torch.dtype = torch.float32
    """Type of ``b``; for a packed weight, the type it dequantises to."""
    out_dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    bias_dtype: torch.dtype | None = None
    a_prologue: Graph | None = None
    b_prologue: Graph | None = None
    epilogue: Graph | None = None
    packing: str | None = None
    """Scheme of a packed weight, for example ``int4:group=32:asymmetric`` or ``gguf:q4_1``; None for a plain tensor."""

    @cached_property
    def dtypes(self) -> frozenset[torch.dtype]:
        return frozenset((self.a_dtype, self.b_dtype))


@dataclass(frozen=True)
class ForeachProblem(Problem):
    """A captured function mapped over lists of tensors in one call."""

    family: ClassVar[str] = "foreach"

    functions: tuple[Graph, ...] = ()
    """One graph for each distinct combination of element types in the lists."""
    operands: tuple[str, ...] = ()
    """How each operand is passed: ``list`` of tensors, ``scalars`` (a list of numbers) or ``scalar``."""
    in_place: bool = False
    reduction: str | None = None
    """``sum``, ``max`` or ``any`` of the elements of each result, which is a 0-dim tensor then; None to keep them."""

    @cached_property
    def dtypes(self) -> frozenset[torch.dtype]:
        # A number stands in its graph as float64 or int64, which no tensor of the call needs to be.
        listed = [
            [i.dtype for i, how in zip(g.inputs, self.operands, strict=True) if how == "list"]
            for g in self.functions
        ]
        return frozenset(dtype for types in listed for dtype in types)


@dataclass(frozen=True)
class ContextParallelProblem(Problem):
    """Attention whose sequence is sharded over the ranks of a one-dimensional device mesh."""

    family: ClassVar[str] = "context_parallel"

    scheme: str = "auto"
    world_size: int = 1
    process_group_backend: str = ""


@dataclass(frozen=True)
class CacheStoreProblem(Problem):
    """A place to keep compile caches, named by a URL."""

    family: ClassVar[str] = "cache_store"

    scheme: str = "file"


@dataclass(frozen=True)
class DeployProblem(Problem):
    """One deployment task for a device: ``compile_options``, ``quantizer``, ``package`` or ``profiler``."""

    family: ClassVar[str] = "deploy"

    task: str = "compile_options"


PROBLEMS: Mapping[str, type[Problem]] = {
    kind.family: kind
    for kind in (
        AttentionProblem,
        MatmulProblem,
        ForeachProblem,
        ContextParallelProblem,
        CacheStoreProblem,
        DeployProblem,
    )
}


# ---------------------------------------------------------------------------- answers

FUSIONS: Final = ("a_prologue", "b_prologue", "bias", "epilogue", "packed_int8", "packed_int4", "packed_gguf")
"""The features of a matrix product that one pass over its operands can serve, or a pass of their own."""


@dataclass(frozen=True)
class Plan:
    """A backend's yes: a prepared callable and what it promises.

    The signature of ``run`` is fixed for each family by its hook in :mod:`torchhal.hookspecs`.
    """

    run: Callable[..., Any]
    description: str = ""
    """One line for a person: which kernel, which instruction set."""
    deterministic: bool = True
    """Bitwise the same result for the same inputs, run after run."""
    batch_invariant: bool = False
    """No row's bits depend on what else is in the batch: in attention a sequence of the batch, in matmul an entry of
    the batch dimensions and a row of ``a``, alone or in any smaller batch, gives the bits it has in the full one."""
    differentiable: bool = False
    """Autograd through ``run`` gives every gradient the problem's features ask for."""
    traceable: bool = False
    """``run`` may be called with fake tensors under torch.compile, where it records one operator of the
    backend's own; otherwise the core wraps it in a torchhal operator."""
    direct: Callable[..., Any] | None = None
    """Of foreach alone, and never needed: ``direct(operands, out)`` is ``run(operands, (), out)`` for a call of which the core
    has looked at the first tensor of each list only. It serves lists of one length whose tensors are plain dense tensors
    of the types of the problem's one function, on the problem's device, of at least one dimension, equal in shape at
    each position, and destinations that share memory with nothing but the operand they are. For any other call it
    returns None, having written nothing, and the core looks at every tensor, which takes about 1 us each. Of
    gradients, and that all operands are of the kinds that ``problem.operands`` says, the core has made sure."""
    bind: Callable[..., Any] | None = None
    """Of matmul alone, and never needed: ``bind(steps, required=False)`` prepares products with packed weights that follow each
    other (:class:`torchhal.chains.Step`), each of which this backend has planned, and returns what runs them all
    (:data:`torchhal.chains.Bound`), giving the bits that ``run`` would give for each; or None where it can not. The same function
    in every plan that may be part of one chain. It is used only where gradients are off. With ``required``, what it returns
    records an operator of the backend's own for tensors that a compiler traces, and raises an error for operands that it
    can not serve."""
    workspace: str = "none"
    """Extra memory beyond the outputs, as a formula in the problem's lengths, for example ``O(L)``."""
    unfused: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Of a matrix product: each of the problem's :data:`FUSIONS` that ``run`` does in a pass of its own, over a whole
    operand or result, and why. Empty promises that one pass does everything."""

    variants: Mapping[str, Callable[..., Any]] = field(default_factory=dict, hash=False)
    """Other functions like ``run``, by name, that keep every promise of the plan too; which is fastest depends on the machine.
    ``torchhal tune`` measures them beside ``run``, and the lock file may choose one of them."""

    def __post_init__(self) -> None:
        if not callable(self.run):
            raise InvalidProblem(f"the run of a Plan expects a function and got {self.run!r}")
        for name, why in self.unfused.items():
            if name not in FUSIONS or not why:
                raise InvalidProblem(
                    f"the unfused of a Plan expects a reason for each of {', '.join(FUSIONS)} that it concerns; "
                    f"got {name!r}: {why!r}"
                )

    def variant(self, name: str) -> Plan | None:
        """The plan with one of its :attr:`variants` for ``run``; None where it has none of that name."""
        run = self.variants.get(name)
        described = f"{self.description}; {name}, as measured"
        return None if run is None else replace(self, run=run, description=described)

    def require_fused(self) -> Plan | Decline:
        """This plan, or for a caller that takes nothing unfused, the no that it amounts to."""
        if not self.unfused:
            return self
        names = [name for name in FUSIONS if name in self.unfused]
        reasons = "; ".join(f"{name}: {self.unfused[name]}" for name in names)
        return Decline(f"unfused_{names[0]}", f"does not fuse {reasons}")


@dataclass(frozen=True)
class Decline:
    """A backend's no: a machine-readable code and a sentence."""

    code: str
    """Lower case with underscores, for example ``no_device``, ``driver_too_old``, ``unclaimed_feature``."""
    reason: str

    def __post_init__(self) -> None:
        if not self.code or not self.reason:
            raise InvalidProblem(
                f"a Decline needs a code and a reason; got code={self.code!r}, reason={self.reason!r}"
            )

    def __str__(self) -> str:
        return f"{self.reason} [{self.code}]"


# ---------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Capabilities:
    """Everything a backend claims in advance; a family left None is not served at all."""

    attention: AttentionClaims | None = None
    matmul: MatmulClaims | None = None
    foreach: ForeachClaims | None = None
    context_parallel: ContextParallelClaims | None = None
    cache_store: CacheStoreClaims | None = None
    deploy: DeployClaims | None = None

    def refuse(self, problem: Problem) -> Decline | None:
        """Why these claims do not cover ``problem``, or None when they do.

        This is the rule that makes a backend written for an older specification safe: a feature it has
        never heard of is not among its claims, so the core declines for it before it is asked.
        """
        claims = getattr(self, problem.family, None)
        if claims is None:
            return Decline("unclaimed_family", f"does not claim the {problem.family} family")
        missing = sorted(name for name in problem.features if getattr(claims, name, False) is not True)
        if missing:
            return Decline("unclaimed_feature", f"does not claim {', '.join(missing)}")
        return _refuse_sets(claims, problem)


_SETS = {"layout": "layouts", "scheme": "schemes", "task": "tasks"}


def _refuse_sets(claims: Any, problem: Problem) -> Decline | None:
    for attribute, claimed in _SETS.items():
        asked = getattr(problem, attribute, None)
        if asked is not None and asked != "auto" and asked not in getattr(claims, claimed):
            return Decline(f"unclaimed_{attribute}", f"does not claim the {attribute} {asked!r}")
    types = sorted(str(t) for t in problem.dtypes - getattr(claims, "dtypes", problem.dtypes))
    if types:
        return Decline("unclaimed_dtype", f"does not claim {', '.join(types)}")
    return None


@dataclass(frozen=True)
class BackendInfo:
    """What a backend says of itself: the answer to the ``torchhal_backend`` hook."""

    name: str
    """The name users type; the same as the entry point's."""
    vendor: str
    device_types: frozenset[str]
    """torch device types it computes on, for example ``{"cpu"}``; empty for device-independent services."""
    spec: str
    """Range of specification versions it was written for, in the packaging syntax, for example ``>=1.0,<2``."""
    capabilities: Capabilities
    preference: Mapping[str, int] = field(default_factory=dict)
    """Claim on each device type when nobody chose: higher goes first; the reference has 0 everywhere."""
    probe: Callable[[], Mapping[str, Any]] = dict
    """Looks at the hardware and returns what ``torchhal doctor`` shows: device names, driver, measured
    ceilings. May take seconds; must not raise; has the key ``status`` (``ready`` or why not), and may have ``mend``: a list
    of dictionaries with a ``code``, a ``reason``, and what to ``do``, a command where there is one."""
    version: str = ""
