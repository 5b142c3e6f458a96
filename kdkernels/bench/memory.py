"""Peak memory of one step, by the kernel's own count of resident pages (Linux).

Every contender has a process of its own, so that no allocator keeps what another one freed.
"""

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

from .contenders import contenders, make_inputs
from .shapes import select

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
COMPILED = ("compile", "optax")  # their first call is another program's work: it is not measured


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM, its peak since the last reset."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")


def peak_of_one_step(shape, name: str, backend: str | None) -> int:
    """Bytes beyond the inputs that one step has in use at its peak, gradient included."""
    inputs = make_inputs(shape)
    step = contenders(shape, inputs, backend, only=name)[name]
    if name in COMPILED:
        step()
        inputs.student.grad = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # VmHWM starts again from VmRSS
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def child(name: str, indices: list[int], tiny: bool, backend: str | None) -> dict[int, float]:
    """What a contender's process does: row -> peak in units of one logit tensor."""
    rows = select(tiny=tiny)
    for op in {rows[i].op for i in indices}:  # code pages, threads
        small = next(s for s in select(op, tiny=True))
        contenders(small, make_inputs(small), backend, only=name)[name]()
    return {i: peak_of_one_step(rows[i], name, backend) / (4 * rows[i].numel) for i in indices}


def peaks(names_of_row: dict[int, list[str]], args) -> dict[int, dict[str, float]]:
    """Row -> contender -> peak of one step in units of one logit tensor."""
    result = {i: {} for i in names_of_row}
    for name in dict.fromkeys(n for names in names_of_row.values() for n in names):
        rows = [i for i, names in names_of_row.items() if name in names]
        command = [sys.executable, "-m", "kdkernels.bench", "--threads", str(args.threads)]
        command += ["--tiny"] if args.tiny else []
        command += ["--backend", args.backend] if args.backend else []
        command += ["--peak", name, *map(str, rows)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        for row, peak in json.loads(out.splitlines()[-1]).items():
            result[int(row)][name] = peak
    return result
