"""Run a script that builds networks with timm so that it knows ours: python with_replknet.py validate.py --model ..."""

import runpy
import sys

import replknet  # noqa: F401  # registers the networks

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
