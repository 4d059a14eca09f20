"""Every published key format loads, nothing that is no weights does, and errors name file, key and shapes."""

import pickle
import re
import struct
from collections import OrderedDict

import pytest
import timm
import torch
from safetensors.torch import save_file

import replknet
from replknet.models import CheckpointError, load_checkpoint, load_model, read_state_dict
from replknet.models.key_formats import from_megengine, from_mmpretrain, to_official


def network(**kwargs):
    return timm.create_model("replknet_test", **kwargs).eval()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def mmpretrain(state):
    """Official keys under mmpretrain's names."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^norm\.", "stages.3.norm.", key)
        renamed[re.sub(r"^head\.", "head.fc.", key) if key.startswith("head.") else f"backbone.{key}"] = value
    return renamed


def megengine(state):
    """Official keys as MegEngine's names and array shapes."""
    depths = {}
    for key in state:
        if match := re.match(r"stages\.(\d)\.blocks\.(\d+)\.", key):
            depths[int(match[1])] = max(depths.get(int(match[1]), 0), int(match[2]) // 2 + 1)
    inside = {
        0: {"prelkb_bn": "pre_bn", "pw1": "pw1", "large_kernel.lkb_origin": "dw.dw_large", "pw2": "pw2",
            "large_kernel.small_conv": "dw.dw_small_5"},
        1: {"preffn_bn": "premlp_bn", "pw1": "mlp.fc1", "pw2": "mlp.fc2"},
    }  # fmt: skip
    translated = OrderedDict()
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        array = value.numpy()
        if key.endswith("conv.weight") and array.shape[1] == 1:
            array = array[:, None]
        if "bn." in key or key.startswith("norm."):
            array = array.reshape(1, -1, 1, 1)
        if key == "stem.0.conv.weight":
            array = array[:, ::-1].copy()
        new = re.sub(r"^stem\.(\d)", lambda m: f"stem.{2 * int(m[1])}", key)
        if match := re.match(r"stages\.(\d)\.blocks\.(\d+)\.(.+?)\.((?:conv\.|bn\.)?\w+)$", key):
            stage, block, part, leaf = int(match[1]), int(match[2]), match[3], match[4]
            flat = sum(depths[s] + 1 for s in range(stage)) + block // 2
            new = f"blocks.{flat}.{inside[block % 2][part]}.{leaf}"
        elif match := re.match(r"transitions\.(\d)\.(\d)\.(.+)", key):
            flat = sum(depths[s] + 1 for s in range(int(match[1]) + 1)) - 1
            new = f"blocks.{flat}.{2 * int(match[2])}.{match[3]}"
        translated[new] = array
    return translated


def test_mmpretrain_and_back_is_the_identity():
    state = network().state_dict()
    theirs = mmpretrain(state)
    assert "backbone.stages.3.norm.weight" in theirs
    assert "head.fc.bias" in theirs
    assert equal(from_mmpretrain(theirs), dict(state))


def test_megengine_and_back_is_the_identity():
    state = network().state_dict()
    theirs = megengine(state)
    assert "blocks.2.pre_bn.weight" in theirs
    assert theirs["blocks.0.dw.dw_large.conv.weight"].shape == (8, 1, 1, 9, 9)
    assert equal(dict(sorted(from_megengine(theirs).items())), dict(sorted(state.items())))


@pytest.mark.parametrize("name", ["replknet_31b", "replknet_xl"])
def test_every_key_of_the_official_networks_survives_all_formats(name):
    model = timm.create_model(name, depths=(1, 1, 2, 1), channels=(8, 16, 24, 32))
    state = model.state_dict()
    for translate in (mmpretrain, megengine):
        assert to_official(translate(state)).keys() == state.keys()


WRAPPERS = {
    "flat": lambda s: s,
    "model": lambda s: {"model": s, "epoch": 3},
    "state_dict": lambda s: {"state_dict": s, "meta": {"epoch": 3}},
    "module": lambda s: {"module": s},
    "data parallel": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled": lambda s: {"state_dict": {f"_orig_mod.{k}": v for k, v in s.items()}},
    "backbone": lambda s: {"state_dict": {f"backbone.{k}": v for k, v in s.items()}},
    "22K head": lambda s: {re.sub(r"^head\.", "head.cls_22k.", k): v for k, v in s.items()},
    "mmpretrain": lambda s: {"state_dict": mmpretrain(s)},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_pytorch_files_in_every_wrapper(tmp_path, wrap, legacy):
    source, target = network(), network()
    torch.save(wrap(source.state_dict()), tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    load_checkpoint(target, tmp_path / "x.pth")
    assert equal(dict(source.state_dict()), dict(target.state_dict()))


@pytest.mark.parametrize("protocol", [2, 4])
def test_megengine_pickle(tmp_path, protocol):
    source, target = network(), network()
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(megengine(source.state_dict()), protocol))
    load_checkpoint(target, tmp_path / "x.pkl")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(source(x), target(x))


def test_a_pickle_with_code_is_refused_before_it_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(
        CheckpointError, match=r"evil\.pkl cannot be read as weights: it holds builtins\.print, which is r"
    ):
        read_state_dict(path)
    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth cannot be read as weights: it holds builtins\.print, which"):
        read_state_dict(tmp_path / "evil.pth")


def test_files_that_are_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing\.pth"):
        read_state_dict(tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    with pytest.raises(
        CheckpointError, match=r"text\.pth is no checkpoint: expected safetensors, .* begins with b'<h'"
    ):
        read_state_dict(tmp_path / "text.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"empty\.pth is no checkpoint"):
        read_state_dict(tmp_path / "empty.pth")
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "other.pth")
    with pytest.raises(
        CheckpointError, match=r"other\.pth holds no flat dict of tensors: epoch, lr are something else"
    ):
        read_state_dict(tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"list\.pth holds no dict of tensors but list"):
        read_state_dict(tmp_path / "list.pth")


@pytest.mark.parametrize("kind", ["pth", "pkl", "safetensors"])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_file_cut_short(tmp_path, kind, part):
    state = network().state_dict()
    path = tmp_path / f"cut.{kind}"
    if kind == "pth":
        torch.save(state, path)
    elif kind == "pkl":
        path.write_bytes(pickle.dumps(megengine(state)))
    else:
        save_file(state, path)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=rf"cut\.{kind} cannot be read as weights"):
        read_state_dict(path)


def saved(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "x.pth")
    return tmp_path / "x.pth"


def test_mismatch_names_keys_and_shapes_and_changes_nothing(tmp_path):
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = network().state_dict()
    del state["norm.weight"]
    state["extra"] = torch.zeros(1)
    state["stem.0.conv.weight"] = torch.zeros(16, 3, 3, 3)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as info:
        load_checkpoint(model, tmp_path / "x.pth")
    text = str(info.value)
    assert (
        "x.pth does not fit RepLKNet: 1 keys missing in the file: norm.weight; 1 keys not in the model: extra" in text
    )
    assert "stem.0.conv.weight is [16, 3, 3, 3] in the file and [8, 3, 3, 3] in the model" in text
    assert equal(before, dict(model.state_dict()))


def test_other_classifier_says_how_many_classes(tmp_path):
    path = saved(tmp_path, network(num_classes=21))
    with pytest.raises(CheckpointError, match="The classifiers differ: build the model with num_classes=21"):
        load_checkpoint(network(), path)


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        (False, r"merged form and the model in the training form: load into replknet\.merge\(model, fold_bn=False\)"),
        (True, r"folded form and the model in the training form: load into replknet\.merge\(model\)"),
    ],
)
def test_other_form_says_how_to_load_it(tmp_path, fold, message):
    model = network()
    path = saved(tmp_path, replknet.merge(model, fold_bn=fold))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, path)
    load_checkpoint(replknet.merge(model, fold_bn=fold), path)


@pytest.mark.parametrize("form", ["training", "merged", "folded"])
@pytest.mark.parametrize("wrap", ["pth", "safetensors"])
def test_load_model_understands_the_architecture(tmp_path, form, wrap):
    model = network(num_classes=7, in_chans=1)
    if form != "training":
        model = replknet.merge(model, fold_bn=form == "folded")
    path = tmp_path / f"x.{wrap}"
    if wrap == "pth":
        torch.save(model.state_dict(), path)
    else:
        replknet.models.save_model(
            model,
            path,
            replknet.models.Description(config=model.cfg, num_classes=7, in_chans=1, classes=tuple("abcdefg")),
        )
    found, description = load_model(path)
    x = torch.randn(1, 1, 64, 64)
    torch.testing.assert_close(found(x), model.eval()(x))
    assert description.num_classes == 7
    assert description.classes == (tuple("abcdefg") if wrap == "safetensors" else ())
    if form == "training" or wrap == "safetensors":
        assert description.name == "replknet_test"


def test_a_saved_model_is_a_file_like_any_other(tmp_path):
    model = network()
    path = tmp_path / "new folder" / "x.safetensors"
    replknet.models.save_model(model, path, replknet.models.Description(config=model.cfg, num_classes=10))
    (tmp_path / "y").touch()
    assert path.stat().st_mode == (tmp_path / "y").stat().st_mode
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]


def test_xl_is_known_by_its_channels(tmp_path):
    with torch.device("meta"):
        state = timm.create_model("replknet_xl").state_dict()
    description = replknet.models.model_files.described(state)
    assert (description.name, description.image_size, description.mean) == ("replknet_xl", 320, (0.5, 0.5, 0.5))
    with torch.device("meta"):
        state = timm.create_model("replknet_31b").state_dict()
    assert replknet.models.model_files.described(state).name == "replknet_31b"


def test_load_model_errors(tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "r.pth")
    with pytest.raises(CheckpointError, match=r"r\.pth holds no RepLKNet classifier: expected keys such as stem\.0"):
        load_model(tmp_path / "r.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"replknet": '{"config": {"sides": 3}}'})
    with pytest.raises(CheckpointError, match=r"the config has the unknown field sides; known are kernels"):
        load_model(tmp_path / "x.safetensors")
    state = network().state_dict()
    del state["stages.2.blocks.2.pw1.bn.bias"]
    torch.save(state, tmp_path / "y.pth")
    with pytest.raises(CheckpointError, match=r"holds no complete RepLKNet: 1 keys missing .*blocks\.2\.pw1\.bn\.bias"):
        load_model(tmp_path / "y.pth")


def test_pretrained_loads_through_timms_hook(tmp_path):
    source = network()
    torch.save({"state_dict": mmpretrain(source.state_dict())}, tmp_path / "mm.pth")
    overlay = {"file": str(tmp_path / "mm.pth")}
    model = timm.create_model("replknet_test", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert equal(dict(source.state_dict()), dict(model.state_dict()))
    gray = timm.create_model(
        "replknet_test", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=4
    )
    assert gray.stem[0].conv.weight.shape[1] == 1
    assert len(gray.head.bias) == 4
    features = timm.create_model("replknet_test", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    assert torch.equal(features.model.stem[0].conv.weight, source.stem[0].conv.weight)


def test_a_wrong_safetensors_header(tmp_path):
    (tmp_path / "x").write_bytes(struct.pack("<Q", 10**9) + b"{" + b" " * 20)
    with pytest.raises(CheckpointError, match="is cut short or damaged: its header declares 1,000,000,000 bytes, and"):
        read_state_dict(tmp_path / "x")
