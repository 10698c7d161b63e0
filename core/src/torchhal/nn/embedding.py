"""``nn.Embedding`` whose table is packed."""

from __future__ import annotations

from torch import Tensor, nn

from torchhal.nn.storage import PackedStorage
from torchhal.operands import Packed
from torchhal.reference.packing import unpack_columns


class PackedEmbedding(nn.Module):
    """Looks rows up in a packed table, and dequantises those rows alone.

    Args:
        weight: packed, of shape (embedding_dim, num_embeddings), or the storage of one: a :class:`FusedLinear` on the same
            storage is tied to the embedding.
    """

    def __init__(self, weight: Packed | PackedStorage) -> None:
        super().__init__()
        self.packed = PackedStorage(weight) if isinstance(weight, Packed) else weight
        self.embedding_dim, self.num_embeddings = (int(size) for size in self.packed.weight.shape)

    def forward(self, ids: Tensor) -> Tensor:
        """Whole numbers of any shape (...) to (..., embedding_dim), of the floating type of the packed weight.

        Raises:
            RuntimeError: an id is outside the table.
        """
        rows = unpack_columns(self.packed.weight, ids.flatten()).t()
        return rows.reshape(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Sizes as ``nn.Embedding`` prints them."""
        return f"{self.num_embeddings}, {self.embedding_dim}"
