"""``nn.Embedding`` whose table is packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchhal.errors import InvalidProblem
from torchhal.nn.storage import PackedStorage, training_text
from torchhal.operands import Packed
from torchhal.reference.packing import unpack_columns


class PackedEmbedding(nn.Module):
    """Looks rows up in a packed table, and dequantises those rows alone.

    Args:
        weight: packed, of shape (embedding_dim, num_embeddings), or the storage of one: a :class:`FusedLinear` on the same
            storage is tied to the embedding.
        frozen: as for :class:`FusedLinear`.
    """

    def __init__(self, weight: Packed | PackedStorage, *, frozen: bool = False) -> None:
        super().__init__()
        self.packed = PackedStorage(weight) if isinstance(weight, Packed) else weight
        self.embedding_dim, self.num_embeddings = (int(size) for size in self.packed.weight.shape)
        self.frozen = frozen

    def forward(self, input: Tensor) -> Tensor:
        """Whole numbers of any shape (...) to (..., embedding_dim), of the floating type of the packed weight.

        Raises:
            InvalidProblem: the table would be trained.
            RuntimeError: an id is outside the table.
        """
        if self.training and not self.frozen and torch.is_grad_enabled():
            raise InvalidProblem(training_text(self.packed.weight.scheme, "leave it as it was"))
        rows = unpack_columns(self.packed.weight, input.flatten()).t()
        return rows.reshape(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Sizes as ``nn.Embedding`` prints them."""
        return f"{self.num_embeddings}, {self.embedding_dim}"
