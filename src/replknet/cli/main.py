"""The `replknet` command. It finds the file of each command by name, and imports it when the command is called."""

import difflib
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from replknet.cli import errors
from replknet.cli.colour import bold, red
from replknet.cli.errors import UsageError
from replknet.extras import installing
from replknet.limits import VARIABLE as LIMITS

# purpose -> commands; each command is a file of this folder
GROUPS = {
    "learn": {
        "demo": "train, merge, evaluate and picture a small RepLKNet on CIFAR-10",
        "info": "list the models with their parameters and multiply-adds",
        "explore": "run the paper's experiments and write a report",
    },
    "train": {
        "train": "train a classifier, a segmentation network or a detector from a recipe; --list shows the recipes",
        "eval": "score a trained network on a data set",
    },
    "deploy": {
        "predict": "name the class of an image, the classes of its pixels, or the objects in it",
        "merge": "turn a checkpoint into the inference form",
        "export": "write a network for other runtimes and check it there against torch; in int8 with --int8",
    },
    "analyse": {
        "analyze": "effective receptive fields (erf), learned kernels (kernels), shape or texture (shape-bias)",
    },
    "machine": {
        "bench": "time the depthwise operator, or a network, against torch and other runtimes",
        "doctor": "show what this machine can do, and which backend takes which call",
    },
}
COMMANDS = {name: text for group in GROUPS.values() for name, text in group.items()}
# older names -> (words before the arguments, words after them); removed in 1.0
OLD = {
    "recipes": (["train", "--list"], []),
    "plan": (["train"], ["--plan"]),
    "quantize": (["export", "--int8"], []),
    "erf": (["analyze", "erf"], []),
    "kernels": (["analyze", "kernels"], []),
    "shape-bias": (["analyze", "shape-bias"], []),
}
SHELLS = ("bash", "zsh", "tcsh")
# package -> extra that installs it
_EXTRAS = {
    "matplotlib": "viz",
    "pytorch_lightning": "train",
    "tensorboard": "train",
    "torchmetrics": "det",
    "transformers": "seg",
    "monai": "seg",
    "pycocotools": "det",
    "faster_coco_eval": "det",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
    "openvino": "export",
    "nncf": "quant",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0, 1 for a check that failed, 2 for a wrong call or file."""
    words = sys.argv[1:] if argv is None else argv
    errors.open_streams()
    limits = os.environ.get(LIMITS)
    try:
        try:
            return _called(words)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # the reader closed the pipe, as `head` does
        errors.drop_output()
        return 141
    except OSError as error:
        return errors.report(error, red("replknet"))
    finally:
        # --limits is for this call alone
        if limits is None:
            os.environ.pop(LIMITS, None)
        else:
            os.environ[LIMITS] = limits


def _called(words: list[str]) -> int:
    """Run a command, or what stands in its place."""
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    name, *rest = words
    if name == "--version":
        from replknet import __version__  # looked up in the installed package

        print(__version__)
        return 0
    if name == "--completion":
        return _completion(rest)
    if name in OLD:
        before, after = OLD[name]
        name, *rest = [*before, *rest, *after]
        told = " ".join(["replknet", *before, *after])
        print(f"replknet {words[0]}: this is now `{told}`; version 1.0 removes the old name", file=sys.stderr)
    as_json = "--json" in rest
    if name not in COMMANDS:
        error = ValueError(f"no command is called {name!r}{_hint(name, list(COMMANDS))}")
        return errors.report(error, red("replknet"), as_json=as_json)
    return _run(name, rest, as_json)


def _run(name: str, rest: list[str], as_json: bool) -> int:
    prefix = red(f"replknet {name}")
    try:
        with _told(prefix):
            code: int = importlib.import_module(f"replknet.cli.{name}").main(rest)
        return code
    except BrokenPipeError:
        raise
    except UsageError as error:
        code = errors.report(error, red(error.prog), as_json=as_json)
        print(f"{error.prog} --help shows every option", file=sys.stderr)
        return code
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("replknet"):
            raise
        extra = _EXTRAS.get((error.name or "").partition(".")[0], "all")
        line = f"{errors.line_of(error)}; {installing(extra)} adds it"
        return errors.report(error, prefix, line, as_json)
    except KeyboardInterrupt:
        print(f"\n{prefix}: interrupted", file=sys.stderr)
        return 130
    except errors.USERS as error:
        if not errors.is_ours(error):
            raise
        return errors.report(error, prefix, as_json=as_json)


@contextmanager
def _told(prefix: str) -> Iterator[None]:
    """Show on stderr what the library logs, such as which of a file's weights it takes."""
    logger, handler = logging.getLogger("replknet"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{prefix}: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _hint(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {nearest[0]}?" if nearest else f"; there are {', '.join(known)}"


def _completion(words: list[str]) -> int:
    if words[:1] not in [[shell] for shell in SHELLS]:
        print(f"{red('replknet')}: --completion takes a shell: {', '.join(SHELLS)}", file=sys.stderr)
        return 2
    from replknet.cli.completion import script  # it imports every command

    print(script(words[0]))
    return 0


def _overview() -> str:
    lines = ["usage: replknet COMMAND [options]; replknet COMMAND --help shows them"]
    for title, group in GROUPS.items():
        lines += ["", bold(title)]
        lines += [f"  {name:<8} {text}" for name, text in group.items()]
    return "\n".join(
        [
            *lines,
            "",
            "replknet --version shows the version; replknet --completion bash writes completions for your shell",
            "REPLKNET_DEBUG=1 shows where in the program an error comes from",
            "example: replknet demo",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
