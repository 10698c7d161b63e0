"""The calls whose kernels :mod:`torchhal_cuda128.crosscompile` compiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

import torchhal
from torchhal.foreach_columns import Column
from torchhal.operands import AttentionOperands
from torchhal.pointwise import capture
from torchhal.portable import foreach, matmul
from torchhal.portable.gradients import Arguments, GradientLauncher, dense_shape
from torchhal.portable.launch import Launcher, Start
from torchhal.portable.shapes import Shape, shape_of
from torchhal.problems import AttentionProblem
from torchhal.products.graphs import Captured, Functions, fuse
from torchhal.products.packed import Operand
from torchhal_cuda128 import foreach as foreach_plans
from torchhal_cuda128 import matmul_tiles, tiles

BATCH, HEADS, KEY_HEADS, PAGE, BLOCK = 2, 8, 2, 16, 128


@dataclass(frozen=True)
class Case:
    """One call of attention, or its backward pass."""

    size: int = 128
    rows: int = 512
    keys: int = 512
    layout: str = "dense"
    causal: bool = False
    dtype: torch.dtype = torch.bfloat16
    mod: bool = False
    """With a ``score_mod`` that reads a captured tensor."""
    window: bool = False
    """With a BlockMask."""
    dropout: bool = False
    backward: bool = False
    problem: AttentionProblem = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "problem", self._problem())

    @property
    def matrix(self) -> bool:
        """Whether its tiles fill matrix units: those of decoding have 16 rows, and float32 has no units."""
        return self.rows > 1 and self.dtype is not torch.float32

    def _problem(self) -> AttentionProblem:
        indices = [(name, torch.int32) for name in ("b", "h", "q_idx", "kv_idx")]
        slopes = torch.ones(HEADS)
        score_mod = capture(
            lambda s, b, h, q, k: torch.tanh((s + slopes[h] * (k - q)) / 20.0) * 20.0,
            [("score", torch.float32), *indices],
        )
        mask_mod = capture(lambda b, h, q, k: (k <= q) & (q - k < 256), indices)
        return AttentionProblem(
            torch.device("cpu"),
            layout=self.layout,
            query_dtype=self.dtype,
            key_dtype=self.dtype,
            value_dtype=self.dtype,
            query_heads=HEADS,
            key_heads=KEY_HEADS,
            head_size=self.size,
            value_head_size=self.size,
            is_causal=self.causal,
            return_lse=True,
            score_mod=score_mod.graph if self.mod else None,
            mask_mod=mask_mod.graph if self.window else None,
            block_size=(BLOCK, BLOCK) if self.window else None,
            page_size=PAGE if self.layout == "paged" else None,
            dropout=self.dropout,
        )


@dataclass(frozen=True)
class Product:
    """One fused matrix product."""

    rows: int = 4096
    columns: int = 4096
    inner: int = 1024
    dtype: torch.dtype = torch.bfloat16
    bits: int = 0
    """Of a packed weight; 0 for a tensor."""
    group: int | None = None
    prologue: bool = False
    """With a prologue of ``a``."""
    epilogue: bool = False
    """With a GELU and a captured residual."""
    transposed: bool = False
    """With a ``b`` that lies in memory column after column."""

    @property
    def matrix(self) -> bool:
        """Whether its tiles fill matrix units."""
        return self.rows > 16 and self.dtype is not torch.float32

    def compile(self, major: int, start: Start) -> None:
        """Give its kernels, with the tiles of a compute capability major, to ``start``."""
        residual = torch.empty(self.rows, self.columns, dtype=self.dtype)
        value = [("value", torch.float32), *((name, torch.int32) for name in ("batch", "row", "col"))]
        added = capture(lambda v, b, r, c: torch.nn.functional.gelu(v) + residual[r, c], value)
        silu = capture(lambda v: torch.nn.functional.silu(v), value[:1])
        functions = Functions(
            silu.graph if self.prologue else None, None, added.graph if self.epilogue else None
        )
        fused = fuse(functions, torch.float32, None, (self.dtype,))
        captured = Captured(epilogue=(residual,) if self.epilogue else ())
        b: Any = torch.empty(self.inner, self.columns, dtype=self.dtype)
        if self.transposed:
            b = torch.empty(self.columns, self.inner, dtype=self.dtype).mT
        if self.bits:
            b = Operand(
                torchhal.pack_weight(torch.ones(self.inner, self.columns), bits=self.bits, group=self.group)
            )
        a = torch.empty(self.rows, self.inner, dtype=self.dtype)
        multiply = matmul.Multiplier(matmul_tiles.tuning_of(major, 132), start)
        multiply(a, b, None, fused.arrange(captured, None), (self.dtype,))


@dataclass(frozen=True)
class Mapped:
    """One AdamW step by foreach, or a sum of squares."""

    dtype: torch.dtype = torch.float32
    gaps: bool = False
    """With tensors whose elements do not lie side by side."""
    reduction: str | None = None
    matrix: bool = field(default=False, init=False)

    def compile(self, major: int, start: Start) -> None:
        """Give its kernels to ``start``; they are cut alike for every compute capability major."""
        mapper = foreach.Mapper(torch.device("cpu"), foreach_plans.BLOCKS, start)
        size = 2 * foreach_plans.BLOCKS.elements
        columns = [Column([torch.empty(size, 2, dtype=self.dtype)[:, : 2 - self.gaps]]) for _ in range(4)]
        if self.reduction:
            square = capture(lambda x: x * x, [("x", self.dtype)])
            mapper.reduce(square.graph, columns[:1], (), self.reduction)
        else:
            step = capture(_adamw, [(name, self.dtype) for name in "pgmv"])
            mapper.map(step.graph, columns, (), [columns[i].items for i in (0, 2, 3)])


def _adamw(p: Any, g: Any, m: Any, v: Any) -> Any:
    m = m * 0.9 + g * 0.1
    v = v * 0.999 + g * g * 0.001
    return p * 0.999 - m / (torch.sqrt(v) / 0.3 + 1e-8), m, v


DEFAULT: Final[dict[str, Case | Product | Mapped]] = {
    "prefill-64-causal": Case(64, causal=True),
    "decode-128": Case(rows=1),
    "varlen-128-causal": Case(layout="varlen", causal=True),
    "score-mod-64-causal": Case(64, causal=True, mod=True),
    "backward-64-causal": Case(64, causal=True, backward=True),
    "backward-128-causal": Case(causal=True, backward=True),
    "product-residual": Product(epilogue=True),
    "product-int8-few": Product(rows=16, bits=8),
    "foreach-adamw": Mapped(),
    "foreach-sum": Mapped(reduction="sum"),
}
"""Compiled by every run of the tests: the default tiles of each kind of kernel."""

CASES: Final[dict[str, Case | Product | Mapped]] = {
    **DEFAULT,
    "prefill-128": Case(),
    "paged-decode-128": Case(rows=1, layout="paged"),
    "window-128": Case(window=True),
    "prefill-256-causal": Case(256, causal=True),
    "prefill-576": Case(576),
    "prefill-128-float16": Case(dtype=torch.float16, causal=True),
    "prefill-128-float32": Case(dtype=torch.float32, causal=True),
    "prefill-128-dropout": Case(dropout=True),
    "paged-prefill-128": Case(layout="paged", causal=True),
    "decode-256": Case(256, rows=1),
    "backward-256": Case(256, backward=True),
    "backward-128-float32": Case(dtype=torch.float32, backward=True),
    "backward-128-dropout": Case(dropout=True, backward=True),
    "backward-128-varlen": Case(layout="varlen", causal=True, backward=True),
    "backward-128-paged": Case(rows=64, layout="paged", causal=True, backward=True),
    "backward-64-score-mod": Case(64, mod=True, causal=True, backward=True),
    "backward-128-window": Case(window=True, backward=True),
    "product": Product(),
    "product-transposed": Product(transposed=True, epilogue=True),
    "product-small": Product(rows=512, columns=512),
    "product-few": Product(rows=16),
    "product-prologue": Product(prologue=True),
    "product-int8": Product(bits=8),
    "product-int4-few": Product(rows=16, bits=4, group=64),
    "product-float32": Product(dtype=torch.float32),
    "foreach-adamw-gaps": Mapped(gaps=True),
    "foreach-adamw-bfloat16": Mapped(torch.bfloat16),
    "foreach-max-float64": Mapped(torch.float64, reduction="max"),
}


def compile_case(case: Case | Product | Mapped, major: int, start: Start) -> None:
    """Give the kernels of a case, with the tiles of a compute capability major, to ``start``."""
    if isinstance(case, Product | Mapped):
        case.compile(major, start)
        return
    problem, tuning = case.problem, tiles.tuning_of(major, 132)
    query, key, value = _tensors(case)
    operands = _operands(case)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    scale = case.size**-0.5
    if case.backward:
        launcher = GradientLauncher(problem, tuning.precision, start)
        shape: Shape = shape_of(problem, query, key, operands)
        lengths = None
        if case.layout == "paged":
            lengths, key, value = operands.seq_lens, *(_whole(case) for _ in range(2))
            shape = dense_shape(query, key)
        launcher.sum_rows(query, query, lse, None)
        given = Arguments(query, key, value, None, scale, operands, query, lse, lse, shape, lengths)
        launcher.query_gradient(tuning.query_gradient(problem), given, query)
        launcher.key_gradients(tuning.key_gradient(problem), given, key, value)
        return
    few = case.rows == 1
    cut = (tuning.decode if few else tuning.prefill)(problem)
    shape = shape_of(problem, query, key, operands)
    Launcher(problem, tuning.precision, start)(
        cut, shape, 2 if few else 0, query, key, value, None, scale, operands, torch.empty_like(query), lse
    )


def _tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    shapes: list[tuple[int, ...]]
    if case.layout == "varlen":
        shapes = [(BATCH * case.rows, HEADS, case.size), *[(BATCH * case.keys, KEY_HEADS, case.size)] * 2]
    elif case.layout == "paged":
        pages: tuple[int, ...] = (BATCH * case.keys // PAGE, KEY_HEADS, PAGE, case.size)
        shapes = [(BATCH, HEADS, case.rows, case.size), pages, pages]
    else:
        whole: tuple[int, ...] = (BATCH, KEY_HEADS, case.keys, case.size)
        shapes = [(BATCH, HEADS, case.rows, case.size), whole, whole]
    query, key, value = (torch.empty(shape, dtype=case.dtype) for shape in shapes)
    return query, key, value


def _whole(case: Case) -> Tensor:
    return torch.empty(BATCH, KEY_HEADS, case.keys, case.size, dtype=case.dtype)


def _operands(case: Case) -> AttentionOperands:
    tensors: dict[str, Any] = {"captured": (torch.ones(HEADS),)} if case.mod else {}
    if case.layout == "varlen":
        tensors |= {
            name: torch.arange(BATCH + 1, dtype=torch.int32) * length
            for name, length in (("cu_seqlens_q", case.rows), ("cu_seqlens_k", case.keys))
        }
    if case.layout == "paged":
        count = case.keys // PAGE
        tensors["page_table"] = torch.arange(BATCH * count, dtype=torch.int32).view(BATCH, count)
        tensors["seq_lens"] = torch.full((BATCH,), case.keys, dtype=torch.int32)
    if case.window:
        counts = torch.ones(1, 1, -(-case.rows // BLOCK), dtype=torch.int32)
        indices = torch.zeros(1, 1, -(-case.rows // BLOCK), -(-case.keys // BLOCK), dtype=torch.int32)
        names: Callable[[str], dict[str, Tensor]] = lambda prefix: {  # noqa: E731
            f"{prefix}kv_num_blocks": counts, f"{prefix}kv_indices": indices,
        }  # fmt: skip
        tensors |= names("") | names("full_")
    if case.dropout:
        tensors |= {"dropout_p": 0.5, "seed": torch.zeros((), dtype=torch.int64)}
    return AttentionOperands(**tensors)
