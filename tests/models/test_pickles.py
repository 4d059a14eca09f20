"""Pickles of weights: nothing in them runs, nothing crashes, and what a training keeps beside weights is left out."""

import argparse
import io
import pickle
import pickletools
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from replknet.models import CheckpointError, read_state_dict

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3)}


def equal(state):
    return list(state) == ["a.weight"] and torch.equal(state["a.weight"], WEIGHTS["a.weight"])


def written(tmp_path, data, name="x.pkl"):
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["f2", "f4", ">f4", "f8", "i8", "u1", "?"])
def test_arrays_of_every_plain_dtype(tmp_path, dtype, protocol):
    for order in "CF":
        array = np.array([[1, 0, 2], [3, 4, 5]], dtype, order=order)
        state = read_state_dict(written(tmp_path, pickle.dumps({"state_dict": {"a": array}}, protocol)))
        assert torch.equal(state["a"], torch.tensor(array.astype(array.dtype.newbyteorder("=")).copy()))


@pytest.mark.parametrize(
    ("instructions", "told"),
    [
        # a dtype whose flags say that its numbers are objects: numpy itself ends with SIGSEGV
        (
            b"cnumpy\nndarray\n0cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n(K\x00tC\x01b\x87R"
            b"(K\x01(K\x02tcnumpy\ndtype\nX\x02\x00\x00\x00O8\x85R\x89C\x10" + b"A" * 16 + b"tb",
            r"refused numpy.dtype\('O8'\): only plain numbers are read",
        ),
        (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n(K\x00tC\x01b\x87R"
            b"(K\x01(J\xff\xff\xff\x7ftcnumpy\ndtype\nX\x02\x00\x00\x00f8\x85R\x89C\x08" + b"A" * 8 + b"tb",
            "cannot reshape array of size 1 into shape",
        ),
        (b"cnumpy\nndarray\n)Rb", "it uses a value that it has not made"),
        (b"cos\nsystem\nX\x04\x00\x00\x00true\x85R", "it holds os.system, which is refused, since it is no tensor"),
        (b"cnumpy\nload\n)R", "it holds numpy.load, which is refused"),
        (b"ccollections\nOrderedDict\n}b", "it would change collections.OrderedDict itself"),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00zlib\x86R", "refused _codecs.encode: only latin1"),
        (b"}r\xff\xff\xff\x7f", "it remembers a value at place 2147483647, and has 2 values"),
        (b"K\x01" + b"2\x86" * 60, "asks for .* parts in a tuple, more than the 1,000,000 allowed"),
    ],
    ids=["objects", "sizes", "empty", "code", "numpy", "class", "codec", "memo", "tuples"],
)
def test_hostile_pickles_end_in_a_line(tmp_path, instructions, told):
    path = written(tmp_path, b"\x80\x03" + instructions + b".")
    with pytest.raises(CheckpointError, match=rf"x\.pkl (cannot be read as weights: )?{told}") as error:
        read_state_dict(path)
    assert "\n" not in str(error.value)


def test_crafted_flags_of_a_dtype_are_not_taken(tmp_path):
    # valid but for the flags in the state of the dtype, which say "objects, to be counted"
    array = pickle.dumps({"a": np.zeros(3, "f8")}, 2)
    plain = b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
    assert plain in array
    crafted = array.replace(plain, b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ft")
    assert torch.equal(read_state_dict(written(tmp_path, crafted))["a"], torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("depth", [1, 2])
def test_a_dict_that_contains_itself_ends(tmp_path, depth):
    outer = inner = {}
    for _ in range(depth):
        inner["model"] = inner = {} if depth > 1 and inner is outer and "model" not in outer else outer
    with pytest.raises(CheckpointError, match=r"x\.pkl holds a dict that contains itself"):
        read_state_dict(written(tmp_path, pickle.dumps(outer)))
    torch.save(outer, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth holds a dict that contains itself"):
        read_state_dict(tmp_path / "x.pth")


def repacked(data, compression=zipfile.ZIP_DEFLATED, **changes):
    """An archive with other members, or packed otherwise."""
    content = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(content, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, changes.get(name.rpartition("/")[2], old.read(name)))
    return content.getvalue()


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def test_an_archive_that_inflates_is_refused_before_it_does(tmp_path):
    bomb = repacked(saved(WEIGHTS), **{"0": bytes(300 * 2**20)})
    assert len(bomb) < 2**20
    with pytest.raises(CheckpointError, match=r"its members would inflate \(archive/data.pkl\), and torch packs none"):
        read_state_dict(written(tmp_path, bomb, "x.pth"))


def enlarged(pkl):
    """A number of numbers, and sizes, that the file does not have."""
    return pkl.replace(b"K\x06", b"J\0\0\0\x01").replace(b"K\x02K\x03\x86", b"M\0\x10M\0\x10\x86")


def repeated(pkl):
    """A view of one number that claims to be many."""
    return pkl.replace(b"K\x03K\x01\x86", b"K\0K\0\x86").replace(b"K\x02K\x03\x86", b"M\xff\xffM\xff\xff\x86")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (enlarged, "cannot be read as weights"),
        (repeated, r"declares a\.weight \[65535, 65535\], and has fewer numbers for it"),
        (lambda pkl: pkl.replace(b"FloatStorage", b"UntypedStorage"), "cannot be read as weights"),
        (
            lambda pkl: pkl.replace(b"_rebuild_tensor_v2", b"_rebuild_sparse_tensor"),
            r"it holds torch\._utils\._rebuild",
        ),
    ],
)
def test_no_tensor_claims_more_than_its_file_has(tmp_path, change, told):
    data = saved(WEIGHTS)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        pkl = archive.read("archive/data.pkl")
    assert change(pkl) != pkl
    path = written(tmp_path, repacked(data, zipfile.ZIP_STORED, **{"data.pkl": change(pkl)}), "x.pth")
    with pytest.raises(CheckpointError, match=told):
        read_state_dict(path)


def test_tied_weights_are_read_and_endless_sharing_is_not(tmp_path):
    tensor = torch.zeros(1000, 1000)
    torch.save({"a": tensor, "b": tensor}, tmp_path / "tied.pth")
    assert list(read_state_dict(tmp_path / "tied.pth")) == ["a", "b"]
    torch.save({str(i): tensor for i in range(50)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="bytes of tensors that share the bytes of the file, more than the"):
        read_state_dict(tmp_path / "x.pth")


def test_a_file_may_be_overwritten_while_its_weights_are_in_use(tmp_path):
    torch.save({"a": torch.ones(1_000_000)}, tmp_path / "x.pth")
    state = read_state_dict(tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(b"")
    assert state["a"].sum() == 1_000_000


class HistoryBuffer:
    """As mmengine's: it pickles its own functions."""

    def mean(self):
        """The mean of the values."""

    def __getstate__(self):
        return {"history": np.arange(3.0), "statistics": {"mean": HistoryBuffer.mean}}


@pytest.fixture
def mmengine(monkeypatch):
    """A package of that name, so that a pickle has its names."""
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["mmengine.logging.history_buffer"].HistoryBuffer = HistoryBuffer
    monkeypatch.setattr(HistoryBuffer, "__module__", "mmengine.logging.history_buffer")
    monkeypatch.setattr(HistoryBuffer.mean, "__module__", "mmengine.logging.history_buffer")
    return HistoryBuffer


@pytest.mark.parametrize("legacy", [False, True])
def test_training_checkpoints_of_others_are_read(tmp_path, legacy, mmengine):
    options = {"_use_new_zipfile_serialization": not legacy}
    args = argparse.Namespace(lr=4e-3, data="imagenet", nested=argparse.Namespace(a=1))
    official = {"model": WEIGHTS, "optimizer": {"state": {0: {"step": 3}}}, "epoch": 299, "args": args}
    assert equal(read_state_dict(written(tmp_path, saved(official, **options), "x.pth")))
    meta = {"experiment_name": "x", "epoch": 3, "best": np.float64(0.5), "counts": np.int64(3), "time": np.zeros(2)}
    hub = {"loss": mmengine(), "lr": mmengine()}
    theirs = {"meta": meta, "message_hub": {"log_scalars": hub}, "state_dict": WEIGHTS}
    data = saved(theirs, **options)
    assert b"history_buffer" in data
    assert equal(read_state_dict(written(tmp_path, data, "x.pth")))
    # the reader of others must not be changed by it
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "x.pth", weights_only=True)


class Unknown:
    pass


def test_an_object_of_another_class_is_named(tmp_path):
    for data, name in ((saved({"model": WEIGHTS, "x": Unknown()}), "x.pth"), (pickle.dumps(Unknown()), "x.pkl")):
        with pytest.raises(
            CheckpointError, match=r"it holds [\w.]*test_pickles\.Unknown, which is refused, since it is"
        ):
            read_state_dict(written(tmp_path, data, name))


def test_a_torchscript_program_is_told_apart(tmp_path):
    module = torch.nn.Linear(1, 1)
    with pytest.warns(FutureWarning, match="torch.jit.trace"):
        torch.jit.trace(module, torch.zeros(1, 1)).save(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="it is a TorchScript program; load it in torch and save its state_dict"):
        read_state_dict(tmp_path / "x.pt")


def test_other_zip_archives_are_no_weights(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    with pytest.raises(CheckpointError, match=r"it has 0 members called data\.pkl, and torch writes one"):
        read_state_dict(tmp_path / "x.npz")


def test_the_longest_pickle_of_ours_is_far_from_the_limit():
    state = {f"stages.2.blocks.{i}.pw1.conv.weight": torch.zeros(1) for i in range(4 * 1171)}
    data = saved(state)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        count = sum(1 for _ in pickletools.genops(archive.read("archive/data.pkl")))
    assert 10 * count < 2_000_000
