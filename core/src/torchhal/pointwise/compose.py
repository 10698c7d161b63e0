"""Graphs from graphs: replacing an input, shifting an index, joining and combining functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from torchhal.errors import InvalidProblem
from torchhal.pointwise.builder import GraphBuilder
from torchhal.pointwise.capture import Captured
from torchhal.pointwise.dtypes import NAME_OF, is_float
from torchhal.pointwise.graph import Graph, Input


def substitute(graph: Graph, name: str, by: Graph, output: int = 0) -> Graph:
    """``graph`` with its input ``name`` replaced by an output of ``by``.

    Args:
        graph: the graph to change.
        name: one of its inputs.
        by: its inputs are matched with ``graph``'s by name; new names are appended. ``by`` may have an
            input called ``name`` itself: that is the new function's argument. If it has none, the new
            function no longer takes ``name``.
        output: which output of ``by``; its dtype must be the input's.

    Returns:
        A graph whose captured tensors are ``graph``'s followed by ``by``'s.

    Raises:
        InvalidProblem: no such input or output, or dtypes that differ.
    """
    position = _position(graph, name)
    _check_output(graph.inputs[position], by, output)
    kept = [spec for spec in graph.inputs if spec.name != name or _has(by.inputs, name)]
    builder = GraphBuilder(_union(kept, by.inputs), (*graph.captured, *by.captured))
    moved = [len(graph.captured) + i for i in range(len(by.captured))]
    replacement = builder.import_nodes(by, _arguments(builder, by.inputs), moved)[by.outputs[output]]
    arguments = [
        replacement if i == position else builder.input(_find(builder.inputs, spec.name))
        for i, spec in enumerate(graph.inputs)
    ]
    ids = builder.import_nodes(graph, arguments)
    return builder.finish([ids[i] for i in graph.outputs])


def shift(graph: Graph, name: str, dtype: torch.dtype = torch.int32) -> Graph:
    """``graph`` with input ``name`` replaced by ``name + offset``, a new last captured 0-dim tensor of ``dtype``."""
    spec = graph.inputs[_position(graph, name)]
    builder = GraphBuilder([spec], [(dtype, 0)])
    offset = builder.cast(builder.gather(0, ()), spec.dtype)
    return substitute(graph, name, builder.finish([builder.apply("add", builder.input(0), offset)]))


def concatenate(*parts: Captured) -> Captured:
    """One function with the outputs of all ``parts``, over the union of their inputs by name.

    A tensor captured by several parts is captured once. The structure is "tuple".
    """
    builder, tensors, outputs = _join(parts)
    return _captured(builder, tensors, outputs, "tuple", parts)


def and_masks(*masks: Captured) -> Captured:
    """The mask that holds where every one of ``masks`` (each one bool output) holds; True for none."""
    return _reduce_masks("logical_and", masks)


def or_masks(*masks: Captured) -> Captured:
    """The mask that holds where any of ``masks`` (each one bool output) holds; False for none."""
    return _reduce_masks("logical_or", masks)


def masked_score(score: Captured, mask: Captured) -> Captured:
    """``score`` where ``mask`` holds and -inf elsewhere, over the union of their inputs."""
    _check_single(score, None)
    _check_single(mask, torch.bool)
    if not is_float(score.graph.output_dtypes[0]):
        raise InvalidProblem(f"a score must be floating, got {score.graph.output_dtypes[0]}")
    builder, tensors, (value, keep) = _join((score, mask))
    hidden = builder.constant(-math.inf, builder.dtype(value))
    return _captured(builder, tensors, [builder.apply("where", keep, value, hidden)], "single", (score, mask))


def _reduce_masks(primitive: str, masks: Sequence[Captured]) -> Captured:
    for mask in masks:
        _check_single(mask, torch.bool)
    builder, tensors, outputs = _join(masks)
    result = outputs[0] if outputs else builder.constant(primitive == "logical_and", torch.bool)
    for output in outputs[1:]:
        result = builder.apply(primitive, result, output)
    return _captured(builder, tensors, [result], "single", masks)


def _join(parts: Sequence[Captured]) -> tuple[GraphBuilder, list[torch.Tensor], list[int]]:
    inputs: tuple[Input, ...] = ()
    for part in parts:
        inputs = _union(inputs, part.graph.inputs)
    builder = GraphBuilder(inputs)
    tensors: list[torch.Tensor] = []
    outputs: list[int] = []
    for part in parts:
        places = [
            _place(builder, tensors, tensor, spec)
            for tensor, spec in zip(part.tensors, part.graph.captured, strict=True)
        ]
        ids = builder.import_nodes(part.graph, _arguments(builder, part.graph.inputs), places)
        outputs += [ids[i] for i in part.graph.outputs]
    return builder, tensors, outputs


def _place(
    builder: GraphBuilder, tensors: list[torch.Tensor], tensor: torch.Tensor, spec: tuple[torch.dtype, int]
) -> int:
    for i, known in enumerate(tensors):
        if known is tensor:
            return i
    tensors.append(tensor)
    return builder.add_captured(*spec)


def _captured(
    builder: GraphBuilder,
    tensors: list[torch.Tensor],
    outputs: list[int],
    structure: str,
    parts: Sequence[Captured],
) -> Captured:
    pure = all(part.pure for part in parts)
    return Captured(
        builder.finish(outputs), tuple(tensors), "tuple" if structure == "tuple" else "single", pure
    )


def _check_single(part: Captured, dtype: torch.dtype | None) -> None:
    dtypes = part.graph.output_dtypes
    if len(dtypes) != 1 or (dtype is not None and dtypes[0] is not dtype):
        given = ", ".join(NAME_OF[d] for d in dtypes)
        raise InvalidProblem(
            f"expected one {'' if dtype is None else NAME_OF[dtype] + ' '}output, got {given}"
        )


def _check_output(spec: Input, by: Graph, output: int) -> None:
    if not 0 <= output < len(by.outputs):
        raise InvalidProblem(f"the replacement has {len(by.outputs)} outputs, so no output {output}")
    if by.output_dtypes[output] is not spec.dtype:
        raise InvalidProblem(
            f"input {spec.name!r} is {spec.dtype}, but its replacement gives {by.output_dtypes[output]}"
        )


def _position(graph: Graph, name: str) -> int:
    if not _has(graph.inputs, name):
        known = ", ".join(spec.name for spec in graph.inputs)
        raise InvalidProblem(f"this graph has no input {name!r}; it has {known or 'none'}")
    return _find(graph.inputs, name)


def _has(inputs: Sequence[Input], name: str) -> bool:
    return any(spec.name == name for spec in inputs)


def _find(inputs: Sequence[Input], name: str) -> int:
    return next(i for i, spec in enumerate(inputs) if spec.name == name)


def _arguments(builder: GraphBuilder, inputs: Sequence[Input]) -> list[int]:
    return [builder.input(_find(builder.inputs, spec.name)) for spec in inputs]


def _union(left: Sequence[Input], right: Sequence[Input]) -> tuple[Input, ...]:
    merged = list(left)
    for spec in right:
        if not _has(merged, spec.name):
            merged.append(spec)
        elif merged[_find(merged, spec.name)] != spec:
            raise InvalidProblem(
                f"input {spec.name!r} is {merged[_find(merged, spec.name)].dtype} in one function "
                f"and {spec.dtype} in the other; inputs of the same name must agree"
            )
    return tuple(merged)
