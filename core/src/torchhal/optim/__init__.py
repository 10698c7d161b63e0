"""Optimizers whose step is one pass over memory, and a base class for writing one in ten lines.

They take the place of torch's: parameter groups, schedulers, closures, hooks, ``GradScaler`` and checkpoints are the
same, and a ``state_dict`` saved by torch's AdamW or SGD loads here and the other way round. A step is one
:func:`torchhal.foreach_map` for all parameters of a group, served by whichever backend serves that: each element is
read once and written once, 28 bytes for a float32 AdamW.
"""

from torchhal.optim.rule import Rule
from torchhal.optim.rules import SGD, AdamW, Lion

__all__ = ["SGD", "AdamW", "Lion", "Rule"]
