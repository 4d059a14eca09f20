"""One record a task: files are told apart by themselves, and nothing outside of a task's folder knows its name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import replknet.tasks
from replknet.cli.main import main
from replknet.data.images import PHOTOS
from replknet.models import CheckpointError, Description, save_model
from replknet.models.detection_keys import to_mmdet
from replknet.models.key_formats import to_mmseg
from replknet.models.model_files import FIELD, Source
from replknet.models.replknet import CONFIGS
from replknet.tasks import RECIPES, TASKS
from replknet.tasks.detection.files import DetectionDescription, save_detection
from replknet.tasks.files import load, load_network, task_of
from replknet.tasks.segmentation.files import SegmentationDescription, save_segmentation

FOLDER = Path(replknet.tasks.__file__).parent
SEGMENTATION = SegmentationDescription(
    backbone="replknet_test",
    network={},
    classes=("sky", "road"),
    palette=((0, 0, 255), (90, 90, 90)),
    channels=16,
    auxiliary_channels=None,
    align_corners=False,
    scale=None,
    window=None,
    stride=None,
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.25, 0.3),
)
DETECTION = DetectionDescription(
    detector="fcos",
    backbone="replknet_test",
    network={},
    classes=("cell",),
    channels=32,
    scale=(96, 64),
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.25, 0.3),
)
CLASSIFIER = Description(config=CONFIGS["replknet_test"], num_classes=3, image_size=64)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file of each task, with its description."""
    folder = tmp_path_factory.mktemp("tasks")
    torch.manual_seed(0)
    save_model(CLASSIFIER.build(), folder / "classification.safetensors", CLASSIFIER)
    save_segmentation(SEGMENTATION.build(), folder / "segmentation.safetensors", SEGMENTATION)
    save_detection(DETECTION.build(), folder / "detection.safetensors", DETECTION)
    return {name: folder / f"{name}.safetensors" for name in TASKS}


def test_a_task_is_a_folder_with_one_record_of_each_kind():
    folders = {path.parent.name for path in FOLDER.glob("*/recipes.py")}
    assert folders == set(TASKS)
    for task in TASKS.values():
        for part in ("files", "infer", "train", "export", "settings"):
            assert (FOLDER / task.name / f"{part}.py").is_file()
            assert part == "settings" or getattr(task, part) is not None
        assert task.recipes
        assert all(recipe().task == task.name for recipe in task.recipes)
        assert task.options.task == task.name
    assert len(RECIPES) == sum(len(task.recipes) for task in TASKS.values())


@pytest.mark.parametrize("name", TASKS)
def test_a_description_says_the_task(name, saved):
    network = load_network(saved[name])
    assert network.task is TASKS[name]
    assert not network.model.training
    assert type(load(saved[name])) is type(network.model)
    assert load_network(saved[name], name).task.name == name


def test_a_network_comes_in_the_dtype_of_its_file(tmp_path):
    save_model(CLASSIFIER.build().half(), tmp_path / "half.safetensors", CLASSIFIER)
    assert next(load(tmp_path / "half.safetensors").parameters()).dtype == torch.float16
    assert next(load_network(tmp_path / "half.safetensors").model.parameters()).dtype == torch.float32


def test_a_network_is_timed_as_what_it_is(saved, capsys):
    short = ["--against", "merged", "--runs", "2", "--size", "64", "--json"]
    assert main(["bench", "model", str(saved["segmentation"]), *short]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "segmentation"
    assert main(["bench", "model", str(saved["detection"]), *short]) == 2
    assert "is a detector: what is timed takes one batch" in capsys.readouterr().err


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("wanted", TASKS)
def test_a_contradiction_says_what_the_file_holds(name, wanted, saved):
    if name == wanted:
        return
    text = f"holds {TASKS[name].noun}, not {TASKS[wanted].noun}: leave out --task {wanted}"
    with pytest.raises(CheckpointError, match=text):
        load_network(saved[name], wanted)


def test_bare_files_are_told_apart_by_their_keys(tmp_path):
    # as published: without a description, in the keys of other packages
    names = {"replknet_31b": {"kernels": (7, 5, 5, 5), "channels": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}}
    (model, options), *_ = names.items()
    ade = {"backbone": model, "network": options, "classes": tuple(map(str, range(150)))}
    palette = tuple((i, i, i) for i in range(150))
    segmenter = SegmentationDescription(**{**vars(SEGMENTATION), **ade, "palette": palette}).build()
    coco = {"backbone": model, "network": options, "classes": tuple(map(str, range(80)))}
    detector = DetectionDescription(**{**vars(DETECTION), **coco}).build()
    classifier = timm.create_model(model, **options, num_classes=5)
    states = {
        "classification": classifier.state_dict(),
        "segmentation": to_mmseg(segmenter.state_dict()),
        "detection": to_mmdet(detector.state_dict()),
    }
    for name, state in states.items():
        torch.save({"state_dict": state}, tmp_path / f"{name}.pth")
        assert load_network(tmp_path / f"{name}.pth").task.name == name


def test_a_file_of_no_task_or_of_two_says_so():
    nothing = Source(Path("x.pth"), {"weight": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match=r"x\.pth holds no network of a known task: expected a key like head"):
        task_of(nothing)
    both = {"head.weight": torch.zeros(1), "decode_head.classifier.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"could be a classifier or a segmentation network, and does not say"):
        task_of(Source(Path("x.pth"), both, {}))
    later = Source(Path("x.safetensors"), both, {f"{FIELD}_depth": "{}"})
    with pytest.raises(CheckpointError, match=r"a description that this version does not know \(replknet_depth\)"):
        task_of(later)


def test_a_damaged_description_is_named(saved, tmp_path):
    for task in TASKS.values():
        path = tmp_path / f"{task.name}.safetensors"
        save_file({"head.weight": torch.zeros(1)}, path, metadata={task.field: json.dumps({"backbone": 3})})
        with pytest.raises(CheckpointError, match="cannot be read as a network of replknet's: the "):
            load_network(path)


@pytest.mark.full
def test_prediction_and_scores_load_no_lightning():
    code = "import sys; from replknet.tasks import TASKS; [t.infer for t in TASKS.values()]; "
    code += "[t.files for t in TASKS.values()]; "
    code += "print([name for name in ('pytorch_lightning', 'monai', 'tensorboard') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.full
def test_a_plain_installation_predicts_scores_and_merges(cifar, tmp_path):
    optional = "pytorch_lightning torchmetrics tensorboard transformers monai pycocotools faster_coco_eval matplotlib "
    optional += "onnx onnxruntime openvino nncf"
    commands = [
        ["predict", "replknet_cifar_l", *map(str, PHOTOS)],
        ["eval", "replknet_cifar_l", "--data", str(cifar)],
        ["merge", "replknet_cifar_l", str(tmp_path / "m.safetensors"), "--verify"],
        ["train", "--list"],
        ["export", "replknet_cifar_l", "--to", "pt2", "-o", str(tmp_path / "m.pt2")],
    ]
    code = f"import sys; sys.modules.update(dict.fromkeys({optional.split()}))\n"
    code += "from replknet.cli.main import main\n"
    code += f"assert [main(words) for words in {commands}] == [0] * 5\n"
    # and what is missing is named where it is needed
    code += f"assert main(['export', 'replknet_cifar_l', '--to', 'onnx', '-o', {str(tmp_path / 'm.onnx')!r}]) == 2"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "[export]" in result.stderr.splitlines()[-1]


def test_nothing_else_knows_a_task_by_name():
    # explore runs classifiers and segmentation networks, and the benchmarks of networks are of given kinds
    # "segmentation" is also a key of COCO's JSON
    free = ("tasks/", "explore/", "bench/", "cli/bench_model.py", "data/coco.py", "data/shapes.py")
    quoted = [f'"{name}"' for name in TASKS]
    found = [
        path.relative_to(FOLDER.parent).as_posix()
        for path in FOLDER.parent.rglob("*.py")
        if any(word in path.read_text() for word in quoted)
    ]
    assert [path for path in found if not path.startswith(free)] == []
