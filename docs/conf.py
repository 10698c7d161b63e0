"""Settings of the documentation site; lists that can rot are generated from the code here."""

from pathlib import Path

import torchhal
from torchhal import environment

project = "torchhal"
author = copyright = "The torchhal authors"
version = release = (Path(__file__).parent.parent / "VERSION").read_text().strip()

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["tests"]

html_theme = "furo"
html_title = f"torchhal {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # dataclass fields are documented once
suppress_warnings = ["ref.python"]  # a dataclass named both where it is defined and in torchhal


def _variables() -> str:
    rows = [f"| `{name}` | {meaning} |" for name, meaning in environment.VARIABLES.items()]
    return "\n".join(["| variable | meaning |", "|---|---|", *rows])


def _public_functions() -> str:
    names = [
        n
        for n in torchhal.__all__
        if callable(getattr(torchhal, n)) and not isinstance(getattr(torchhal, n), type)
    ]
    return "\n".join(f".. autofunction:: torchhal.{name}" for name in sorted(names))


def _public_classes() -> str:
    names = [n for n in torchhal.__all__ if isinstance(getattr(torchhal, n), type)]
    return "\n".join(f".. autoclass:: torchhal.{name}\n   :members:\n" for name in sorted(names))


GENERATED = {"@VARIABLES@": _variables, "@FUNCTIONS@": _public_functions, "@CLASSES@": _public_classes}


def _fill_in(app, docname, source):
    for mark, generate in GENERATED.items():
        if mark in source[0]:
            source[0] = source[0].replace(mark, generate())


def setup(app):
    app.connect("source-read", _fill_in)
