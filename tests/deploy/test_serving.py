"""The serving page as a person follows it, and the examples beside it: layouts, configurations, requests, classes."""

import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from PIL import Image

from replknet.cli.main import main
from replknet.data import images, transforms
from replknet.data.images import PHOTOS
from replknet.models import Description, load_model
from replknet.models.replknet import CONFIGS
from replknet.tasks.classification.export import card_of, export_classifier
from replknet.tasks.files import load_network

# files in the layouts of servers, of which `make test` sees the exports
pytestmark = pytest.mark.full

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "serving.md").read_text()


def run(command, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # the commands are those of this environment
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    result = subprocess.run(command, env=environment, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the blocks of the page were run, one after the other."""
    folder = tmp_path_factory.mktemp("serving")
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    run(["bash", "-euc", "\n".join(blocks)], cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wanted(folder):
    """Logits of two photos in torch, and the photos as the network is given them."""
    model, d = load_model("replknet_cifar_l", torch.float32)
    x = images.batch(PHOTOS, transforms.eval_transform(d.image_size, d.mean, d.std, d.crop_pct))
    with torch.no_grad():
        return x.numpy(), model(x).numpy()


@cache
def model_config():
    """The fields of Triton's ModelConfig that the page uses, with its numbers; any other is an error."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="triton.proto", package="t", syntax="proto3")
    types = file.enum_type.add(name="DataType")
    for name, number in (("TYPE_INVALID", 0), ("TYPE_FP16", 10), ("TYPE_FP32", 11), ("TYPE_FP64", 12)):
        types.value.add(name=name, number=number)

    def message(title, /, **fields):
        found = file.message_type.add(name=title)
        for field, (number, kind, repeated) in fields.items():
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            if isinstance(kind, str):
                kind, type_name = (kinds.TYPE_ENUM if kind == "DataType" else kinds.TYPE_MESSAGE), f".t.{kind}"
                found.field.add(name=field, number=number, type=kind, type_name=type_name, label=label)
            else:
                found.field.add(name=field, number=number, type=kind, label=label)

    text, whole = kinds.TYPE_STRING, kinds.TYPE_INT64
    message("Input", name=(1, text, False), data_type=(2, "DataType", False), dims=(4, whole, True))
    message("Output", name=(1, text, False), data_type=(2, "DataType", False), dims=(3, whole, True))
    message("Batching")
    message(
        "ModelConfig",
        name=(1, text, False),
        max_batch_size=(4, kinds.TYPE_INT32, False),
        input=(5, "Input", True),
        output=(6, "Output", True),
        dynamic_batching=(11, "Batching", False),
        backend=(17, text, False),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))


def test_the_check_of_the_configuration_finds_what_it_should():
    for wrong in ('nam: "cifar"', "input [ { dims: 3", "max_batch_size: many", "output [ { data_type: FP32 } ]"):
        with pytest.raises(text_format.ParseError):
            text_format.Parse(wrong, model_config()())


def test_triton_finds_a_model_that_is_as_its_configuration_says(folder, wanted):
    (model,) = (folder / "triton").iterdir()
    assert sorted(path.name for path in model.iterdir()) == ["1", "config.pbtxt"]
    config = text_format.Parse((model / "config.pbtxt").read_text(), model_config()())
    assert (config.name, config.backend) == (model.name, "onnxruntime")
    assert config.HasField("dynamic_batching")
    # the name that its backend looks for, of the versions the only one
    session = onnxruntime.InferenceSession(model / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    types = {"tensor(float)": "TYPE_FP32"}
    enum = config.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number
    for told, real in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert len(told) == len(real) == 1
        # the batch is the server's; a side with a name is free
        shape = [side if isinstance(side, int) else -1 for side in real[0].shape]
        assert (told[0].name, [-1, *told[0].dims]) == (real[0].name, shape)
        assert enum[told[0].data_type].name == types[real[0].type]
    x, logits = wanted
    batch = np.repeat(x, 16, 0)
    assert len(batch) == config.max_batch_size
    (found,) = session.run([config.output[0].name], {config.input[0].name: batch})
    np.testing.assert_allclose(found[::16], logits, rtol=1e-4, atol=1e-5)


def test_openvino_finds_a_model_that_is_as_its_configuration_says(folder, wanted):
    (entry,) = json.loads((folder / "ovms" / "config.json").read_text())["model_config_list"]
    config = entry["config"]
    assert set(config) == {"name", "base_path", "plugin_config"}
    # what the container sees under /models
    model = folder / "ovms" / Path(config["base_path"]).relative_to("/models")
    (version,) = model.iterdir()
    assert (model.name, version.name) == (config["name"], "1")
    assert sorted(path.suffix for path in version.iterdir()) == [".bin", ".xml"]
    (file,) = version.glob("*.xml")
    compiled = openvino.Core().compile_model(file, "CPU", config["plugin_config"])
    (image,), (logits,) = compiled.inputs, compiled.outputs
    assert (image.get_names(), image.partial_shape.to_string()) == ({"image"}, "[?,3,?,?]")
    assert (logits.get_names(), logits.partial_shape.to_string()) == ({"logits"}, "[?,10]")
    assert image.element_type == logits.element_type == openvino.Type.f32
    x, expected = wanted
    np.testing.assert_allclose(compiled({"image": x})["logits"], expected, rtol=1e-4, atol=1e-5)


def test_the_page_says_how_the_models_are():
    for name in ("image", "logits"):
        assert f"| `{name}` | float32 |" in PAGE


def test_the_card_for_clients_is_that_of_the_file(folder):
    card = json.loads((folder / "cifar.json").read_text())
    exported = load_network(folder / "cifar.xml").description
    assert card["classes"] == list(exported.classes)
    assert (card["licence"], card["image_size"], card["sides"][0]) == ("apache-2.0", 32, 9)
    assert "sides from 9 pixels on" in PAGE
    model = onnxruntime.InferenceSession(folder / "cifar.onnx", providers=["CPUExecutionProvider"])
    assert model.get_modelmeta().custom_metadata_map["replknet"] == (folder / "cifar.json").read_text().strip()


def predicted(file, photo, capsys):
    """What the command says, best first: names and probabilities."""
    capsys.readouterr()
    assert main(["predict", str(file), str(photo), "--json"]) == 0
    return [(guess["name"], guess["probability"]) for guess in json.loads(capsys.readouterr().out)["top"]]


def same(lines, top):
    """Whether a program printed the same classes with the same probabilities."""
    found = [line.split(" ", 1) for line in lines.splitlines()]
    assert [name for _, name in found] == [name for name, _ in top]
    assert [float(probability) for probability, _ in found] == pytest.approx([p for _, p in top], abs=2e-6)


# raises where any module of torch, or of this package, is imported
_WITHOUT_TORCH = """
import runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm", "replknet"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
if sys.argv[1] == "check":
    import torch
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not [name for name in sys.modules if name.partition(".")[0] in ("torch", "torchvision", "timm", "replknet")]
"""


def without_torch(*arguments):
    return run([sys.executable, "-c", _WITHOUT_TORCH, *map(str, arguments)])


def test_the_blocker_blocks():
    with pytest.raises(AssertionError, match="torch is blocked"):
        without_torch("check")


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda photo: photo.stem)
def test_a_program_without_torch_says_what_predict_says(photo, folder, capsys):
    top = predicted(folder / "cifar.onnx", photo, capsys)
    same(without_torch(DOCS / "examples" / "onnx_classify.py", folder / "cifar.onnx", photo), top)


@pytest.mark.parametrize(("size", "crop_pct"), [(64, 0.875), (48, 0.95), (384, 0.9)])
def test_it_prepares_images_as_every_network_wants_them(size, crop_pct, tmp_path, capsys):
    torch.manual_seed(0)
    d = Description(
        config=CONFIGS["replknet_test"],
        classes=("a", "b", "c"),
        num_classes=3,
        image_size=size,
        crop_pct=crop_pct,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.25, 0.3),
    )
    path, model = tmp_path / "net.onnx", d.build().eval()
    # so that the probabilities are far from equal
    torch.nn.init.normal_(model.head.weight)
    export_classifier(model, card_of(d), path, "onnx")
    random = np.random.default_rng(0)
    # the crop's place is rounded: 13.5 to 14, and 22.5 to 22
    Image.fromarray(random.integers(0, 256, (91, 137, 3), np.uint8)).save(tmp_path / "image.png")
    top = predicted(path, tmp_path / "image.png", capsys)
    same(without_torch(DOCS / "examples" / "onnx_classify.py", path, tmp_path / "image.png"), top)


@contextmanager
def stand_in(folder):
    """A server that answers one model's inference as KServe's protocol says, and keeps the requests."""
    session = onnxruntime.InferenceSession(
        folder / "triton" / "cifar" / "1" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers["Content-Type"], body))
            (tensor,) = body["inputs"]
            x = np.array(tensor["data"], np.float32).reshape(tensor["shape"])
            (logits,) = session.run(["logits"], {tensor["name"]: x})
            output = {"name": "logits", "shape": logits.shape, "datatype": "FP32", "data": logits.ravel().tolist()}
            answer = json.dumps({"model_name": "cifar", "outputs": [output]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v2/models/cifar/infer", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_client_asks_as_the_protocol_says(folder, capsys):
    with stand_in(folder) as (url, requests):
        told = without_torch(DOCS / "examples" / "kserve_classify.py", url, folder / "cifar.json", PHOTOS[0])
    same(told, predicted(folder / "cifar.onnx", PHOTOS[0], capsys))
    ((path, kind, body),) = requests
    assert (path, kind) == ("/v2/models/cifar/infer", "application/json")
    (tensor,) = body["inputs"]
    assert (tensor["name"], tensor["datatype"], tensor["shape"]) == ("image", "FP32", [1, 3, 32, 32])
    assert len(tensor["data"]) == 3072
    # the body on the page has the same fields
    (shown,) = re.findall(r"^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (example,) = json.loads(shown)["inputs"]
    assert {key: value for key, value in example.items() if key != "data"} == {
        key: value for key, value in tensor.items() if key != "data"
    }


def test_pages_show_the_programs_that_were_run():
    assert "{literalinclude} examples/kserve_classify.py" in PAGE
    assert "{literalinclude} examples/onnx_classify.py" in (DOCS / "deployment.md").read_text()
