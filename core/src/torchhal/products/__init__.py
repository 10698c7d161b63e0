"""What every backend with a fused matrix product of its own needs around its kernel.

- :mod:`torchhal.products.graphs` rewrites captured functions to what a kernel runs: hoisted, cast and joined;
- :mod:`torchhal.products.packed` shows a packed weight, or its transpose, as an operand;
- :mod:`torchhal.products.gradients` makes each gradient a fused product itself;
- :mod:`torchhal.products.product` puts them together to the ``run`` of a Plan around one function, ``multiply``.
"""
