"""Messages on the terminal, from the first of several processes alone."""

import os
import shutil
import sys

from tqdm import tqdm

from . import processes


def progress(total: int | None, what: str, unit: str, leave: bool = True) -> tqdm:
    """A bar on a terminal, silent elsewhere."""
    columns, rows = shutil.get_terminal_size()  # (80, 24) where a terminal does not know its size
    silent = None if processes.rank() == 0 else True
    size = {"ncols": columns, "nrows": rows}
    return tqdm(total=total, desc=what, unit=unit, disable=silent, leave=leave, **size)


def say(text: str) -> None:
    if processes.rank() == 0:
        write(text, sys.stdout)


def warn(text: str) -> None:
    if processes.rank() == 0:
        write(f"warning: {text}", sys.stderr)


def write(text: str, stream) -> None:
    """Print a line. Where that cannot be done the work goes on silently: the reader has gone, as in
    `... | head -1`, the terminal was closed, the disk of the log is full."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        mute(stream)


def mute(stream) -> None:
    """Discard what is written to `stream` from here on, and what is still in its buffer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
