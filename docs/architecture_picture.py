"""Draws docs/architecture.svg: the layers, and the road of an image through them.

The layers come from the rule that the tests enforce (`LAYERS` in tests/test_layers.py). Run it after a change there:

    python docs/architecture_picture.py
"""

import ast
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
RULE = HERE.parent / "tests" / "test_layers.py"
PICTURE = HERE / "architecture.svg"

# what a layer is for, in the words of the table on the page
PURPOSE = {
    "cli": "one file a command",
    "app": "the web page",
    "explore": "the paper's claims as experiments; the demo",
    "bench": "workloads, harness, records",
    "tasks": "classification, segmentation, detection",
    "deploy": "inference form, formats, runtimes",
    "train": "a Lightning Trainer from a job",
    "analysis": "receptive fields, cost, shape bias",
    "data": "opens images and archives",
    "models": "network families, weights, timm",
    "nn": "modules, blocks, merge, accelerate",
    "ops": "the operator: checks, gradients, export",
    "kernels": "its implementations, and the choice",
}
# layers that are one file
GROUND = "the ground"
# the road of an image: in which layer each stop lies
ROAD = {
    "data": "image, transforms",
    "models": "model",
    "nn": "block, module",
    "ops": "op",
    "kernels": "kernel",
}

WIDTH, ROW, LEFT, BOX = 860, 38, 250, 590


def layers() -> list[str]:
    """The names of the layers, from the bottom up."""
    for node in ast.parse(RULE.read_text()).body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "LAYERS"
            and isinstance(node.value, ast.Dict)
        ):
            return [ast.literal_eval(key) for key in node.value.keys if key is not None]
    raise ValueError(f"{RULE} has no LAYERS")


def text(x: float, y: float, words: str, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(words, quote=False)}</text>'


def picture() -> str:
    """The SVG."""
    names = layers()
    rows = [name for name in reversed(names) if name in PURPOSE]
    ground = [name for name in names if name not in PURPOSE]
    top = 44
    height = top + ROW * (len(rows) + 1) + 12
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="14" role="img">',
        "<title>The layers of replknet, and the road of an image through them</title>",
        "<desc>A layer imports only from layers below it. An image passes data, models, nn, ops and kernels; "
        "results come back the same way.</desc>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        text(16, 26, "the road of an image", 'fill="#555"'),
        text(LEFT + 12, 26, "layers: each imports only from those below it", 'fill="#555"'),
    ]
    middle = {}
    for i, name in enumerate(rows):
        y = top + i * ROW
        middle[name] = y + ROW / 2 - 2
        fill = "#dcebfa" if name in ROAD else "#f1f1f1"
        out.append(f'<rect x="{LEFT}" y="{y}" width="{BOX}" height="{ROW - 4}" rx="4" fill="{fill}" stroke="#8aa"/>')
        out.append(text(LEFT + 12, middle[name] + 5, name, 'font-weight="bold" fill="#111"'))
        out.append(text(LEFT + 110, middle[name] + 5, PURPOSE[name], 'fill="#333"'))
    y = top + len(rows) * ROW
    out.append(f'<rect x="{LEFT}" y="{y}" width="{BOX}" height="{ROW - 4}" rx="4" fill="#e6e6e6" stroke="#8aa"/>')
    out.append(text(LEFT + 12, y + ROW / 2 + 3, GROUND, 'font-weight="bold" fill="#111"'))
    out.append(text(LEFT + 110, y + ROW / 2 + 3, f"single files: {', '.join(ground)}", 'fill="#333"'))
    out += _road([(middle[name], words) for name, words in ROAD.items()])
    return "\n".join([*out, "</svg>", ""])


def _road(stops: list[tuple[float, str]]) -> list[str]:
    """Down with x and back with y, beside the rows."""
    first, last = stops[0][0], stops[-1][0]
    out = [text(16, y + 5, words, 'fill="#114a85" font-weight="bold"') for y, words in stops]
    for x, begin, end in ((184, first, last), (216, last, first)):
        tip = -9 if end > begin else 9
        out.append(f'<path d="M{x} {begin:g}V{end:g}" stroke="#114a85" stroke-width="2" fill="none"/>')
        out.append(f'<path d="M{x} {end:g}l-5 {tip}h10z" fill="#114a85"/>')
    out.append(text(192, (first + last) / 2 + 5, "x", 'fill="#114a85" font-style="italic"'))
    out.append(text(224, (first + last) / 2 + 5, "y", 'fill="#114a85" font-style="italic"'))
    return out


if __name__ == "__main__":
    PICTURE.write_text(picture())
