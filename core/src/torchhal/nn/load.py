"""Puts weights that are packed already into a model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from torchhal.errors import InvalidProblem
from torchhal.nn.embedding import PackedEmbedding
from torchhal.nn.linear import FusedLinear
from torchhal.nn.reasons import why_left
from torchhal.nn.report import LinearReport, bytes_of
from torchhal.nn.storage import PackedStorage
from torchhal.nn.surgery import Surgery, on_parameters_of
from torchhal.operands import Packed


def load_packed(
    model: nn.Module,
    weights: Mapping[str, Packed],
    *,
    backend: str | None = None,
    keep_original: bool = False,
    frozen: bool = False,
) -> LinearReport:
    """Swap the named layers of a model, in place, for ones on the given packed weights.

    The layers may be on the meta device: a model whose blocks come from a file needs no memory for other weights. A weight
    stands for numbers of the floating type that its layer has. One that is given for several names is held once, so that an
    output layer and an embedding stay tied. Gated MLPs whose three layers are all packed become :class:`FusedMLP`. To fuse the
    layers that are not named, call :func:`optimize_linear` afterwards.

    Args:
        model: changed in place.
        weights: by the path of an ``nn.Linear`` or ``nn.Embedding``, a packed weight of shape (in_features, out_features)
            or (embedding_dim, num_embeddings): of :func:`torchhal.pack_weight` or :func:`torchhal.gguf_weight`. A layer
            keeps its own bias.
        backend: as for :func:`optimize_linear`.
        keep_original: as for :func:`optimize_linear`.
        frozen: as for :func:`optimize_linear`.

    Returns:
        What was swapped, bytes before and after, and ``restore()``.

    Raises:
        InvalidProblem: a name is no such layer, a layer can not be swapped, or a weight does not fit it; nothing is changed
            then.
    """
    surgery = Surgery(model)
    layers = {name: _checked(surgery, name, weight) for name, weight in weights.items()}
    _refuse_twice(layers)
    before = bytes_of(model)
    storages: dict[int, PackedStorage] = {}
    for name, weight in weights.items():
        old = layers.pop(name)
        if id(weight) not in storages:
            storages[id(weight)] = PackedStorage(replace(weight, dtype=old.weight.dtype))
        storage = storages[id(weight)]
        new: nn.Module
        if isinstance(old, nn.Linear):
            new = FusedLinear(storage, old.bias, backend=backend, frozen=frozen)
        else:
            new = PackedEmbedding(storage, frozen=frozen)
        undo = on_parameters_of(old, new, kept=True) if keep_original else None
        surgery.replace(old, new.train(old.training), undo, weight.scheme)
    surgery.fuse_mlps()
    return LinearReport(tuple(surgery.swapped), (), before, bytes_of(model), surgery.steps)


def _checked(surgery: Surgery, name: str, weight: object) -> nn.Linear | nn.Embedding:
    """The layer of that name, if the weight fits it."""
    layer = _named(surgery.model, name)
    plain = nn.Embedding if isinstance(layer, nn.Embedding) else nn.Linear
    why = why_left(layer, surgery.parents(layer), plain)
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        why = "its max_norm changes the table as it is read"
    if why:
        raise InvalidProblem(f"{name} can not hold a packed weight: {why}")
    if not isinstance(weight, Packed):
        raise InvalidProblem(
            f"{name} expects a packed weight (torchhal.pack_weight, torchhal.gguf_weight) and got {type(weight).__name__}"
        )
    rows, columns = (int(size) for size in weight.shape)
    wanted = (
        (layer.embedding_dim, layer.num_embeddings)
        if isinstance(layer, nn.Embedding)
        else (layer.in_features, layer.out_features)
    )
    if (rows, columns) != wanted:
        hint = "; it was packed without transposed=True" if (columns, rows) == wanted else ""
        raise InvalidProblem(
            f"{name} expects a weight of shape (K, N) = {wanted} and got {(rows, columns)}{hint}"
        )
    return layer


def _refuse_twice(layers: Mapping[str, nn.Module]) -> None:
    named: dict[int, str] = {}
    for name, layer in layers.items():
        other = named.setdefault(id(layer), name)
        if other != name:
            raise InvalidProblem(f"{other} and {name} are one module, used in two places; name one of them")


def _named(model: nn.Module, name: str) -> nn.Linear | nn.Embedding:
    known = {
        path: m
        for path, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, (nn.Linear, nn.Embedding))
    }
    if name in known and name:
        return known[name]
    close = difflib.get_close_matches(name.removesuffix(".weight"), known, 3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise InvalidProblem(f"the model has no nn.Linear or nn.Embedding at {name!r}{hint}")
