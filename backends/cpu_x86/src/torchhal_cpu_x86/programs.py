"""Captured functions as programs for the native vector machine: a graph, node by node, as 64-bit words.

``native/src/program.hpp`` describes the words. Nothing is optimised here: the library lays values out in memory by what
they vary with (a row, a key, both or nothing), which depends on the kernel that runs the program.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Mapping
from typing import Final

import torch

from torchhal.pointwise import Graph
from torchhal.pointwise.dtypes import DTYPES, is_float
from torchhal.pointwise.graph import Node
from torchhal_cpu_x86 import native

VERSION: Final = 1
TYPES: Final[Mapping[torch.dtype, int]] = {dtype: code for code, dtype in enumerate(DTYPES)}


class Captured(ctypes.Structure):
    """``thal_captured`` of torchhal_cpu_x86.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("dims", ctypes.c_int32),
        ("sizes", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
    )


class Function(ctypes.Structure):
    """``thal_function`` of torchhal_cpu_x86.h."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("captured", ctypes.c_void_p),
        ("captured_count", ctypes.c_int64),
    )


@functools.cache
def primitive_codes() -> Mapping[str, int]:
    """The library's number for each primitive, by name."""
    library = native.load().library
    names = [library.thal_primitive_name(code).decode() for code in range(library.thal_primitive_count())]
    return {name: code for code, name in enumerate(names)}


@functools.lru_cache(maxsize=1024)
def encode(graph: Graph) -> tuple[int, ...]:
    """The words of a graph."""
    words = [VERSION, len(graph.inputs), *(TYPES[item.dtype] for item in graph.inputs)]
    words.append(len(graph.captured))
    for spec in graph.captured:
        words += (TYPES[spec.dtype], spec.ndim)
    words.append(len(graph.nodes))
    for node in graph.nodes:
        words += (primitive_codes()[node.primitive], TYPES[node.dtype], _attribute(node))
        words += (len(node.operands), *node.operands)
    return (*words, len(graph.outputs), *graph.outputs)


def _attribute(node: Node) -> int:
    if node.primitive in ("input", "gather"):
        return node.position
    if node.primitive != "constant":
        return 0
    return double_bits(float(node.value)) if is_float(node.dtype) else int(node.value)


def double_bits(number: float) -> int:
    """The bits of a float64 as a signed word."""
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits
