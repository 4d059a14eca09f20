"""Sphinx configuration; the pages are Markdown."""

import importlib.metadata

project = "replknet"
author = "the replknet authors"
release = importlib.metadata.version("replknet")
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
html_theme = "furo"
exclude_patterns = ["_build"]
autodoc_typehints = "description"
