"""What a result carries beside its numbers: machine, versions, commit."""

import os
import platform
import subprocess
from pathlib import Path

import torch

import kdkernels

from . import peers

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


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
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here = Path(__file__).parent
    try:
        out = subprocess.run(command, cwd=here, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.strip()


def describe(args) -> dict:
    return {
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "caches": caches(),
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
        "backend": args.backend or os.environ.get("KDKERNELS_BACKEND") or "default",
        "dtype": "float32",
        "seed": 0,
    }
