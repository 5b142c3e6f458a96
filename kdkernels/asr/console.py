"""What is said on the terminal: by the first of several processes alone."""

import shutil
import sys

from tqdm import tqdm

from . import processes


def progress(total: int | None, what: str, unit: str, leave: bool = True) -> tqdm:
    """A bar on a terminal, silent elsewhere."""
    columns, rows = shutil.get_terminal_size()  # 80, 24 where a terminal does not know its size
    silent = None if processes.rank() == 0 else True
    size = {"ncols": columns, "nrows": rows}
    return tqdm(total=total, desc=what, unit=unit, disable=silent, leave=leave, **size)


def say(text: str) -> None:
    if processes.rank() == 0:
        print(text, flush=True)


def warn(text: str) -> None:
    if processes.rank() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)
