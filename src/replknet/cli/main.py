"""The `replknet` command: one file a command, found by name."""

import difflib
import importlib
import os
import sys
from typing import Any, Literal, NoReturn

from jsonargparse import ArgumentParser

from replknet import __version__
from replknet.data.download import DownloadError

COMMANDS = {
    "demo": "train, merge, evaluate and picture a small RepLKNet on CIFAR-10",
    "info": "list the models with their parameters and multiply-adds",
    "recipes": "list the trainings that `train` knows, with command, hardware and score",
    "plan": "estimate memory and steps of a training before it runs",
    "train": "train a classifier, a segmentation network or a detector from a recipe",
    "eval": "score a trained network on a data set",
    "predict": "name the likeliest classes of image files, the class of each of their pixels, or the objects in them",
    "merge": "turn a checkpoint into the inference form",
    "export": "write a network for other runtimes, checked there against torch",
    "quantize": "write a classifier in int8 for other runtimes, with its accuracy, size and speed before and after",
    "erf": "compute and draw the effective receptive field",
    "kernels": "draw the learned kernels, and say where their weight lies and what the small branch added",
    "explore": "run the experiments of the paper and write what they say",
    "shape-bias": "measure whether classifiers go by shape or by texture, and draw it",
    "bench": "time the depthwise operator, or a network, against torch and other runtimes",
    "doctor": "show what this machine can do and which backend takes which call",
}

# help of the argument of every command that reads a network
CHECKPOINT = "weights, in any format that load_checkpoint reads, or the name of some that come with the package"
# and of those that run one
TASK = "what the network does"
WINDOW = "side of the windows that segmentation takes of an image, pixels; the network's own if none is given"
Task = Literal["classification", "segmentation", "detection"]


class Parser(ArgumentParser):
    """Options are never abbreviated, and an unknown one gets its nearest match."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        for word in message.replace("=", " ").split():
            nearest = difflib.get_close_matches(word, known, 1)
            if word.startswith("--") and word not in known and nearest:
                message += f"; did you mean {nearest[0]}?"
        self.exit(2, f"{self.prog}: {message}\n{self.prog} --help shows every option\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 for a check that failed, 2 for a wrong call or file."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    name, *rest = words
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {nearest[0]}?" if nearest else f"; there are {', '.join(COMMANDS)}"
        print(f"replknet: no command is called {name!r}{hint}", file=sys.stderr)
        return 2
    try:
        code: int = importlib.import_module(f"replknet.cli.{name.replace('-', '_')}").main(rest)
        sys.stdout.flush()
    except (ValueError, FileNotFoundError, DownloadError) as error:
        print(f"replknet {name}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("replknet"):
            raise
        extra = {
            "matplotlib": "viz",
            "pytorch_lightning": "train",
            "torchmetrics": "train",
            "transformers": "seg",
            "monai": "seg",
            "pycocotools": "det",
            "faster_coco_eval": "det",
            "onnx": "export",
            "onnxscript": "export",
            "onnxruntime": "export",
            "openvino": "export",
            "nncf": "quant",
        }.get(error.name or "", "all")
        print(f'replknet {name}: {error}; pip install "replknet[{extra}]"', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nreplknet {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # who read the output has enough of it, as `head` does; Python's own flush at the end must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def parser(name: str, example: str) -> Parser:
    """The parser of a command, with an example below its help."""
    return Parser(prog=f"replknet {name}", description=COMMANDS[name], epilog=f"example: {example}")


def _overview() -> str:
    lines = ["usage: replknet COMMAND [options]; replknet COMMAND --help shows them", ""]
    lines += [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "", "example: replknet demo"])


if __name__ == "__main__":
    sys.exit(main())
