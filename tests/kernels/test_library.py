"""What is in the built core, read from the file: what it links, and which instructions its kernels use."""

import re
import shutil
import subprocess
from collections import Counter

import pytest

from replknet.kernels import native_core


def binutils(*command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}, which comes with the compiler")
    result = subprocess.run([*command, str(native_core.library_path())], capture_output=True, text=True, check=True)
    return result.stdout


def test_nothing_but_the_c_library_is_linked():
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", binutils("readelf", "-dW")))
    assert {name.split(".so")[0] for name in needed} <= {"libc", "libm", "ld-linux-x86-64", "ld-linux-aarch64"}


@pytest.fixture(scope="module")
def instructions():
    """source file -> how often each mnemonic occurs with each kind of register"""
    # local symbols follow the name of the file that they are from
    unit, units = "", {}
    for line in binutils("readelf", "-sW").splitlines():
        words = line.split()
        if len(words) == 8 and words[3] == "FILE":
            unit = words[7]
        elif len(words) >= 8 and words[3] == "FUNC" and words[4] == "LOCAL":
            units[int(words[1], 16)] = unit
    found, counts = {}, Counter()
    for line in binutils("objdump", "-d", "--no-show-raw-insn").splitlines():
        if start := re.match(r"([0-9a-f]{16}) <", line):
            counts = found.setdefault(units.get(int(start[1], 16), ""), Counter())
        elif instruction := re.match(r"\s+[0-9a-f]+:\s+(\w+)(.*)", line):
            kinds = re.findall(r"%([xyz])mm", instruction[2]) or [""]
            counts.update((instruction[1], kind) for kind in set(kinds))
    return found


def uses(counts, mnemonic, kind):
    return sum(n for (name, k), n in counts.items() if name.startswith(mnemonic) and k == kind)


@pytest.mark.skipif("avx2" not in native_core.instruction_sets(), reason="the core was built for another processor")
def test_each_set_uses_its_own_registers_and_no_others(instructions):
    plain, avx2, avx512 = (instructions[f"isa_{name}.cpp"] for name in ("plain", "avx2", "avx512"))
    # most arithmetic is fused and on whole vectors
    assert uses(avx2, "vfm", "y") > 10_000
    assert uses(avx512, "vfm", "z") > 10_000
    assert uses(avx2, "", "z") == 0
    # what runs on every processor, and what chooses among the sets, needs none of them
    for counts in (plain, instructions["replknet.cpp"]):
        assert [name for name, kind in counts if name.startswith("v") or kind in ("y", "z")] == []
