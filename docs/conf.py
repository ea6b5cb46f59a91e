"""Sphinx configuration."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # mathml.py

project = "lrprobe"
author = "The lrprobe authors"
project_copyright = f"2026, {author}"
release = version = installed_version("lrprobe")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml"]
html_math_renderer = "mathml"
exclude_patterns = [  # included by other pages
    "answers_table.md",
    "optimizers_table.md",
    "zeiler2012_results.md",
]

nitpicky = True
# Types in signatures, most of other projects, whose pages are not at hand.
nitpick_ignore_regex = [("py:class", ".*")]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_title = f"lrprobe {release}"

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Not there where the documentation is built.
autodoc_mock_imports = ["ignite", "keras", "lightning", "transformers"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
