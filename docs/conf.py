"""Sphinx configuration; the pages are Markdown."""

from importlib.metadata import version

project = "replknet"
author = "the replknet authors"
release = version("replknet")
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
html_theme = "furo"
exclude_patterns = ["_build"]
autodoc_typehints = "description"
