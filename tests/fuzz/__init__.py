"""Damaged and hostile inputs: one target for each format. The suite runs the first inputs, `make soak` more.

A new target is a `Target` in one of the files, or in a new file, which is named here.
"""

from fuzz import targets_cli, targets_data, targets_deploy, targets_trainings, targets_weights
from fuzz.frame import Target, campaign

_MODULES = (targets_weights, targets_data, targets_deploy, targets_trainings, targets_cli)
TARGETS: dict[str, Target] = {target.name: target for module in _MODULES for target in module.TARGETS}
CAMPAIGNS = {name: campaign(target) for name, target in TARGETS.items()}
