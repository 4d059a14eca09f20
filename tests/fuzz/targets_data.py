"""Images and data sets: raster formats, COCO's JSON, masks, zip archives, tar archives and shards of webdataset."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image
from pycocotools import mask as rle

from fuzz.frame import Target
from fuzz.mutators import mutated, mutated_text, mutated_zip, zip_of
from replknet.data import images
from replknet.data.coco import CocoImages
from replknet.data.images import ImageError
from replknet.data.masks import Pairs
from replknet.data.sources import source_of
from replknet.data.transforms import eval_transform

_SIDES = (0, 1, 5, 255, 8192, 8193, 16383, 65535, 65536, 2**24, 2**31 - 1, 2**32 - 1)


# ---- images


@cache
def _pictures() -> dict[str, bytes]:
    """A small picture in each format, with the extras that decoders read: palettes, frames, texts and profiles."""
    random = Random(0)
    picture = Image.frombytes("RGB", (23, 17), random.randbytes(23 * 17 * 3))
    exif = Image.Exif()
    exif[0x010E] = "a picture"
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "jpeg": (picture, "JPEG", {"exif": exif, "icc_profile": b"profile" * 20}),
        "progressive": (picture, "JPEG", {"progressive": True}),
        "mpo": (picture, "MPO", {"save_all": True, "append_images": [picture]}),
        "png": (picture, "PNG", {"icc_profile": b"profile" * 20}),
        "png16": (picture.convert("I").convert("I;16"), "PNG", {}),
        "palette": (picture.quantize(16), "PNG", {"transparency": bytes(range(16))}),
        "apng": (picture, "PNG", {"save_all": True, "append_images": [picture.rotate(180)]}),
        "gif": (picture.quantize(16), "GIF", {"save_all": True, "append_images": [picture.rotate(180).quantize(16)]}),
        "bmp": (picture, "BMP", {}),
        "bmp8": (picture.quantize(16), "BMP", {}),
        "ppm": (picture, "PPM", {}),
        "webp": (picture, "WEBP", {"exif": exif}),
        "lossless": (picture.convert("RGBA"), "WEBP", {"lossless": True, "save_all": True, "append_images": [picture]}),
        "tiff": (picture, "TIFF", {}),
        "cmyk": (picture.convert("CMYK"), "TIFF", {"save_all": True, "append_images": [picture]}),
        **{
            f"tiff-{kind}": (picture, "TIFF", {"compression": kind})
            for kind in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
        },
        "fax": (picture.convert("1"), "TIFF", {"compression": "group4"}),
    }
    found = {}
    for name, (image, kind, more) in kinds.items():
        file = io.BytesIO()
        image.save(file, kind, **more)
        found[name] = file.getvalue()
    return found


def _make_image(random: Random, folder: Path) -> Path:
    name = random.choice(list(_pictures()))
    data = _pictures()[name]
    change = next((change for start, change in _CHANGES.items() if data.startswith(start)), mutated)
    data = change(random, data) if random.random() < 0.6 else mutated(random, data)
    path = folder / random.choice(("photo.jpg", "photo.png", "photo.tif", "photo\udcff.webp"))
    path.write_bytes(data)
    return path


def _png(random: Random, data: bytes) -> bytes:
    """Chunks with other contents and the right sums: decoders look no further where a sum is wrong."""
    chunks, place = [], 8
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += size + 12
    for _ in range(random.choice((1, 1, 2, 3))):
        i = random.randrange(len(chunks))
        kind, content = chunks[i]
        what = random.random()
        if what < 0.3:
            header = [random.choice(_SIDES[1:]), random.choice(_SIDES[1:])]
            header[random.randrange(2)] = random.choice((1, 17, 4096))
            more = bytes([random.choice((1, 2, 4, 8, 16)), random.choice((0, 2, 3, 4, 6)), 0, 0, random.randrange(2)])
            chunks[0] = b"IHDR", struct.pack(">II", *header) + more
            # zeros for all its rows, as far as they are
            if random.random() < 0.5:
                chunks[1:-1] = [(b"IDAT", _zeros(random.choice((10**4, 10**7, 3 * 10**8))))]
        elif what < 0.5:
            bomb = _zeros(random.choice((10**3, 10**7, 10**8)))
            kind, start = random.choice(
                (
                    (b"zTXt", b"a\0\0"),
                    (b"iTXt", b"a\0\1\0a\0a\0"),
                    (b"iCCP", b"a\0\0"),
                    (b"IDAT", b""),
                    (b"fdAT", b"\0" * 4),
                )
            )
            chunks[1:1] = [(kind, start + bomb)] * random.choice((1, 1, 70))
        elif what < 0.8:
            chunks[i] = kind, mutated(random, content)
        elif what < 0.9:
            chunks[i:i] = [chunks[random.randrange(len(chunks))]] * random.choice((1, 1000))
        else:
            chunks[i] = random.choice((b"acTL", b"fcTL", b"PLTE", b"tRNS", b"cHRM", b"eXIf", b"pHYs")), content
    framed = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return data[:8] + b"".join(framed)


@cache
def _zeros(size: int) -> bytes:
    return zlib.compress(bytes(size))


def _tiff(random: Random, data: bytes) -> bytes:
    """Other values in the entries of the first directory: sizes, strips, tiles, codecs and counts."""
    changed = bytearray(data)
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    for _ in range(random.choice((1, 1, 2, 3))):
        place = start + 2 + 12 * random.randrange(count)
        what = random.random()
        if what < 0.6:
            # as one number of four bytes
            value = random.choice((*_SIDES, 2, 3, 4, 8, 16, 32, 64, 32773, 32946, 50000))
            struct.pack_into("<HII", changed, place + 2, 4, 1, value)
        elif what < 0.8:
            tag = random.choice(
                (254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 347)
            )
            struct.pack_into("<H", changed, place, tag)
        else:
            size = random.choice((2, len(data) // 8, 2**16, 2**31, 2**32 - 1))
            struct.pack_into("<HI", changed, place + 2, random.randrange(14), size)
    return bytes(changed)


def _numbers(*places: tuple[int, str]) -> Callable[[Random, bytes], bytes]:
    """Changes extreme values at these places of a header."""

    def change(random: Random, data: bytes) -> bytes:
        changed = bytearray(data)
        for place, code in random.sample(places, random.choice((1, 2))):
            struct.pack_into(code, changed, place, random.choice(_SIDES) % 2 ** (8 * struct.calcsize(code)))
        return bytes(changed)

    return change


def _ppm(random: Random, data: bytes) -> bytes:
    size = " ".join(str(random.choice((*_SIDES, -1, 10**30))) for _ in range(2))
    kind = random.choice(("P1", "P2", "P3", "P4", "P5", "P6", "Pf", "PyP", "P0CMYK"))
    return f"{kind}\n{size}\n{random.choice((1, 255, 65535, 2**31, -1.0))}\n".encode() + data[13:]


# the first bytes of a format -> how its files are changed
_CHANGES: dict[bytes, Callable[[Random, bytes], bytes]] = {
    b"\x89PNG": _png,
    b"II*\0": _tiff,
    b"BM": _numbers((10, "<I"), (14, "<I"), (18, "<I"), (22, "<I"), (26, "<H"), (28, "<H"), (30, "<I"), (46, "<I")),
    b"GIF8": _numbers((6, "<H"), (8, "<H"), (10, "<B"), (11, "<B")),
    # where a VP8X chunk has the canvas, and the frame's size stands in a lossy file
    b"RIFF": _numbers((4, "<I"), (16, "<I"), (20, "<B"), (24, "<H"), (26, "<H"), (27, "<H"), (28, "<H")),
    b"P6": _ppm,
}


def _read_image(path: Path) -> object:
    return _USED(images.read(path))


_USED = eval_transform(224, (0.5,) * 3, (0.5,) * 3, 0.875)


# ---- COCO's JSON


@cache
def _jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(file, "JPEG")
    return file.getvalue()


@cache
def _annotations() -> dict[str, Any]:
    square, triangle = [2, 2, 20, 2, 20, 20, 2, 20], [1.5, 1.5, 30.25, 8, 12, 28.75]
    kinds: list[Any] = [[square], [triangle, square], {"size": [32, 40], "counts": [100, 80, 1100]}]
    kinds.append({"size": [32, 40], "counts": rle.frPyObjects(kinds[2], 32, 40)["counts"].decode()})
    return {
        "info": {"year": 2026},
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 32} for i in (1, 2)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [
            {"id": i, "image_id": 1 + i % 2, "category_id": 3 + i % 2 * 4, "bbox": [1, 2, 20.5, 18], "area": 300.5,
             "iscrowd": 0, "segmentation": kinds[i % 4]}
            for i in range(6)
        ],
    }  # fmt: skip


def _coco(random: Random) -> bytes:
    content = _annotations()
    if random.random() < 0.5:
        return mutated_text(random, content)
    content = json.loads(json.dumps(content))
    for _ in range(random.choice((1, 2, 4))):
        one = random.choice(content["annotations"])
        one["segmentation"] = random.choice((_far_polygons, _runs, _zigzag))(random)
    if random.random() < 0.2:
        content["images"][0] |= {"width": random.choice(_SIDES), "height": random.choice(_SIDES)}
    if random.random() < 0.1:
        content["annotations"] *= max(1, min(3000, 10**6 // len(json.dumps(content))))
        for i, one in enumerate(content["annotations"]):
            content["annotations"][i] = {**one, "id": i}
    return json.dumps(content).encode()


def _far_polygons(random: Random) -> Any:
    far = random.choice((50.0, 1e4, 999_999.0, 1e6, 1e9, 1e308))
    count = random.choice((1, 1, 3, 100))
    return [[random.uniform(-far, far) for _ in range(2 * random.choice((3, 4, 40)))] for _ in range(count)]


def _zigzag(random: Random) -> Any:
    far, count = random.choice((40, 10**6 - 1)), random.choice((10, 1000, 20_000))
    return [[value for i in range(count) for value in (far * (i % 2 * 2 - 1), random.randrange(-5, 40))]]


def _runs(random: Random) -> Any:
    counts = random.choice(
        (
            lambda: "o" * random.choice((3, 200, 10**6)),
            lambda: "".join(chr(48 + random.randrange(64)) for _ in range(random.choice((5, 50, 5000)))),
            lambda: [random.choice((0, 1, -1, 10**30, True, 32 * 40)) for _ in range(random.choice((1, 3, 1000)))],
            lambda: [0] * random.choice((10, 10**5)) + [1280],
        )
    )()
    return {"size": random.choice(([32, 40], [40, 32], [2**31, 2**31])), "counts": counts}


def _make_coco(random: Random, folder: Path) -> Path:
    folder = folder / "data"
    (folder / "annotations").mkdir(parents=True)
    (folder / "val").mkdir()
    (folder / "annotations/instances_val.json").write_bytes(_coco(random))
    for i in (1, 2):
        (folder / f"val/{i}.jpg").write_bytes(_jpeg(40, 32))
    return folder


def _members(random: Random) -> dict[str, bytes]:
    text = _coco(random) if random.random() < 0.5 else json.dumps(_annotations()).encode()
    return {"annotations/instances_val.json": text, **{f"val/{i}.jpg": _jpeg(40, 32) for i in (1, 2)}}


def _make_coco_zip(random: Random, folder: Path) -> Path:
    path = folder / "all.zip"
    path.write_bytes(_archive(random, _members(random)))
    return path


def _read_coco(path: Path) -> object:
    found = CocoImages(path, "val", masks=True, malformed="skip")
    return [found[i] for i in range(len(found))], [str(problem) for problem in found.problems]


def _read_strictly(path: Path) -> object:
    found = CocoImages(path, "val", masks=True)
    return [found[i] for i in range(len(found))]


# ---- zip archives


def _archive(random: Random, members: dict[str, bytes]) -> bytes:
    """An archive that is changed as a whole, or in the directory at its end: sizes, methods, flags and places."""
    if random.random() < 0.5:
        return mutated_zip(random, members)
    data = bytearray(zip_of(members, random.choice((0, 8))))
    for _ in range(random.choice((1, 2))):
        place = -1
        for _ in range(random.randrange(1, 1 + len(members))):
            place = data.find(b"PK\x01\x02", place + 1)
        at, code = random.choice(((8, "<H"), (10, "<H"), (16, "<I"), (20, "<I"), (24, "<I"), (28, "<H"), (42, "<I")))
        value = random.choice((1, 0, 8, 9, 12, 14, 99, 2**11, 700 * 1024**2, *_SIDES))
        struct.pack_into(code, data, place + at, value % 2 ** (8 * struct.calcsize(code)))
    return bytes(data)


@cache
def _pairs() -> dict[str, bytes]:
    mask = io.BytesIO()
    Image.frombytes("L", (40, 32), bytes(i % 3 for i in range(40 * 32))).save(mask, "PNG")
    classes = {"classes": ["a", "b", "c"], "palette": [[0, 0, 0], [255, 0, 0], [0, 255, 0]]}
    members = {"classes.json": json.dumps(classes).encode()}
    for i in (1, 2):
        members |= {f"images/val/{i}.jpg": _jpeg(40, 32), f"annotations/val/{i}.png": mask.getvalue()}
    return members


def _make_masks(random: Random, folder: Path) -> Path:
    members = dict(_pairs())
    what = random.random()
    if what < 0.3:
        members["classes.json"] = mutated_text(random, json.loads(members["classes.json"]))
    elif what < 0.4:
        members["classes.json"] = b"[" * 100_000
    elif what < 0.45:
        members["classes.json"] = b" " * random.choice((10**6, 10**8))
    elif what < 0.6:
        name = "annotations/val/1.png"
        members[name] = _png(random, members[name])
    path = folder / "masks.zip"
    path.write_bytes(zip_of(members, 8) if 0.3 < what < 0.6 else _archive(random, members))
    return path


def _read_masks(path: Path) -> object:
    pairs = Pairs("masks", path, "val")
    return [pairs[i] for i in range(len(pairs))]


# ---- tar archives


def _tar(random: Random, files: list[tuple[str, bytes]]) -> bytes:
    """An archive with changed headers that have the right sums, with links and with long records."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=random.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))) as tar:
        for name, data in files:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            what = random.random()
            if what < 0.1:
                header.name = random.choice(
                    ("x" * 300 + ".png", "a/b\x1b[2J.png", "a\udcff/b.png", "../b.png", "/b.cls", "b")
                )
            elif what < 0.15:
                header.type, header.size = random.choice((tarfile.SYMTYPE, tarfile.LNKTYPE)), 0
                header.linkname = random.choice((files[0][0], name, "/etc/passwd", "y" * 300))
            elif what < 0.2:
                key = random.choice(
                    ("size", "path", "GNU.sparse.major", "GNU.sparse.map", "GNU.sparse.size", "mtime", "x")
                )
                value = random.choice(("-1024", "0", "1", "10" * 20, "1,2,3", "0,99999999999", "x" * 20_000, "\0"))
                header.pax_headers = {key: value}
            tar.addfile(header, io.BytesIO(data))
    data = bytearray(content.getvalue())
    for _ in range(random.choice((0, 1, 1, 3))):
        _change_header(random, data)
    return mutated(random, bytes(data)) if random.random() < 0.3 else bytes(data)


def _change_header(random: Random, data: bytearray) -> None:
    headers = [place for place in range(0, len(data), 512) if data[place + 257 : place + 262] == b"ustar"]
    if not headers:
        return
    place = random.choice(headers)
    what = random.random()
    if what < 0.6:
        value = random.choice((0, 1, 511, 512, 10**6, 8**11 - 1, -1, -512, -1024, -1536, 2**40, 2**62))
        field = (
            b"%011o\0" % value
            if 0 <= value < 8**11
            else (b"\xff" if value < 0 else b"\x80") + (value % 2**88).to_bytes(11, "big")
        )
        data[place + 124 : place + 136] = field
    elif what < 0.9:
        data[place + 156 : place + 157] = random.choice(
            (b"0", b"1", b"2", b"3", b"5", b"6", b"7", b"L", b"K", b"S", b"x", b"g")
        )
    else:
        data[place : place + 512] = mutated(random, bytes(data[place : place + 512]))[:512].ljust(512, b"\0")
    data[place + 148 : place + 156] = b" " * 8
    data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])


def _make_shards(random: Random, folder: Path) -> Path:
    folder = folder / "data"
    (folder / "val").mkdir(parents=True)
    files = []
    for i in range(4):
        number = str(i % 2).encode()
        if random.random() < 0.1:
            number = random.choice(
                (b"100000000", b"-1", b"9" * 5000, b"1.0", b"cat", b"", b"\xff", "²".encode(), bytes(10**6))
            )
        files += [(f"a/{i}.jpg", _jpeg(8, 8)), (f"a/{i}.cls", number)]
    (folder / "val/0.tar").write_bytes(_tar(random, files))
    if random.random() < 0.3:
        names = random.choice(
            (b"ant\nbee\n", b"a\x1b[2J\r\nb", b"\xff\xfe", b"", b"x" * 5000 + b"\nb", b"a\n" * 300_000)
        )
        (folder / "val/classes.txt").write_bytes(names)
    return folder


def _make_tar(random: Random, folder: Path) -> Path:
    folder = folder / "data"
    folder.mkdir()
    files = [(f"{name}/{i}.jpg", _jpeg(8, 8)) for name in ("ant", "bee") for i in range(2)]
    if random.random() < 0.2:
        files = [
            (f"{name}.tar", _tar(random, [(f"{i}.jpg", _jpeg(8, 8)) for i in range(2)])) for name in ("ant", "bee")
        ]
    (folder / "val.tar").write_bytes(_tar(random, files))
    return folder


def _read_source(folder: Path) -> object:
    found = images.ImageSet(source_of(folder, "val"), _USED, unreadable=2)
    return [found[i] for i in range(len(found))], found.classes


TARGETS = (
    Target(
        "image", "does a damaged or huge image end in one line?", _make_image, _read_image, (ImageError,)
    ),
    Target(
        "coco", "do annotations in COCO's JSON ask for too much, or end the process?", _make_coco, _read_coco,
        (ImageError,),
    ),
    Target(
        "coco-zip", "does a damaged zip archive of COCO's layout end in one line?", _make_coco_zip, _read_strictly,
        (ImageError,),
    ),
    Target("masks", "do masks and classes in a zip archive end in one line?", _make_masks, _read_masks, (ImageError,)),
    Target("shards", "do damaged shards of webdataset end in one line?", _make_shards, _read_source, (ImageError,)),
    Target(
        "class-tar", "does a damaged tar archive of classes end in one line?", _make_tar, _read_source,
        (ImageError,),
    ),
)  # fmt: skip
