"""Kernels compiled ahead of time for a GPU that need not be here, and what their machine code does.

Triton compiles a configuration that spills registers, or that needs more shared or tensor memory than a device has,
without a word. Here such a configuration is found on any machine.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from replknet.kernels.triton_launch import compiling

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_]+)", re.MULTILINE)
_PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA", "FFMA")
# tensor memory of Blackwell, columns
_TENSOR_COLUMNS = 512


@dataclass(frozen=True)
class Limits:
    """What a device has, and the instruction by which it multiplies matrices."""

    capability: int
    shared_bytes: int  # of a program
    matrix_instruction: str


DEVICES = {
    "sm_80": Limits(80, 163 << 10, "HMMA"),
    "sm_90": Limits(90, 227 << 10, "HGMMA"),
    "sm_100": Limits(100, 227 << 10, "UTCHMMA"),
}


@dataclass(frozen=True)
class Code:
    """What a compiled kernel needs, and how often each instruction stands in it."""

    kernel: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_columns: int
    # of the smallest loop with the most products of matrices: what a step of a sum takes
    loop_instructions: int
    instructions: Counter[str] = field(repr=False)

    def faults(self, device: Limits, instruction: str | None = None) -> list[str]:
        """Why this is no configuration for a device; `instruction`: what it must multiply matrices with."""
        found = []
        if self.stack_bytes:
            found.append(f"{self.stack_bytes} bytes of stack: registers are spilled")
        if self.shared_bytes > device.shared_bytes:
            found.append(f"{self.shared_bytes} bytes of shared memory, the device has {device.shared_bytes}")
        if self.tensor_columns > _TENSOR_COLUMNS:
            found.append(f"{self.tensor_columns} columns of tensor memory, the device has {_TENSOR_COLUMNS}")
        if instruction is not None and not self.instructions[instruction]:
            found.append(f"no {instruction}")
        return found


class _Absent:
    """Stands for the driver of a device that is not here."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        # Triton remembers what it compiled, and for which target, by the number of the device
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def standing_in(device: Limits) -> Iterator[None]:
    """Triton compiles for a device that is not here."""
    driver = triton.runtime.driver
    before = driver._active  # None if nothing asked for it yet
    driver.set_active(_Absent(device.capability))
    try:
        yield
    finally:
        driver.set_active(before)


def compiled(device: Limits, call: Callable[[], object]) -> list[Code]:
    """The kernels that a call would start, compiled for a device. Its tensors may be on the meta device."""
    with standing_in(device), compiling() as kernels:
        call()
    return [_code(kernel) for kernel in kernels]


def _code(kernel: Any) -> Code:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(str(tools / "cuobjdump"), "-res-usage", file.name)
        text = _output(str(tools / "nvdisasm"), "-c", file.name)
    mnemonics = _INSTRUCTION.findall(text)
    return Code(
        kernel=kernel.metadata.name,
        registers=_number(r"REG:(\d+)", usage),
        stack_bytes=_number(r"STACK:(\d+)", usage),
        shared_bytes=kernel.metadata.shared,
        tensor_columns=getattr(kernel.metadata, "tmem_size", 0) or 0,
        loop_instructions=_loop_instructions(text),
        instructions=Counter(mnemonics),
    )


def _loop_instructions(text: str) -> int:
    """Of the loop that does the products; 0 if there are none."""
    lines = text.splitlines()
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"(\.L_\w+):", line))}
    best = 0, 0
    for end, line in enumerate(lines):
        found = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if found is None or labels.get(found[1], end) >= end:
            continue
        inside = _INSTRUCTION.findall("\n".join(lines[labels[found[1]] : end + 1]))
        products = sum(name in _PRODUCTS for name in inside)
        # of two loops with the same products the inner one is shorter
        best = max(best, (products, -len(inside)))
    return -best[1]


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in {text}"
    return int(found[1])


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
