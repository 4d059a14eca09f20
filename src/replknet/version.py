"""The version of this package."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("replknet")
except PackageNotFoundError:
    # a source tree that was not installed, as `make gpu` runs it
    __version__ = "0+source"
