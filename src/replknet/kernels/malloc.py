"""How the C library keeps memory between the steps of a training, or the images of an inference, on a CPU."""

import ctypes
import sys

# malloc.h of glibc
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def give_back_fragments() -> None:
    """Return free memory to the kernel, also that between blocks in use.

    Blocks of many sizes, as bfloat16 beside float32 makes them, leave gaps that glibc does not fill again: a training
    took 16 GB after 2,000 steps that need 1.3. Does nothing where the C library has no malloc_trim.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def keep_freed_memory() -> bool:
    """Have glibc reuse large freed blocks instead of giving them back to the kernel.

    By default every activation above 32 MiB, or above a smaller limit that adapts, is mapped anew and its
    pages are cleared at each step. Returns whether the C library took it; only glibc on Linux does.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    largest = 2**31 - 1
    return bool(mallopt(_M_MMAP_THRESHOLD, 2**30)) and bool(mallopt(_M_TRIM_THRESHOLD, largest))
