"""Files of data sets in folders and zip archives: bounded, checked, and named in the error."""

import io
import json
import os
import struct
import zipfile
from pathlib import Path

import pytest

from replknet import limits
from replknet.data.files import Files, Texts, brief, json_of, text_of
from replknet.data.images import ImageError


def packed(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def directory_changed(path, offset, code, value):
    """Another value in the entry of the first member, in the directory at the archive's end."""
    content = bytearray(path.read_bytes())
    struct.pack_into(code, content, content.find(b"PK\x01\x02") + offset, value)
    path.write_bytes(content)


def refused(path, name, match, most=limits.LIST):
    with pytest.raises(ImageError, match=match) as error:
        Files(path).read(name, most)
    assert "\n" not in str(error.value)


def test_a_member_is_not_inflated_beyond_what_it_may_have(tmp_path):
    # 0.1 MB that would be 100 MB
    path = packed(tmp_path / "a.zip", {"classes.json": bytes(10**8)})
    refused(
        path, "classes.json",
        r"a.zip: classes.json asks for 100,000,000 bytes when it is unpacked, more than the \d,\d+,\d+ allowed; if you "
        r"trust the file, REPLKNET_LIMITS=\d+ allows it",
    )  # fmt: skip
    # an archive that says it packs less tightly than it does
    directory_changed(path, 20, "<I", 2**31)
    refused(path, "classes.json", "asks for 100,000,000 bytes when it is unpacked, more than the 5,9")
    refused(path, "classes.json", "asks for 100,000,000 bytes when it is unpacked, more than the 1,000 al", most=1000)
    # one that declares less than there is gives no more than that
    directory_changed(path, 20, "<I", os.path.getsize(path) - 200)
    directory_changed(path, 24, "<I", 1000)
    refused(path, "classes.json", "cannot be read as a file in a zip archive: Bad CRC-32 for file 'classes.json'")


def test_a_file_of_a_folder_has_a_limit_too(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1001))
    refused(tmp_path, "a", r"a asks for 1,001 bytes, more than the 1,000 allowed", most=1000)
    assert len(Files(tmp_path).read("a", 1001)) == 1001
    refused(tmp_path, "b", "b is no file")


def test_damaged_and_encrypted_members_are_one_line(tmp_path):
    path = packed(tmp_path / "a.zip", {"x": b"content"})
    directory_changed(path, 8, "<H", 1)
    refused(path, "x", "x cannot be read as a file in a zip archive: File 'x' is encrypted.*without a password")
    for method in (9, 12, 14, 99):
        path = packed(tmp_path / "a.zip", {"x": b"content"})
        directory_changed(path, 10, "<H", method)
        refused(path, "x", rf"a.zip: x is compressed with method {method}; expected 8, deflate: pack it again with zip")
    path = packed(tmp_path / "a.zip", {"x": b"content"}, zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"content", b"changed", 1))
    refused(path, "x", "Bad CRC-32 for file 'x'")
    path = packed(tmp_path / "a.zip", {"x": b"content"}, zipfile.ZIP_STORED)
    for place in (20, 24):
        directory_changed(path, place, "<I", 400)
    refused(path, "x", r"cannot be read as a file in a zip archive: EOFError|x ends after \d+ of 400 bytes")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ImageError, match=r"expected a folder or a zip archive .* but .*a.zip is neither"):
        Files(path)
    path = packed(tmp_path / "a.zip", {"x": b"content"})
    directory_changed(path, 0, "<I", 0)
    with pytest.raises(ImageError, match=r"a.zip cannot be read as a zip archive: Bad magic number .*; pack it again"):
        Files(path)


def test_members_that_share_their_bytes_are_bounded_each(tmp_path):
    path = packed(tmp_path / "a.zip", {"x": b"content", "y": b"content"})
    content = bytearray(path.read_bytes())
    second = content.find(b"PK\x01\x02", content.find(b"PK\x01\x02") + 1)
    struct.pack_into("<I", content, second + 42, 0)
    path.write_bytes(content)
    refused(path, "y", "cannot be read as a file in a zip archive: File name in directory 'y' and header b'x' differ")


def test_the_number_of_names_is_bounded(tmp_path, monkeypatch):
    path = packed(tmp_path / "a.zip", {str(i): b"" for i in range(101)})
    monkeypatch.setattr(limits, "FILES", 100)
    with pytest.raises(ImageError, match=r"a.zip asks for 101 files in an archive, more than the 100 allowed"):
        Files(path)


def test_names_that_are_no_utf_8_are_read_and_shown_escaped(tmp_path):
    folder = tmp_path / os.fsdecode(b"data-\xff")
    folder.mkdir()
    name = os.fsdecode(b"\xfe\n.txt")
    (folder / name).write_bytes(b"content")
    assert Files(folder).read(name, 100) == b"content"
    assert Files(folder).below(".") == [name]
    refused(folder, name, r"data-\\xff: \\xfe\\n.txt asks for 7 bytes, more than the 1 allowed", most=1)
    archive = packed(folder / os.fsdecode(b"\xff.zip"), {"x\x1b[2J": b"content"})
    assert Files(archive).read("x\x1b[2J", 100) == b"content"
    refused(archive, "x\x1b[2J", r"data-\\xff/\\xff.zip: x\\x1b\[2J asks for 7 bytes", most=1)


def test_json_is_read_as_utf_8_and_whatever_is_wrong_is_one_line():
    assert json_of('\ufeff{"a": "é"}'.encode(), "x") == {"a": "é"}
    for content, match in (
        (b"[" * 100_000, "x cannot be read as JSON: it is nested too deeply; correct it"),
        (b"1" * 5000, "x cannot be read as JSON: Exceeds the limit"),
        (b"{", "x cannot be read as JSON: Expecting property name"),
        ("é".encode("latin-1"), "x cannot be read as text in UTF-8: 'utf-8' codec can't decode byte 0xe9 in position"),
        ('{"a": 1}'.encode("utf-16"), "x cannot be read as text in UTF-8: .*; save it again in UTF-8"),
    ):
        with pytest.raises(ImageError, match=match):
            json_of(content, "x")
    with pytest.raises(ImageError, match="data cannot be read as text in UTF-8"):
        text_of(b"\xff", "data")


def test_texts_come_back_as_they_were():
    texts = ["a", "", "é", "\udcff", json.dumps([1, 2])]
    found = Texts(texts)
    assert [found[i] for i in range(len(found))] == texts


def test_long_names_are_shortened():
    assert brief("a" * 150) == "a" * 150
    assert brief("\x07" + "a" * 300) == "\\x07" + "a" * 149 + "..."


def test_a_folder_that_cannot_be_named_is_an_error_of_the_system():
    with pytest.raises(OSError, match="File name too long"):
        Files(Path("x" * 300))


def test_an_archive_is_not_inflated_before_it_is_asked(tmp_path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(10**7))
        archive.writestr("x", b"content")
    (tmp_path / "a.zip").write_bytes(content.getvalue())
    assert Files(tmp_path / "a.zip").read("x", 7) == b"content"
