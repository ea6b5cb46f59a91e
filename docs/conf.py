"""Sphinx configuration."""

from importlib.metadata import version as installed_version

project = "lrprobe"
author = "The lrprobe authors"
project_copyright = f"2026, {author}"
release = version = installed_version("lrprobe")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = [  # included by other pages
    "answers_table.md",
    "optimizers_table.md",
    "zeiler2012_results.md",
]

html_theme = "furo"
html_static_path = ["_static"]
html_title = f"lrprobe {release}"

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False

# Not there where the documentation is built.
autodoc_mock_imports = ["ignite", "keras", "lightning", "transformers"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
