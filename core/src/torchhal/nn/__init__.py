"""Linear layers of a model through :func:`torchhal.matmul`: swapped in place, quantised if wanted, and put back.

>>> report = torchhal.nn.optimize_linear(model, weight="int8")
>>> print(report)       # what was swapped, what was left and why, bytes before and after
>>> model(inputs)

:func:`optimize_linear` quantises the weights a model has; :func:`load_packed` puts weights in that are packed already,
such as the blocks of a GGUF file. Neither ever holds a dequantised copy of a weight.
"""

from __future__ import annotations

from torchhal.nn.embedding import PackedEmbedding
from torchhal.nn.linear import FusedLinear
from torchhal.nn.load import load_packed
from torchhal.nn.mlp import FusedMLP
from torchhal.nn.optimize import optimize_linear
from torchhal.nn.report import LinearReport

__all__ = ["FusedLinear", "FusedMLP", "LinearReport", "PackedEmbedding", "load_packed", "optimize_linear"]
