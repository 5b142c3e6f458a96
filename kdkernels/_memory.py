"""Memory of large gradients on the CPU, kept from one step for the next.

The system zeroes every page that it hands out, which for a large gradient takes as long as
computing it, and the C library returns memory of such a size as soon as it is free. At most KEPT
blocks are kept; the system may reclaim the large ones where memory runs short.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import weakref
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

SMALLEST = 2**20  # bytes; the C library itself keeps smaller blocks
RECLAIMABLE = 2**27  # bytes; allowing it costs some 4 % of the time of kd_loss
KEPT = 4  # gradients of two models in two losses
MADV_FREE, MADV_HUGEPAGE = 8, 14  # Linux's; Python has the names only if compiled with them
HUGE_PAGE = 2**21  # bytes; a block is a whole number of these, so that it can begin at one

_enabled = sys.platform == "linux"
_free: deque[mmap.mmap] = deque(maxlen=KEPT)  # one too many pushes out the oldest


def keeps(size: int) -> bool:
    """Whether the memory of a gradient of `size` bytes is kept."""
    return _enabled and size >= SMALLEST


@contextlib.contextmanager
def left_to_torch() -> Iterator[None]:
    """Keep nothing meanwhile: torch's profiler sees only the memory of its own allocator."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """torch.empty_strided for a tensor without gaps. Its memory is kept when its storage dies.

    The storage cannot be resized.
    """
    size = dtype.itemsize
    for n in shape:
        size *= n
    try:
        block = _take(size)
    except OSError:
        empty_cache()  # and if that is not enough, torch says so
        return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
    lease = (ctypes.c_char * size).from_buffer(block)  # lives as long as the storage
    weakref.finalize(lease, _give_back, block, size).atexit = False
    storage = torch.frombuffer(lease, dtype=dtype).untyped_storage()
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, strides)


def empty_cache() -> None:
    """Release the memory that is kept for the next gradients on the CPU.

    As ``torch.cuda.empty_cache()`` does for a GPU. Gradients in use are not affected.
    """
    _free.clear()


def _take(size: int) -> mmap.mmap:
    """The smallest free block that fits, else a new one in place of one that is too small.

    One of more than twice the size does not fit: a long-lived gradient would hold it.
    """
    blocks = []
    try:
        while True:  # one at a time: other threads take and return blocks meanwhile
            blocks.append(_free.popleft())
    except IndexError:
        blocks.sort(key=len)
    whole = -(-size // HUGE_PAGE) * HUGE_PAGE
    smaller = sum(len(block) < size for block in blocks)
    fits = smaller < len(blocks) and len(blocks[smaller]) <= 2 * whole
    taken = blocks.pop(smaller if fits else smaller - 1) if fits or smaller else None
    _free.extend(blocks)
    if fits:
        return taken
    del taken  # before another is asked for
    block = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _advise(block, MADV_HUGEPAGE, whole)
    return block


def _give_back(block: mmap.mmap, size: int) -> None:
    if size >= RECLAIMABLE:
        _advise(block, MADV_FREE, size)
    _free.append(block)


def _advise(block: mmap.mmap, advice: int, size: int) -> None:
    with contextlib.suppress(OSError):  # a system that does not know it
        block.madvise(advice, 0, size)
