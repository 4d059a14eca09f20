"""Files of torch.export and of AOTInductor. They are programs: reading one runs what stands in it.

torch unpickles in five places of a `.pt2` archive and evaluates text with sympy; a `.aoti.pt2` archive holds a compiled
library. So nothing here is opened that the user does not trust. A pickle is refused even then: our files hold none.
"""

import io
import json
import math
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from replknet import limits
from replknet.deploy.cards import KEY, ExportedError, found_in
from replknet.deploy.verify import Run
from replknet.reading import Kind, reading
from replknet.shown import shown

PT2 = Kind(ExportedError, "an archive of torch.export that `replknet export` wrote", "export it again")
AOTI = Kind(ExportedError, "an archive of AOTInductor that `replknet export` wrote", "export it again on this machine")

# what torch adds to every archive
_MARKS = r"archive_format|archive_version|byteorder|\.data/version|\.data/serialization_id"
# members of an archive of ours, without its folder
_GRAPH = re.compile(
    rf"{_MARKS}|models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)|extra/{KEY}"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt"
)
_LIBRARY = re.compile(rf"{_MARKS}|data/aotinductor/model/\w[\w.]*")
# members that torch unpickles: the weights and constants of older archives, and objects of Python and C++
_PICKLE = re.compile(r"serialized_\w+\.pt|data/(weights|constants)/.*\.pt|data/constants/(custom|opaque)_obj_.*")
_SAMPLES = "data/sample_inputs/model.pt"
# configuration -> names of the records that it may name
_PAYLOADS = {
    "data/weights/model_weights_config.json": re.compile(r"weight_\d+"),
    "data/constants/model_constants_config.json": re.compile(r"tensor_\d+"),
}


def trusted(path: Path, trust: bool) -> None:
    """Refuse to open a program that the user does not trust.

    Raises:
        ExportedError: `trust` is False.
    """
    if not trust:
        raise ExportedError(
            f"{shown(path)} is a program: reading a .pt2 file runs code that stands in it. If you trust those who made "
            "it, --trust (in Python trust=True) runs it; else ask them for .onnx or .xml, which are data"
        )


def save_pt2(program: torch.export.ExportedProgram, path: Path, card: str | None = None) -> None:
    """Write a program without pickles, and the text of its card."""
    # torch would pickle them, and needs them for nothing
    program.example_inputs = None
    torch.export.save(program, path, extra_files={} if card is None else {KEY: card})


def open_pt2(path: Path) -> tuple[str | None, Callable[..., Any]]:
    """The text of the card in a file of `save_pt2`, and its program. The caller trusts the file.

    Raises:
        ExportedError: the file is damaged, or holds or asks for a pickle.
    """
    with reading(path, PT2):
        members = _members(path, _GRAPH, PT2)
        for config, records in _PAYLOADS.items():
            _check_payloads(path, members, config, records)
        found = _load(members)
        run = found.exported_programs["model"].module()
    return found.extra_files.get(KEY), run


def open_aoti(path: Path) -> tuple[str, Run]:
    """The text of the card in a file of AOTInductor, and a function that runs it. The caller trusts the file.

    Raises:
        ExportedError: the file is damaged, of another machine, without a card, or holds anything but a library.
    """
    with reading(path, AOTI):
        run = _load(_members(path, _LIBRARY, AOTI)).aoti_runners["model"]
        card = found_in(run.get_metadata().get(KEY), path)
    # the library assumes contiguous images and does not check
    return card, lambda x: [run(x.contiguous())]


def _load(members: Mapping[str, bytes]) -> Any:
    """What torch reads from an archive of these members.

    The archive is written anew, in memory: torch's own reader of archives would take names without regard to case, and
    Python's may see another list of members than torch's.
    """
    # torch.export.load would try an older form of archive after an error
    from torch.export.pt2_archive._package import load_pt2

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as written:
        for name, data in members.items():
            written.writestr(f"net/{name}", data)
    archive.seek(0)
    return load_pt2(archive)


def _members(path: Path, known: re.Pattern[str], kind: Kind) -> dict[str, bytes]:
    """The members of an archive without their folder. There is no other than `known`, and none is a pickle."""
    found: dict[str, bytes] = {}
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        limits.check(len(infos), limits.ENTRIES, "members of an archive")
        if not infos or min(info.header_offset for info in infos) != 0:
            raise ExportedError(f"{shown(path)} is no plain archive: expected {kind.expected}; {kind.way_out}")
        if sum(info.file_size for info in infos) > path.stat().st_size:
            raise ExportedError(f"{shown(path)} has members that are larger than the file: {kind.way_out}")
        folder = infos[0].filename.partition("/")[0]
        for info in infos:
            name = info.filename.removeprefix(f"{folder}/")
            # torch's writer compresses nothing
            plain = info.filename == info.orig_filename == f"{folder}/{name}" and info.file_size == info.compress_size
            if name == _SAMPLES and info.file_size:
                raise ExportedError(
                    f"{shown(path)} holds sample inputs as a pickle, which could run any code. Older versions of "
                    "replknet wrote such files: export it again"
                )
            if _PICKLE.fullmatch(name) and name != _SAMPLES:
                raise ExportedError(
                    f"{shown(path)} holds a pickle, {shown(name)}, which could run any code: {kind.way_out}"
                )
            if not known.fullmatch(name) or name in found or not plain:
                raise ExportedError(
                    f"{shown(path)} has a member {shown(info.orig_filename)} that does not belong there: expected "
                    f"{kind.expected}; {kind.way_out}"
                )
            found[name] = archive.read(info)
    return found


def _check_payloads(path: Path, members: Mapping[str, bytes], config: str, records: re.Pattern[str]) -> None:
    """Check which records the weights or constants are read from: none is a pickle, and none an invented size."""
    entries = json.loads(members[config])["config"]
    folder = config.rpartition("/")[0]
    for name, entry in entries.items():
        # torch takes any value that is true, such as "false"
        if entry["use_pickle"] is not False:
            raise ExportedError(
                f"{shown(path)} asks for a pickle, for {shown(name)}, which could run any code: {PT2.way_out}"
            )
        record = entry["path_name"]
        if not records.fullmatch(record):
            raise ExportedError(f"{shown(path)} has no weights called {shown(record)}: {PT2.way_out}")
        # torch fills a tensor without a record with zeros
        numbers = math.prod(size["as_int"] for size in entry["tensor_meta"]["sizes"])
        if not members[f"{folder}/{record}"] and numbers:
            raise ExportedError(f"{shown(path)} lacks the {numbers:,} numbers of {shown(name)}: {PT2.way_out}")
