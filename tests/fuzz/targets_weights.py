"""Files of weights: safetensors with descriptions, PyTorch's archives, and pickles of older PyTorch and MegEngine."""

import io
import json
import pickle
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import save

import replknet
from fuzz.frame import Target
from fuzz.mutators import extreme, mutated, mutated_json, mutated_zip, zip_members, zip_of
from replknet.models import CheckpointError, Description
from replknet.models.checkpoints import read_state_dict
from replknet.models.model_files import FIELD, _plain
from replknet.models.replknet import CONFIGS
from replknet.tasks.detection.files import DetectionDescription
from replknet.tasks.segmentation.files import SegmentationDescription

_CLASSES = ("cat", "dog", "cow")
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@cache
def _described() -> tuple[tuple[bytes, str, dict[str, object]], ...]:
    """The tensors of a network of each task, and its description."""
    torch.manual_seed(0)
    mean, std = _IMAGENET
    shared = {"backbone": "replknet_test", "network": {}, "classes": _CLASSES, "mean": mean, "std": std}
    colours = ((0, 0, 0), (1, 1, 1), (2, 2, 2))
    segmentation = SegmentationDescription(
        **shared, palette=colours, channels=8, auxiliary_channels=8, align_corners=False, scale=(64, 32), window=32,
        stride=16,
    )  # fmt: skip
    detection = DetectionDescription(**shared, detector="fcos", channels=32, scale=(64, 32))
    found = []
    for field, description, plain in (
        (FIELD, _CLASSIFIER, _plain(_CLASSIFIER)),
        (f"{FIELD}_segmentation", segmentation, vars(segmentation)),
        (f"{FIELD}_detection", detection, vars(detection)),
    ):
        state = {key: value.contiguous() for key, value in description.build().state_dict().items()}
        # through JSON, as in a file: lists, not tuples
        found.append((save(state), field, json.loads(json.dumps(plain))))
    return tuple(found)


_CLASSIFIER = Description(config=CONFIGS["replknet_test"], classes=_CLASSES, num_classes=3, image_size=32)


@cache
def _state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return _CLASSIFIER.build().state_dict()


def _make_safetensors(random: Random, folder: Path) -> Path:
    data, field, description = random.choice(_described())
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    what = random.random()
    if what < 0.5:
        description = mutated_json(random, description)
    elif what < 0.75:
        header = mutated_json(random, header)
    if isinstance(header, dict):
        text = json.dumps(description)
        if random.random() < 0.1:
            text = mutated(random, text.encode()).decode("latin1")
        header["__metadata__"] = extreme(random) if random.random() < 0.05 else {field: text}
    new = json.dumps(header).encode()
    new += b" " * (-len(new) % 8)
    data = struct.pack("<Q", len(new)) + new + data[8 + length :]
    return _written(folder, "x.safetensors", mutated(random, data) if what >= 0.75 else data)


def _written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@cache
def _archive(wrapped: bool, legacy: bool) -> bytes:
    content = io.BytesIO()
    state: object = _state()
    if wrapped:
        optimizer = {"state": {i: {"exp_avg": t.clone()} for i, t in enumerate(_state().values())}}
        state = {"model": state, "model_ema": dict(_state()), "optimizer": optimizer, "epoch": 3}
    torch.save(state, content, _use_new_zipfile_serialization=not legacy)
    return content.getvalue()


def _make_archive(random: Random, folder: Path) -> Path:
    data = _archive(random.random() < 0.5, legacy=False)
    if random.random() < 0.3:
        return _written(folder, "x.pth", mutated(random, data))
    members = zip_members(data)
    name = next(name for name in members if name.endswith("/data.pkl"))
    if random.random() < 0.7:
        members[name] = _mutated_pickle(random, members[name])
        return _written(folder, "x.pth", zip_of(members))
    return _written(folder, "x.pth", mutated_zip(random, members))


def _make_legacy(random: Random, folder: Path) -> Path:
    data = _archive(random.random() < 0.5, legacy=True)
    return _written(folder, "x.pth", (mutated if random.random() < 0.5 else _mutated_pickle)(random, data))


@cache
def _megengine(protocol: int) -> bytes:
    arrays = {
        "stem.0.conv.weight": np.ones((4, 3, 3, 3), "f4"),
        "blocks.0.pre_bn.weight": np.ones((1, 4, 1, 1), "f4"),
        "blocks.0.dw.dw_large.conv.weight": np.asfortranarray(np.ones((4, 1, 1, 5, 5), "f2")),
        "blocks.0.dw.dw_small_3.conv.weight": np.ones((4, 1, 1, 3, 3), ">f4"),
        "blocks.1.0.conv.weight": np.ones((8, 4, 1, 1), "i4"),
        "norm.running_mean": np.ones((1, 8, 1, 1), "f8"),
    }
    return pickle.dumps({"state_dict": arrays, "epoch": np.float64(3.0)}, protocol)


def _make_megengine(random: Random, folder: Path) -> Path:
    data = _megengine(random.choice((2, 3, 4, 5)))
    return _written(folder, "x.pkl", (mutated if random.random() < 0.3 else _mutated_pickle)(random, data))


# instructions that build much from little, or call what a file must not call
_FRAGMENTS = (
    b"(" * 200,
    b"}q\x00X\x05\x00\x00\x00modelh\x00s",  # a dict that contains itself
    b"X\x01\x00\x00\x00a" + b"\x86".join([b"2"] * 60) + b"\x86",  # a tuple of two tuples of two ...
    b"r\xff\xff\xff\x7f",  # remember at place 2^31
    b"cos\nsystem\nX\x04\x00\x00\x00true\x85R",
    b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x08\x00\x00\x00punycode\x86R",
    b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R(K\x03X\x01\x00\x00\x00<NNNK\x7fK\x7fK\xfftb",
    b"cnumpy\nndarray\n",
    b"carg\nparse\n",
    b"cargparse\nNamespace\n)\x81}b",
    b"J\xff\xff\xff\x7f",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"X\x09\x00\x00\x00state_dict",
    b"0",
    b"2",
    b"R",
    b"b",
    b"Q",
    b"\x81",
)


def _mutated_pickle(random: Random, data: bytes) -> bytes:
    """A pickle with instructions put in, numbers and names replaced, or changed bytes."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        what, start = random.random(), random.randrange(len(changed))
        if what < 0.4:
            changed[start:start] = random.choice(_FRAGMENTS)
        elif what < 0.7:
            _renumbered(random, changed, start)
        elif what < 0.85:
            old = random.choice((b"_rebuild_tensor_v2", b"FloatStorage", b"_reconstruct", b"ndarray", b"OrderedDict"))
            new = random.choice((b"_rebuild_sparse_tensor", b"LongStorage", b"dtype", b"HalfStorage", b"eval"))
            changed = bytearray(changed.replace(old, new, random.choice((1, 1000))))
        else:
            changed = bytearray(mutated(random, bytes(changed)))
        if not changed:
            return b""
    return bytes(changed)


def _renumbered(random: Random, data: bytearray, start: int) -> None:
    """Another value for the next number from `start` on."""
    for i in range(start, len(data) - 5):
        if data[i] == ord("K"):
            number = random.choice((0, 1, 2, 255, 2**16, 2**31 - 1, -1, -(2**31)))
            data[i : i + 2] = b"J" + struct.pack("<i", number)
            return


def _load(path: Path) -> object:
    return replknet.load(path)


def _read(path: Path) -> object:
    return read_state_dict(path)


def _target(name: str, question: str, make: Callable[[Random, Path], Path], read: Callable[[Path], object]) -> Target:
    return Target(name, question, make, read, (CheckpointError,))


TARGETS = (
    _target("safetensors", "is a network built, or its file refused in a line", _make_safetensors, _load),
    _target("pytorch", "are weights read from torch's archive, or refused in a line", _make_archive, _load),
    _target("pytorch_legacy", "the same, of a file of PyTorch before 1.6", _make_legacy, _read),
    _target("megengine", "are arrays read from a pickle, or refused in a line", _make_megengine, _read),
)
