"""Pickles of weights: PyTorch's files and MegEngine's, read so that no code in them runs.

A pickle is a program for a small machine. It names functions, which the machine calls, so it can do whatever Python
can. Before anything of a file runs, `_look_through` reads its instructions: it refuses every name that weights do not
need, and constructions whose size is not that of the file. Then torch's own reader with `weights_only`, or Python's
with the same names, builds the content. NumPy's classes are never built from a pickle, since crafted states crash
them: stand-ins take plain numbers, sizes and bytes, and make the array themselves.
"""

import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch

from replknet import limits
from replknet.reading import as_utf8

# how an archive of torch.save begins
ZIP = b"PK"
# how a pickle of protocol 2 or later begins
PICKLE = b"\x80"

# pickles at the beginning of a file of PyTorch before 1.6; the bytes of the tensors follow
_LEGACY = 5
# parts of a tuple with all that is in it: a tuple of two tuples of two ... takes endless time as a key
_PARTS = 1_000_000
# bytes of data.pkl in an archive, which has names and shapes but no tensors
_NAMES = 4 * limits.LIST


class _Dtype:
    """Stands in for numpy.dtype: a number's kind and size, and its byte order."""

    def __init__(self, code: object = None, *_: object) -> None:
        if not isinstance(code, str) or re.fullmatch(r"[<>=|]?(b1|[iu][1248]|f[248])", code) is None:
            raise pickle.UnpicklingError(f"refused numpy.dtype({code!r:.40}): only plain numbers are read")
        self.code, self.order = code.lstrip("<>=|"), "<" if code[0] == "<" else ">" if code[0] == ">" else "="

    def __setstate__(self, state: object) -> None:
        # (version, byte order, ...): the rest describes dtypes with fields
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]


class _Array:
    """Stands in for numpy.ndarray: its state is checked, and `array` is made of the bytes."""

    def __init__(self, *_: object) -> None:
        self.array: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise pickle.UnpicklingError("a numpy array without a state of five values")
        _, shape, dtype, fortran, content = state
        self._fill(content, dtype, shape, "F" if fortran else "C")

    def _fill(self, content: object, dtype: object, shape: object, order: Literal["C", "F"]) -> None:
        sizes = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
        if not sizes or not isinstance(dtype, _Dtype) or not isinstance(content, bytes | bytearray):
            raise pickle.UnpicklingError("a numpy array without sizes, a dtype of plain numbers, and bytes")
        flat = np.frombuffer(content, np.dtype(dtype.order + dtype.code)).astype(dtype.code)
        self.array = flat.reshape(shape, order=order)

    @classmethod
    def of_buffer(cls, content: object, dtype: object, shape: object, order: object) -> "_Array":
        """Stands in for the function by which protocol 5 writes arrays."""
        made = cls()
        made._fill(content, dtype, shape, "F" if order == "F" else "C")
        return made


class _Unread:
    """Stands in for what a training keeps beside its weights, such as its options; it takes anything and is dropped."""

    def __new__(cls, *_: object) -> "_Unread":
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _bytes(text: object, encoding: object = None) -> bytes:
    """Stands in for _codecs.encode, by which protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in _LATIN1:
        raise pickle.UnpicklingError(f"refused _codecs.encode with {encoding!r:.40}")
    return text.encode("latin1")


_LATIN1 = ("latin1", "latin-1")
# names that numpy's arrays need; two modules, since numpy 2 moved them
_NUMPY: dict[str, Any] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _Array.of_buffer for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _Unread for core in ("core", "_core")},
}
# names in training checkpoints of others: the official ones have argparse's options, mmengine's their history
_UNREAD: dict[str, Any] = dict.fromkeys(
    ("argparse.Namespace", "mmengine.logging.history_buffer.HistoryBuffer", "builtins.getattr"), _Unread
)
_PLAIN: dict[str, Any] = {"collections.OrderedDict": OrderedDict, "_codecs.encode": _bytes}
# names of torch's that a state dict needs; torch has its own functions for them
_TORCH = re.compile(
    r"torch\.(\w+Storage|Size|device|b?float\d+|u?int\d+|bool|half|float|double|long|int|short)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter|parameter_with_state)|torch\.nn\.parameter\.Parameter"
)
# names of Python 2, as protocol 2 writes them
_PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def read_archive(path: Path) -> Any:
    """The content of an archive that torch.save wrote. Tensors are views of the file.

    Raises:
        Exception: anything, if the file is damaged: `replknet.reading` is for the caller.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        limits.check(len(members), limits.ENTRIES, "members of an archive")
        if any(one.filename.endswith("/constants.pkl") for one in members):
            raise pickle.UnpicklingError("it is a TorchScript program; load it in torch and save its state_dict()")
        # torch never compresses; members that do not share their bytes are not larger than the file
        packed = next((one.filename for one in members if one.compress_type != zipfile.ZIP_STORED), None)
        if packed is not None or sum(one.file_size for one in members) > path.stat().st_size:
            raise pickle.UnpicklingError(
                f"its members would inflate ({packed or 'they overlap'}), and torch packs none"
            )
        names = [one for one in members if one.filename.rpartition("/")[2] == "data.pkl"]
        if len(names) != 1:
            raise pickle.UnpicklingError(f"it has {len(names)} members called data.pkl, and torch writes one")
        limits.check(names[0].file_size, _NAMES, "bytes of names and shapes")
        with archive.open(names[0]) as file:
            _look_through(file)
    return _by_torch(path, mmap=True)


def read_bare(path: Path) -> Any:
    """The content of a pickle without an archive: a MegEngine file, or one of PyTorch before 1.6.

    Raises:
        Exception: anything, if the file is damaged: `replknet.reading` is for the caller.
    """
    with path.open("rb") as file:
        _look_through(file)
        length = file.tell()
        file.seek(0)
        first = _Unpickler(file).load()
        # PyTorch's files begin with a number
        if not isinstance(first, int):
            return first
        file.seek(length)
        for _ in range(_LEGACY - 1):
            _look_through(file)
    return _by_torch(path)


def array_of(value: Any) -> Any:
    """The array for a stand-in; any other value as it is."""
    return value.array if isinstance(value, _Array) and value.array is not None else value


def _by_torch(path: Path, mmap: bool = False) -> Any:
    stand_ins: list[Any] = [(one, name) for name, one in {**_NUMPY, **_UNREAD}.items()]
    with torch.serialization.safe_globals(stand_ins), as_utf8(path) as name:
        try:
            return torch.load(name, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            # torch's text begins with a page of advice
            raise pickle.UnpicklingError(str(error).rpartition("WeightsUnpickler error: ")[2]) from error


class _Unpickler(pickle.Unpickler):
    """Python's reader with the names above alone."""

    def find_class(self, module: str, name: str) -> Any:
        found = {**_PLAIN, **_NUMPY, **_UNREAD}.get(_full(module, name))
        if found is None:
            raise pickle.UnpicklingError(_refused(f"{module}.{name}"))
        return found


def _full(module: str, name: str) -> str:
    return f"{_PYTHON2.get(module, module)}.{name}"


def _refused(name: str) -> str:
    return f"it holds {name}, which is refused, since it is no tensor and building it could run code"


class _Name(str):
    """A name of a function or class on the machine's stack, unlike a text."""


# an entry of the machine's stack: the parts of a value, and a text, a name or a small tuple of them if it is one
_Entry = tuple[int, Any]
_MARK: _Entry = (0, "mark")


def _look_through(file: IO[bytes]) -> None:
    """Read the instructions of one pickle, and run none.

    Raises:
        UnpicklingError: it uses a name that weights do not need, or builds more than its bytes tell.
        Exception: anything, if the pickle is damaged.
    """
    stack: list[_Entry] = []
    memo: dict[int, _Entry] = {}
    for count, (instruction, argument, _) in enumerate(pickletools.genops(file)):
        limits.check(count, limits.INSTRUCTIONS, "instructions in a pickle")
        name = instruction.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(memo) if argument is None else int(argument)
            # Python's reader makes room for all places up to it
            if place > count:
                raise pickle.UnpicklingError(f"it remembers a value at place {place}, and has {count} values")
            if not stack:
                raise pickle.UnpicklingError("it remembers a value that it has not made")
            memo[place] = stack[-1]
            continue
        try:
            taken = _taken(stack, instruction)
            known = memo[int(argument or 0)] if name in ("GET", "BINGET", "LONG_BINGET") else None
        except LookupError:
            raise pickle.UnpicklingError("it uses a value that it has not made") from None
        if known is not None:
            stack.append(known)
        elif name == "DUP":
            stack += [taken[0], taken[0]]
        elif instruction.stack_after == [pickletools.markobject]:
            stack.append(_MARK)
        elif instruction.stack_after:
            stack.append(_made(name, argument, taken))


def _taken(stack: list[_Entry], instruction: pickletools.OpcodeInfo) -> list[_Entry]:
    """The entries that an instruction takes from the stack, without the mark."""
    before = instruction.stack_before
    taken: list[_Entry] = []
    number = len(before)
    if pickletools.markobject in before:
        while (entry := stack.pop()) is not _MARK:
            taken.append(entry)
        number = before.index(pickletools.markobject)
    taken += [stack.pop() for _ in range(number)]
    return taken[::-1]


def _made(name: str, argument: Any, taken: list[_Entry]) -> _Entry:
    """The entry that an instruction puts on the stack."""
    if name in ("GLOBAL", "INST", "STACK_GLOBAL"):
        full = _full(*argument.split(" ", 1)) if argument else _full(str(taken[0][1]), str(taken[1][1]))
        if full not in {**_PLAIN, **_NUMPY, **_UNREAD} and _TORCH.fullmatch(full) is None:
            raise pickle.UnpicklingError(_refused(full))
        return 1, _Name(full)
    if name == "BUILD" and isinstance(taken[0][1], _Name):
        raise pickle.UnpicklingError(f"it would change {taken[0][1]} itself")
    if name == "REDUCE" and taken[0][1] == "_codecs.encode":
        arguments = taken[1][1]
        # torch's own reader calls Python's function, which knows slow and packed encodings
        if not (isinstance(arguments, tuple) and len(arguments) == 2 and arguments[1] in _LATIN1):
            raise pickle.UnpicklingError("refused _codecs.encode: only latin1 is read")
    if "TUPLE" in name:
        parts = 1 + sum(entry[0] for entry in taken)
        limits.check(parts, _PARTS, "parts in a tuple")
        return parts, tuple(entry[1] for entry in taken) if len(taken) < 4 else None
    return 1, argument if isinstance(argument, str) else None
