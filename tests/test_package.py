"""The package as a whole: its version, and what it leaves alone."""

import importlib
import importlib.metadata

import replknet


def test_version_is_the_installed_one_and_a_source_tree_has_its_own(monkeypatch):
    assert replknet.__version__ == importlib.metadata.version("replknet")

    def nowhere(name):
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", nowhere)
        assert importlib.reload(replknet).__version__ == "0+source"
    assert importlib.reload(replknet).__version__ == importlib.metadata.version("replknet")
