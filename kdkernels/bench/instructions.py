"""Instructions that the compiled kernels execute, counted by callgrind: free of noise, however busy
the machine is.

One process under valgrind calls `ours` of every row, on one thread, with the AVX2 build (valgrind
knows no AVX-512). What the extension executes itself is counted: not Python, torch or libc, so that
two runs agree. Needs valgrind with its headers, and a C compiler.
"""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

from .shapes import Shape, select

# Counting is off until here: torch is imported ten times slower under valgrind, not a hundred.
PROBE = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void end(const char *row) { CALLGRIND_DUMP_STATS_AT(row); CALLGRIND_STOP_INSTRUMENTATION; }
"""
# Rows and utterances beyond this many logits are left out: instructions grow linearly with them.
MOST_LOGITS = 2**19
VALGRIND = [
    "valgrind", "--tool=callgrind", "--instr-atstart=no",
    "--compress-strings=no", "--compress-pos=no", "--quiet",
]  # fmt: skip
SETTINGS = {"KDKERNELS_TARGET": "avx2", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def count(python: list[str], rows: list[int], tiny: bool, folder: Path, **options) -> dict:
    """Row -> instructions of the extension that `python` (a command line) imports.

    `folder` takes what valgrind writes; `options` are those of subprocess.run.
    """
    folder.mkdir()
    (folder / "probe.c").write_text(PROBE)
    probe = folder / "probe.so"
    try:
        subprocess.run(
            ["cc", "-O1", "-shared", "-fPIC", "-o", str(probe), str(folder / "probe.c")], check=True
        )
        command = [*VALGRIND, f"--callgrind-out-file={folder / 'out'}", *python, str(probe)]
        subprocess.run(
            [*command, "tiny" if tiny else "all", *map(str, rows)], check=True, **options
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"instructions: valgrind, its headers and cc are needed: {error}"
        ) from None
    dumps = (path.read_text() for path in folder.glob("out.*"))
    counts = dict(filter(None, map(parse, dumps)))
    if missing := set(rows) - {row for row, n in counts.items() if n}:
        raise SystemExit(f"instructions: callgrind counted nothing for the rows {sorted(missing)}")
    return counts


def parse(dump: str) -> tuple[int, int] | None:
    """Row and instructions of a dump; None for one that no row asked for."""
    row = re.search(r"^desc: Trigger: Client Request: (\d+)$", dump, re.M)
    if row is None:
        return None
    total, inside, call = 0, False, False
    for line in dump.splitlines():
        if line.startswith("ob="):
            inside = Path(line[3:]).name.startswith("_C.")
        elif line.startswith("calls="):
            call = True  # the next line is the callee's
        elif line[:1].isdigit():
            if inside and not call:
                total += int(line.split()[1])
            call = False
    return int(row[1]), total


def cut(shape: Shape) -> Shape:
    each = shape.numel // shape.N
    return shape._replace(N=max(1, min(shape.N, MOST_LOGITS // each)))


def main(probe: str, table: str, *rows: str) -> None:
    """The process under valgrind."""
    import torch

    from .contenders import contenders, make_inputs

    library = ctypes.CDLL(probe)
    torch.set_num_threads(1)
    for row in rows:
        shape = cut(select(tiny=table == "tiny")[int(row)])
        step = contenders(shape, make_inputs(shape), only=("ours",))["ours"].step
        step()
        library.begin()
        step()
        library.end(row.encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
