"""Graphs as text: compact canonical JSON out, strictly checked JSON in."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import torch

from torchhal.errors import InvalidProblem
from torchhal.pointwise.builder import GraphBuilder
from torchhal.pointwise.dtypes import DTYPE_OF, NAME_OF, convert, fits, is_float, is_integer
from torchhal.pointwise.graph import Attribute, CapturedSpec, Graph, Input, Node
from torchhal.pointwise.primitives import PRIMITIVES, is_index, misfit

VERSION = 1
_KEYS = ("version", "inputs", "captured", "nodes", "outputs")


def dump(graph: Graph) -> str:
    """``graph`` as one line of ASCII JSON; floats are strings, so infinities and nan survive."""
    document = {
        "version": VERSION,
        "inputs": [[name, NAME_OF[dtype]] for name, dtype in graph.inputs],
        "captured": [[NAME_OF[dtype], ndim] for dtype, ndim in graph.captured],
        "nodes": [[n.primitive, NAME_OF[n.dtype], list(n.operands), n.attribute] for n in graph.nodes],
        "outputs": list(graph.outputs),
    }
    return json.dumps(document, separators=(",", ":"), allow_nan=False)


def load(text: str) -> Graph:
    """Read :func:`dump`'s text; raises InvalidProblem, naming the part, on anything else."""
    document = _document(text)
    inputs = tuple(_input(item, i) for i, item in enumerate(_list(document["inputs"], "inputs")))
    captured = tuple(_captured(item, i) for i, item in enumerate(_list(document["captured"], "captured")))
    nodes: list[Node] = []
    for i, item in enumerate(_list(document["nodes"], "nodes")):
        nodes.append(_node(item, i, nodes, inputs, captured))
    _check_precision(nodes)
    outputs = _ids(document["outputs"], len(nodes), "outputs")
    graph = Graph(inputs, captured, tuple(nodes), outputs)
    if dump(_rebuilt(graph)) != text:
        _refuse("it is not in canonical form (dead, repeated or unfolded nodes, other numbering, or spacing)")
    return graph


def _refuse(why: str) -> NoReturn:
    raise InvalidProblem(f"this is no pointwise graph text: {why}; expected what Graph.to_text() wrote")


def _document(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        _refuse(f"not JSON ({error})")
    if not isinstance(document, dict) or set(document) != set(_KEYS):
        found = sorted(document) if isinstance(document, dict) else type(document).__name__
        _refuse(f"expected an object with the keys {', '.join(_KEYS)}, got {found}")
    if document["version"] != VERSION:
        _refuse(f"version {document['version']!r} is not the version {VERSION} this torchhal reads")
    return document


def _list(item: Any, whose: str) -> list[Any]:
    if not isinstance(item, list):
        _refuse(f"{whose} must be a list, got {type(item).__name__}")
    return item


def _fields(item: Any, count: int, whose: str) -> list[Any]:
    if len(_list(item, whose)) != count:
        _refuse(f"{whose} must have {count} fields, got {len(item)}")
    return list(item)


def _dtype(name: Any, whose: str) -> torch.dtype:
    if not isinstance(name, str) or name not in DTYPE_OF:
        _refuse(f"{whose} has dtype {name!r}; known are {', '.join(DTYPE_OF)}")
    return DTYPE_OF[name]


def _is_count(item: Any, below: int | None = None) -> bool:
    return type(item) is int and item >= 0 and (below is None or item < below)


def _ids(item: Any, below: int, whose: str) -> tuple[int, ...]:
    for i in _list(item, whose):
        if not _is_count(i, below):
            _refuse(f"{whose} refers to node {i!r}, but only {below} nodes come before it")
    return tuple(item)


def _input(item: Any, i: int) -> Input:
    name, dtype = _fields(item, 2, f"input {i}")
    if not isinstance(name, str):
        _refuse(f"input {i} must be named by a string, got {name!r}")
    return Input(name, _dtype(dtype, f"input {i}"))


def _captured(item: Any, i: int) -> CapturedSpec:
    dtype, ndim = _fields(item, 2, f"captured {i}")
    if not _is_count(ndim):
        _refuse(f"captured {i} must have a rank of 0 or more, got {ndim!r}")
    return CapturedSpec(_dtype(dtype, f"captured {i}"), ndim)


def _node(
    item: Any, i: int, before: list[Node], inputs: tuple[Input, ...], captured: tuple[CapturedSpec, ...]
) -> Node:
    primitive, dtype_name, operand_ids, attribute = _fields(item, 4, f"node {i}")
    if not isinstance(primitive, str) or primitive not in PRIMITIVES:
        _refuse(f"node {i} is {primitive!r}, which is no primitive")
    operands = _ids(operand_ids, i, f"node {i}")
    node = Node(primitive, operands, _dtype(dtype_name, f"node {i}"), attribute)
    dtypes = [before[j].dtype for j in operands]
    expected = _expected_dtype(node, i, dtypes, inputs, captured)
    if node.dtype is not expected:
        _refuse(f"node {i} ({primitive}) says {dtype_name}, but it gives {NAME_OF[expected]}")
    return node


def _expected_dtype(
    node: Node,
    i: int,
    dtypes: list[torch.dtype],
    inputs: tuple[Input, ...],
    captured: tuple[CapturedSpec, ...],
) -> torch.dtype:
    word = PRIMITIVES[node.primitive]
    arity = word.arity if word.arity >= 0 else len(dtypes)
    if len(dtypes) != arity:
        _refuse(f"node {i} ({word.name}) takes {arity} operands, got {len(dtypes)}")
    if word.name == "constant":
        _check_constant(node.attribute, node.dtype, i)
        return node.dtype
    if word.name in ("input", "gather"):
        return _leaf_dtype(node, i, dtypes, inputs, captured)
    if node.attribute is not None:
        _refuse(f"node {i} ({word.name}) takes no attribute, got {node.attribute!r}")
    if word.name == "cast":
        return node.dtype
    result = word.rule(dtypes)
    return result if result is not None else _refuse(f"node {i}: {misfit(word.name, dtypes)}")


def _leaf_dtype(
    node: Node,
    i: int,
    dtypes: list[torch.dtype],
    inputs: tuple[Input, ...],
    captured: tuple[CapturedSpec, ...],
) -> torch.dtype:
    table: tuple[Input, ...] | tuple[CapturedSpec, ...] = inputs if node.primitive == "input" else captured
    if not _is_count(node.attribute, len(table)):
        _refuse(f"node {i} ({node.primitive}) reads position {node.attribute!r} of {len(table)}")
    entry = table[node.position]
    if isinstance(entry, CapturedSpec) and not (len(dtypes) == entry.ndim and all(map(is_index, dtypes))):
        _refuse(f"node {i} must index {entry.ndim} dimensions: {misfit('gather', dtypes)}")
    return entry.dtype


def _check_constant(attribute: Attribute, dtype: torch.dtype, i: int) -> None:
    if is_float(dtype):
        written = (
            torch.float64 if dtype is torch.float32 else dtype
        )  # _check_precision looks at what it is used for
        good = isinstance(attribute, str) and _is_float_text(attribute, written)
    elif is_integer(dtype):
        good = type(attribute) is int and fits(attribute, dtype)
    else:
        good = type(attribute) is bool
    if not good:
        _refuse(f"node {i} holds {attribute!r}, which is no {NAME_OF[dtype]} constant")


def _is_float_text(text: str, dtype: torch.dtype) -> bool:
    """Whether ``text`` is how :func:`dump` writes a number that ``dtype`` holds exactly."""
    try:
        return repr(convert(float(text), dtype)) == text
    except ValueError:
        return False


def _check_precision(nodes: list[Node]) -> None:
    """Refuse digits that float32 does not hold in a constant that is no exponent."""
    exponents = {node.operands[1] for node in nodes if node.primitive == "pow"}
    for i, node in enumerate(nodes):
        text = node.attribute if node.primitive == "constant" and i not in exponents else None
        if isinstance(text, str) and not _is_float_text(text, node.dtype):
            _refuse(f"node {i} holds {text!r}, which is no {NAME_OF[node.dtype]} constant")


def _rebuilt(graph: Graph) -> Graph:
    builder = GraphBuilder(graph.inputs, graph.captured)
    ids = builder.import_nodes(graph, [builder.input(i) for i in range(len(graph.inputs))])
    return builder.finish([ids[i] for i in graph.outputs])
