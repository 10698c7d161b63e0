"""``python -m torchhal_conformance`` is the command ``torchhal-conformance``."""

from torchhal_conformance.cli import main

main()
