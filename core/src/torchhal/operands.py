"""What a planned call carries besides its main tensors; kept out of the fast path, which passes None."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from torchhal.errors import InvalidProblem

PLAIN: Final = frozenset((Tensor, torch.nn.Parameter))
"""Types of tensors that are what their memory says."""


def is_readable(tensors: Sequence[Any]) -> bool:
    """Whether tensors are what their memory says: no subclass's, and not to be negated on reading."""
    return set(map(type, tensors)) <= PLAIN and not any([t.is_neg() for t in tensors])  # noqa: C419 (a list is quicker)


@dataclass(frozen=True, slots=True)
class AttentionOperands:
    """Everything an attention call may carry beyond query, key, value, mask and scale."""

    captured: tuple[Tensor, ...] = ()
    """Tensors captured by ``score_mod``, in graph order."""
    mask_captured: tuple[Tensor, ...] = ()
    """Tensors captured by ``mask_mod``, in graph order."""
    kv_num_blocks: Tensor | None = None
    """Of the BlockMask, (Bm, Hm, query blocks) int32: how many key blocks are partly visible."""
    kv_indices: Tensor | None = None
    """(Bm, Hm, query blocks, key blocks) int32: which ones, first ``kv_num_blocks`` entries of each row."""
    full_kv_num_blocks: Tensor | None = None
    """As ``kv_num_blocks``, for blocks that are wholly visible and need no ``mask_mod``; None if not separated."""
    full_kv_indices: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    """(B + 1,) int32, cumulative query lengths of the varlen layout."""
    cu_seqlens_k: Tensor | None = None
    page_table: Tensor | None = None
    """(B, max_pages) int32, physical page of each logical page; entries past the sequence are never read."""
    seq_lens: Tensor | None = None
    """(B,) int32, number of keys of each sequence of the paged layout."""
    key_scale: Tensor | None = None
    """Of quantised keys in pages, float32: (Hkv,) or (P, Hkv, page_size); a key's element is the stored number times it.
    Scales of slots past the sequence are never read."""
    value_scale: Tensor | None = None
    """The same for values."""
    dropout_p: float = 0.0
    seed: Tensor | None = None
    """0-dim int64, seed of the dropout of this call."""

    def layout(self) -> dict[str, Tensor]:
        """The tensors that are not captured ones, by field name, those that are absent left out."""
        named = ((name, getattr(self, name)) for name in _TENSOR_FIELDS)
        return {name: tensor for name, tensor in named if tensor is not None}


_TENSOR_FIELDS = tuple(
    f.name for f in fields(AttentionOperands) if f.name not in ("captured", "mask_captured", "dropout_p")
)


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """An uninitialised (..., Ev) result in the layout of torch's attention on CPU, which keeps that of the query.

    Transformers keep (B, L, H, E) tensors and pass transposed views; a result in the same order makes the transposition
    back free, and a ``view`` that works on torch's result works on this one.
    """
    if query.dim() == 4 and query.shape[-1] == value.shape[-1] and query.stride(-1) == 1:
        found = torch.empty_like(query)
        if found.stride(-1) == 1:  # not so for some expanded queries
            return found
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@dataclass(frozen=True, slots=True)
class MatmulOperands:
    """Captured tensors of a fused matrix product's functions, in graph order."""

    a_captured: tuple[Tensor, ...] = ()
    b_captured: tuple[Tensor, ...] = ()
    epilogue_captured: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight matrix of logical shape (K, N), quantised once by :func:`torchhal.pack_weight`.

    Dequantised element (k, n) is ``(q[k, n] - zero[g, n]) * scale[g, n]`` in float32, with ``g = k // group``.
    For int8, ``q`` is ``data``. For int4, two values share a byte of ``data``, the even k in the low half, each
    stored as ``q + 8`` (0 to 15); a row of padding after an odd K is stored as ``q = 0``. Plain tensors and
    numbers only, so that it can be saved with ``torch.save`` as :meth:`state` and read back by any backend.

    Raises:
        InvalidProblem: the parts do not belong together; says which and what was expected.
    """

    data: Tensor
    """(K, N) int8, or (ceil(K / 2), N) uint8 for int4."""
    scale: Tensor
    """(ceil(K / group), N) float32, positive."""
    zero: Tensor | None
    """(ceil(K / group), N) float32 holding whole numbers, or None for symmetric packing."""
    bits: int
    group: int
    """Rows that share a scale; K itself for one scale for each column."""
    shape: tuple[int, int]
    dtype: torch.dtype
    """Floating type the weight had and dequantises to."""

    def __post_init__(self) -> None:
        if self.bits not in _STORAGE:
            raise InvalidProblem(f"a packed weight has 8 or 4 bits; got bits={self.bits!r}")
        if not (isinstance(self.group, int) and self.group >= 1):
            raise InvalidProblem(
                f"the group of a packed weight is a positive number of rows; got {self.group!r}"
            )
        if not self.dtype.is_floating_point:
            raise InvalidProblem(f"a packed weight dequantises to a floating type; got {self.dtype}")
        rows, columns = self.shape
        groups = -(-rows // self.group)
        stored = rows if self.bits == 8 else -(-rows // 2)
        self._expect("data", self.data, (stored, columns), _STORAGE[self.bits])
        self._expect("scale", self.scale, (groups, columns), torch.float32)
        if self.zero is not None:
            self._expect("zero", self.zero, (groups, columns), torch.float32)

    def _expect(self, name: str, tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != self.data.device:
            where = f"{shape} {dtype} on {self.data.device}"
            got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            what = f"int{self.bits} weight of shape {tuple(self.shape)} in groups of {self.group}"
            raise InvalidProblem(f"'{name}' of a packed {what} must be {where}; got {got}")

    @property
    def scheme(self) -> str:
        """``int8``/``int4``, group (or ``channel``) and symmetry: the ``packing`` of a MatmulProblem."""
        group = "channel" if self.group >= self.shape[0] else str(self.group)
        return f"int{self.bits}:group={group}:{'symmetric' if self.zero is None else 'asymmetric'}"

    @property
    def device(self) -> torch.device:
        """Where the packed tensors are."""
        return self.data.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The packed tensors, in the order of :meth:`state`."""
        return (self.data, self.scale) if self.zero is None else (self.data, self.scale, self.zero)

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same packed weight on another device."""
        zero = None if self.zero is None else self.zero.to(device)
        return replace(self, data=self.data.to(device), scale=self.scale.to(device), zero=zero)

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and names that :meth:`from_state` reads back, also through ``torch.load(weights_only=True)``."""
        return {
            "data": self.data,
            "scale": self.scale,
            "zero": self.zero,
            "bits": self.bits,
            "group": self.group,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> PackedWeight:
        """The packed weight whose :meth:`state` this is.

        Raises:
            InvalidProblem: entries are missing, unknown, or do not belong together.
        """
        _expect_entries(state, PackedWeight, "packed")
        rows, columns = state["shape"]
        return PackedWeight(**{**state, "shape": (int(rows), int(columns)), "dtype": _dtype_of(state)})


_STORAGE = {8: torch.int8, 4: torch.uint8}


class GGUFBlock(NamedTuple):
    """How 32 neighbours along K of one output column are stored: a scale, perhaps a minimum, then the quants."""

    size: int
    """Bytes."""
    bits: int
    """Of a quant: 4, of which two share a byte, elements 0 to 15 in the low halves and 16 to 31 in the high ones, or 8."""
    minimum: bool
    """Whether a minimum is added to scale times quant; else 4-bit quants are 8 too large."""


GGUF_BLOCKS: Final[Mapping[str, GGUFBlock]] = {
    "q4_0": GGUFBlock(18, 4, False),
    "q4_1": GGUFBlock(20, 4, True),
    "q8_0": GGUFBlock(34, 8, False),
}
"""The kinds of block that are used as they are; ``ggml-common.h`` of the ggml project (block_q4_0, block_q4_1, block_q8_0)
is where the layouts come from."""

GGUF_BLOCK_ELEMENTS: Final = 32


@dataclass(frozen=True, slots=True, eq=False)
class GGUFWeight:
    """A weight matrix of logical shape (K, N) in blocks of a GGUF file, used as they are; by :func:`torchhal.gguf_weight`.

    Row n of ``data`` holds column n of the weight (a row of ``nn.Linear.weight``) as K / 32 blocks. A block begins with its
    scale ``d``, a little-endian float16. ``q4_0``: 16 bytes follow, two quants in each, elements 0 to 15 in the low
    halves and 16 to 31 in the high ones; an element is ``d * (q - 8)``. ``q4_1``: a float16 minimum ``m``, then 16 bytes
    alike; ``d * q + m``. ``q8_0``: 32 signed bytes; ``d * q``. Elements are computed in float32 (float64 in products of float64).

    Raises:
        InvalidProblem: the parts do not belong together; says which and what was expected.
    """

    data: Tensor
    """(N, K / 32 * bytes of a block) uint8."""
    kind: str
    """``q4_0``, ``q4_1`` or ``q8_0``."""
    dtype: torch.dtype
    """Floating type that the weight stands for: with the type of ``a`` it makes that of a product."""

    def __post_init__(self) -> None:
        if self.kind not in GGUF_BLOCKS:
            known = ", ".join(GGUF_BLOCKS)
            raise InvalidProblem(
                f"the kind of a GGUF weight is one of {known}; got {self.kind!r}: dequantise other kinds and pass a tensor"
            )
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise InvalidProblem(f"a GGUF weight dequantises to a floating type; got {self.dtype}")
        data, size = self.data, GGUF_BLOCKS[self.kind].size
        if data.dim() != 2 or data.dtype != torch.uint8 or data.shape[1] % size:
            got = f"{tuple(data.shape)} {data.dtype}"
            raise InvalidProblem(
                f"'data' of a {self.kind} weight must be (N, bytes of a row) torch.uint8, rows of whole blocks of {size} "
                f"bytes; got {got}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        columns, row = self.data.shape
        return row // GGUF_BLOCKS[self.kind].size * GGUF_BLOCK_ELEMENTS, columns

    @property
    def scheme(self) -> str:
        """``gguf:`` and the kind: the ``packing`` of a MatmulProblem."""
        return f"gguf:{self.kind}"

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self.data.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The blocks."""
        return (self.data,)

    def to(self, device: torch.device | str) -> GGUFWeight:
        """The same weight on another device."""
        return replace(self, data=self.data.to(device))

    def state(self) -> dict[str, Any]:
        """A tensor and names that :meth:`from_state` reads back, also through ``torch.load(weights_only=True)``."""
        return {"data": self.data, "kind": self.kind, "dtype": str(self.dtype).removeprefix("torch.")}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> GGUFWeight:
        """The weight whose :meth:`state` this is.

        Raises:
            InvalidProblem: entries are missing, unknown, or do not belong together.
        """
        _expect_entries(state, GGUFWeight, "GGUF")
        return GGUFWeight(state["data"], state["kind"], _dtype_of(state))


Packed: TypeAlias = PackedWeight | GGUFWeight
"""A weight that is dequantised inside the product."""


def packed_from_state(state: Mapping[str, Any]) -> Packed:
    """The weight whose ``state()`` this is, of whichever kind.

    A ``state()`` is flat: tensors by name, and numbers, names and None beside them. A module keeps the tensors as buffers
    and the rest as extra state, and hands both back together.

    Raises:
        InvalidProblem: entries are missing, unknown, or do not belong together.
    """
    return (GGUFWeight if "kind" in state else PackedWeight).from_state(state)


def _expect_entries(state: Mapping[str, Any], kind: type[PackedWeight | GGUFWeight], name: str) -> None:
    expected = {f.name for f in fields(kind)}
    if set(state) != expected:
        raise InvalidProblem(
            f"the state of a {name} weight has the entries {sorted(expected)}; got {sorted(state)}"
        )


def _dtype_of(state: Mapping[str, Any]) -> torch.dtype:
    dtype = getattr(torch, str(state["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise InvalidProblem(
            f"'dtype' in the state of a packed weight names a torch dtype; got {state['dtype']!r}"
        )
    return dtype
