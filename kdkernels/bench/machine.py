"""What a result carries beside its numbers: machine, versions, commit."""

import os
import platform
import subprocess
from pathlib import Path

import torch

import kdkernels

from . import peers
from .shapes import OPS

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def caches() -> dict[str, int]:
    """Bytes of the data caches that core 0 can use: {"L1": ..., "L2": ..., "L3": ...}."""
    sizes = {}
    for cache in sorted(CACHES.glob("index*")):
        if (cache / "type").read_text().strip() != "Instruction":
            size = (cache / "size").read_text().strip()  # such as 512K
            level = (cache / "level").read_text().strip()
            sizes[f"L{level}"] = int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]]
    return sizes


def git_commit() -> str:
    """Of the checkout that this package runs from; an installed one knows its version alone."""
    here = Path(__file__).resolve().parents[2]

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=here, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != here:  # of somebody else's project
            return "unknown"
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def transparent_huge_pages() -> str:
    """When the kernel gives huge pages: always, madvise (to who asks) or never."""
    try:
        return HUGE_PAGES.read_text().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return "unknown"


def backends_used(named: str | None) -> str:
    """Such as "cpp", or "cpp, ctc_align reference" where operators do not share one."""
    if named := named or os.environ.get("KDKERNELS_BACKEND"):
        return named
    first, *rest = ((op, kdkernels.available(op)[0]) for op in OPS)
    return ", ".join([first[1], *(f"{op} {name}" for op, name in rest if name != first[1])])


def describe(args) -> dict:
    return {
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "caches": caches(),
            "huge_pages": transparent_huge_pages(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "kdkernels": kdkernels.__version__,
        },
        "commit": git_commit(),
        "peers": peers.status(),
        "threads": args.threads,
        "rounds": args.rounds,
        "cold": args.cold,
        "tiny": args.tiny,
        "backend": backends_used(args.backend),
        "allocator": os.environ.get("GLIBC_TUNABLES", ""),
        "dtype": "float32",
        "seed": 0,
    }
