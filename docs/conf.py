"""The site: `tox -e docs` builds it, with every warning an error. Nothing in it is from elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

from fdshare.version import __version__  # noqa: E402

project = "fdshare"
author = "The fdshare authors"
release = version = __version__
html_title = f"fdshare {__version__}"
html_theme = "furo"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "awaited",
    "command_line",
    "from_elsewhere",
    "outside",
    "public_names",
]
exclude_patterns = ["_ext"]

myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
default_role = "code"  # `name` in a docstring
smartquotes = False  # --option is two hyphens
add_module_names = False
python_use_unqualified_type_names = True

highlight_language = "none"  # of what is indented in a docstring

copybutton_prompt_text = "$ "  # is not copied, nor is output
