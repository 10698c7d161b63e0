"""Reads a code object to tell what the function's behaviour can depend on."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType
from typing import NamedTuple

import torch

_FORBIDDEN = frozenset(
    ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "DELETE_ATTR", "STORE_SUBSCR", "DELETE_SUBSCR", "IMPORT_NAME",
     "IMPORT_FROM", "LOAD_NAME", "STORE_NAME", "LOAD_BUILD_CLASS", "YIELD_VALUE", "SEND", "LOAD_CLASSDEREF",
     "GET_AWAITABLE", "DELETE_DEREF")
)  # fmt: skip
# CO_GENERATOR, CO_COROUTINE, CO_ITERABLE_COROUTINE, CO_ASYNC_GENERATOR
_SUSPENDS = 0x20 | 0x80 | 0x100 | 0x200
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
# Attributes of a tensor that can change without the tensor's key changing.
_VARYING = frozenset(
    ("data", "grad", "grad_fn", "requires_grad", "is_leaf", "_version", "retains_grad", "name", "__dict__")
)
_TENSOR_ATTRIBUTES = frozenset(dir(torch.Tensor)) - _VARYING


class Scan(NamedTuple):
    """What a code object, and every one nested in it, reads from outside its own locals.

    Attributes:
        globals: each global name with the attribute chain written after it (``torch.nn.functional.relu``
            gives ``("torch", ("nn", "functional", "relu"))``).
        captured: names of closure variables with the attribute chain written after them.
    """

    globals: tuple[tuple[str, tuple[str, ...]], ...]
    captured: tuple[tuple[str, tuple[str, ...]], ...]


@lru_cache(maxsize=4096)
def scan(code: CodeType) -> Scan | None:
    """The names ``code`` depends on, or None where it does something whose outcome code alone does not fix."""
    reads: dict[str, dict[tuple[str, tuple[str, ...]], None]] = {"LOAD_GLOBAL": {}, "LOAD_DEREF": {}}
    for part in _all_codes(code):
        if part.co_flags & _SUSPENDS or not _scan_one(part, code, reads):
            return None
    return Scan(tuple(reads["LOAD_GLOBAL"]), tuple(reads["LOAD_DEREF"]))


def _all_codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _all_codes(constant)


def _scan_one(
    code: CodeType, outermost: CodeType, reads: dict[str, dict[tuple[str, tuple[str, ...]], None]]
) -> bool:
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG")]
    position = 0
    while position < len(instructions):
        found = instructions[position]
        position += 1
        if found.opname in _FORBIDDEN or (
            found.opname == "STORE_DEREF" and found.argval in outermost.co_freevars
        ):
            return False
        if found.opname in reads:
            chain, position = _chain(instructions, position)
            if found.opname == "LOAD_GLOBAL" or found.argval in outermost.co_freevars:
                reads[found.opname][str(found.argval), chain] = None
            elif not _TENSOR_ATTRIBUTES.issuperset(chain):
                return False
        elif found.opname in _ATTRIBUTES and found.argval not in _TENSOR_ATTRIBUTES:
            return False
    return True


def _chain(instructions: list[dis.Instruction], position: int) -> tuple[tuple[str, ...], int]:
    names = []
    while position < len(instructions) and instructions[position].opname in _ATTRIBUTES:
        names.append(str(instructions[position].argval))
        position += 1
    return tuple(names), position


def only_tensor_attributes(chain: tuple[str, ...]) -> bool:
    """Whether every name is an attribute that torch.Tensor defines and that its key fixes."""
    return _TENSOR_ATTRIBUTES.issuperset(chain)
