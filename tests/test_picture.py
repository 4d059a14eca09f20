"""The picture of the layers is drawn from the rule that the tests enforce."""

import re
import runpy
from pathlib import Path

from test_layers import ORDER

DOCS = Path(__file__).parents[1] / "docs"


def test_the_picture_of_the_layers_is_the_one_that_its_script_draws():
    script = runpy.run_path(str(DOCS / "architecture_picture.py"))
    drawn = (DOCS / "architecture.svg").read_text()
    assert drawn == script["picture"](), "run `python docs/architecture_picture.py`"


def test_the_picture_and_the_page_have_every_layer_in_its_place():
    drawn = (DOCS / "architecture.svg").read_text()
    *rows, _ = re.findall(r'font-weight="bold" fill="#111">([^<]*)<', drawn)
    (ground,) = re.findall(r">single files: ([^<]*)<", drawn)
    assert [*ground.split(", "), *reversed(rows)] == ORDER
    table = re.findall(r"^\| `(\w+)` \|", (DOCS / "architecture.md").read_text().split("\n## ")[1], re.MULTILINE)
    assert table == rows
