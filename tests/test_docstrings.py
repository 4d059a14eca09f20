"""What the package exports is explained: every parameter, and every error by its type."""

import inspect
import re

import pytest

import replknet
from replknet import analysis, data, deploy, kernels, models, nn, ops, tasks, train
from replknet.tasks import classification, detection, segmentation

MODULES = (
    *(replknet, kernels, ops, nn, models, data, analysis, train, deploy, tasks),
    *(classification, segmentation, detection),
)
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in module.__all__
    if inspect.isclass(getattr(module, name)) or inspect.isfunction(getattr(module, name))
}


def section(text, title):
    found = re.search(rf"^{title}:\n((?: +.*\n|\n)*)", text + "\n", re.MULTILINE)
    return found[1] if found else ""


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_is_explained(name):
    thing = PUBLIC[name]
    text = inspect.getdoc(thing)
    assert text
    if isinstance(thing, type) and issubclass(thing, Exception):
        return
    explained = re.findall(r"^    (\w+): ", section(text, "Args"), re.MULTILINE)
    assert explained == list(inspect.signature(thing).parameters)


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if inspect.isfunction(thing)])
def test_every_function_says_what_it_returns(name):
    text = inspect.getdoc(PUBLIC[name])
    assert section(text, "Returns") or inspect.signature(PUBLIC[name]).return_annotation is None


@pytest.mark.parametrize("name", PUBLIC)
def test_every_error_that_is_raised_is_explained(name):
    thing = PUBLIC[name]
    source = inspect.getsource(thing)
    raised = set(re.findall(r"raise (\w+Error)\(", source))
    missing = [error for error in raised if f"{error}:" not in source and f"{error}," not in source]
    assert missing == []
