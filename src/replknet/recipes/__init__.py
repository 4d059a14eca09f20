"""Presets that a person can read: plain functions that return a frozen `Recipe`."""

from collections.abc import Callable

from replknet.recipes.classification import cifar10, folder
from replknet.recipes.machine import Machine
from replknet.recipes.recipe import Recipe

RECIPES: dict[str, Callable[[], Recipe]] = {"cifar10": cifar10, "folder": folder}

__all__ = ["RECIPES", "Machine", "Recipe", "cifar10", "folder"]
