"""Images of users: only raster formats, checked before they are decoded, and one line for whatever is damaged."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from replknet import limits
from replknet.data import images, sources, transforms
from replknet.data.images import FORMATS, ImageError, class_names, decoded, read


def encoded(kind, **more):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (10, 20, 30)).save(file, kind, **more)
    return file.getvalue()


def png(width, height, *chunks):
    """A PNG whose header declares a size; its pixels are missing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + content


def refused(path, match):
    with pytest.raises(ImageError, match=match) as error:
        read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_all_raster_formats_are_read(kind, tmp_path):
    # the ending does not decide
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(kind))
    image = read(path)
    assert (image.mode, image.size) == ("RGB", (8, 6))
    assert np.abs(np.asarray(image, np.int16) - (10, 20, 30)).max() < 4


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_the_first_picture_of_many_is_read(kind, tmp_path):
    more = [Image.new("RGB", (8, 6), (200, i % 256, 0)) for i in range(300)]
    (tmp_path / "x.png").write_bytes(encoded(kind, save_all=True, append_images=more))
    assert np.abs(np.asarray(read(tmp_path / "x.png"), np.int16)[0, 0] - (10, 20, 30)).max() < 8


def test_no_program_is_started_for_postscript(tmp_path, monkeypatch):
    def started(*_, **__):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    (tmp_path / "photo.jpg").write_bytes(encoded("EPS"))
    refused(tmp_path / "photo.jpg", r"photo.jpg cannot be read as an image: its header is not of JPEG, PNG, PPM, .*;")


@pytest.mark.parametrize(("side", "factor"), [(8100, 2), (10_000, 2), (60_000, 57), (2**30, 18014398510)])
def test_the_size_is_checked_before_pixels_are_decoded(side, factor, tmp_path):
    (tmp_path / "x.png").write_bytes(png(side, side))
    # as a user has it: Pillow's own warning is no error
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        refused(
            tmp_path / "x.png",
            rf"x.png asks for {side**2:,} pixels in an image, more than the 64,000,000 allowed; if you trust the file, "
            rf"REPLKNET_LIMITS={factor} allows it",
        )


def test_more_pixels_are_read_for_who_allows_them(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "PIXELS", 10)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    (tmp_path / "x.png").write_bytes(encoded("PNG"))
    refused(tmp_path / "x.png", "asks for 48 pixels in an image, more than the 10 allowed; .* REPLKNET_LIMITS=5")
    monkeypatch.setenv(limits.VARIABLE, "5")
    assert read(tmp_path / "x.png").size == (8, 6)


def test_texts_and_profiles_that_inflate_are_refused(tmp_path):
    bomb = zlib.compress(bytes(10**8))
    for chunk in ((b"zTXt", b"a\0\0" + bomb), (b"iTXt", b"a\0\1\0a\0a\0" + bomb), (b"iCCP", b"a\0\0" + bomb)):
        (tmp_path / "x.png").write_bytes(png(8, 8, chunk))
        refused(tmp_path / "x.png", r"x.png cannot be read as an image: ")


def test_what_is_no_file_is_named(tmp_path):
    refused(tmp_path / "missing.png", r"missing.png is no file; expected an image")
    refused(tmp_path, r"is no file; expected an image")
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", r"pipe.png is no file; expected an image")
    with pytest.raises(ImageError, match=r"no images in .*; known endings"):
        images.files([tmp_path])


def test_warnings_of_pillow_stay_away(tmp_path):
    palette = Image.new("RGB", (8, 6)).quantize(4)
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=bytes(4))
    # Pillow warns of such a palette, and pytest makes an error of a warning
    assert decoded(file, "x").size == (8, 6)


def test_names_that_are_no_utf_8_work(tmp_path):
    for name in (b"ant\xff", b"bee\n\x1b[2J"):
        folder = tmp_path / os.fsdecode(b"data-\xfe") / "val" / os.fsdecode(name)
        folder.mkdir(parents=True)
        (folder / os.fsdecode(b"\xff.png")).write_bytes(encoded("PNG"))
    (folder / os.fsdecode(b"\xfe.png")).write_bytes(b"no image")
    source = sources.source_of(folder.parents[1], "val")
    assert source.classes == ["ant\\xff", "bee\\n\\x1b[2J"]
    assert [source[i][1] for i in (0, 2)] == [0, 1]
    with pytest.raises(ImageError, match=r"data-\\xfe/val/bee\\n\\x1b\[2J/\\xfe.png cannot be read as an image: its"):
        source[1]
    assert len(images.files([folder.parents[1]])) == 3
    with pytest.raises(ImageError, match=r"no image or folder at .*/\\xfd"):
        images.files([tmp_path / os.fsdecode(b"\xfd")])
    with pytest.raises(OSError, match="File name too long"):
        images.files([tmp_path / ("x" * 300)])


def test_names_of_classes_are_checked():
    assert class_names(["a b", "é\u200c", "a\u2028", "a\x85"], "x") == ["a b", "é\u200c", "a\\u2028", "a\\x85"]
    with pytest.raises(ImageError, match=r"x must name each class by a text, got \[1\]"):
        class_names(["a", [1]], "x")
    with pytest.raises(ImageError, match="x asks for 1,001 letters in the name of a class, more than the 1,000"):
        class_names(["a" * 1001], "x")
    with pytest.raises(ImageError, match="x asks for 200,001 classes, more than the 200,000 allowed"):
        class_names(["a"] * 200_001, "x")


def test_a_very_long_image_is_cropped_before_it_is_enlarged(tmp_path):
    # fitted by its shorter side it would have 15 million columns
    Image.new("L", (60_000, 1), 128).save(tmp_path / "x.png")
    transform = transforms.eval_transform(224, (0.0,) * 3, (1.0,) * 3, 0.875)
    found = transform(read(tmp_path / "x.png"))
    assert found.shape == (3, 224, 224)
    assert found.sub(128 / 255).abs().max() < 1e-6


def test_an_unknown_augmentation_is_named():
    with pytest.raises(
        transforms.AugmentationError,
        match=r"auto_augment=zzz cannot be read as an augmentation of timm's: .*; give one such as rand-m9",
    ):
        transforms.train_transform(64, (0.0,) * 3, (1.0,) * 3, "zzz")
