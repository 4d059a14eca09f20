"""A layer of the package imports only from those below it, and only its own third-party packages."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "replknet"

# from the bottom up: layer -> third-party packages that it may use beside those of the earlier ones
LAYERS = {
    "imports": set(),
    "version": set(),
    "extras": set(),
    "limits": set(),
    "shown": set(),
    "typed": set(),
    "reading": set(),
    "timing": {"torch"},
    "difference": set(),
    "kernels": set(),
    "ops": set(),
    "nn": set(),
    "models": {"timm", "safetensors", "numpy"},
    "data": {"torchvision", "PIL", "tqdm"},
    "analysis": set(),
    "train": {"pytorch_lightning", "tensorboard"},
    "deploy": {"onnx", "onnxruntime", "openvino", "nncf"},
    "tasks": {"pycocotools", "torchmetrics", "transformers", "monai", "faster_coco_eval"},
    "bench": set(),
    "explore": set(),
    "app": {"gradio"},
    "cli": {"jsonargparse", "shtab"},
}
ORDER = list(LAYERS)
# packages that single files, and those of single folders, may use as well
FILES = {
    "analysis/plots/": {"matplotlib"},
    "data/sources.py": {"datasets"},
    "kernels/triton_tune.py": {"filelock"},
}
# the only files with triton: the kernels
TRITON = "kernels/triton_"


def imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, at its head or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(file: str, names: set[str]) -> list[str]:
    """What a file, named by its path inside the package, must not import."""
    layer = file.split("/")[0].removesuffix(".py")
    rank = ORDER.index(layer)
    allowed = set().union(*(LAYERS[name] for name in ORDER[: rank + 1]))
    allowed |= set().union(*(more for path, more in FILES.items() if file.startswith(path)))
    if file.startswith(TRITON):
        allowed |= {"triton"}
    wrong = []
    for name in sorted(names):
        top, *rest = name.split(".")
        if top == "replknet":
            target = rest[0] if rest else ""
            if target in LAYERS and ORDER.index(target) > rank:
                wrong.append(f"{file} imports {name}: {target} is above {layer}")
            elif target not in LAYERS and target not in ("", "__version__"):
                wrong.append(f"{file} imports {name}: no layer")
        elif top not in sys.stdlib_module_names and top not in allowed:
            wrong.append(f"{file} imports {name}: not a package of {layer}")
    return wrong


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_layer_imports_only_from_below(path):
    file = path.relative_to(ROOT).as_posix()
    if file == "__init__.py":
        return
    assert violations(file, imports(path)) == []


def test_the_rule_finds_what_it_should():
    assert violations("kernels/x.py", {"replknet.ops.depthwise"})
    assert violations("kernels/x.py", {"timm"})
    assert violations("models/x.py", {"torchvision"})
    assert violations("analysis/x.py", {"matplotlib.pyplot"})
    assert violations("kernels/x.py", {"triton"})
    assert not violations("kernels/triton_x.py", {"triton.language"})
    assert not violations("analysis/plots/x.py", {"matplotlib.pyplot", "replknet.models"})
