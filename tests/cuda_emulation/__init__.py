"""The CUDA kernels on the host: the very same csrc/cuda/*.cu, compiled as plain C++ against
cuda_emulation.h, behind the very same kdkernels/backends/cuda.py, as a backend of the tests."""

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kdkernels import backends

NAME = "cuda_emulated"

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parent.parent
_FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
_FLAGS += ["-Wno-unknown-pragmas"]  # unroll


def _build():
    """Compiles the extension once for these sources; its path."""
    sources = sorted((_ROOT / "csrc" / "cuda").glob("*.cu")) + sorted(_HERE.glob("*.cpp"))
    read = [*sources, *(_ROOT / "csrc" / "cuda").glob("*.cuh"), *_HERE.glob("*.h")]
    read += [_ROOT / "csrc" / "kdkernels.h", _ROOT / "python" / "bindings_cuda.h"]
    text = b"".join(path.read_bytes() for path in sorted(read)) + sys.version.encode()
    key = hashlib.sha256(text + " ".join(_FLAGS).encode()).hexdigest()[:16]
    folder = _ROOT / "build" / f"cuda_emulation-{key}"
    extension = folder / f"kdkernels_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of processes that begin together one compiles
        if not extension.exists():
            _compile(sources, folder, extension)
    return extension


def _compile(sources, folder, extension):
    import pybind11

    compiler = os.environ.get("CXX", "g++")
    include = [_ROOT / "csrc", _HERE, pybind11.get_include(), sysconfig.get_path("include")]
    flags = [*_FLAGS, *(f"-I{path}" for path in include)]

    def compile(source):
        target = folder / f"{source.stem}.{os.getpid()}.o"
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        subprocess.run([compiler, *flags, *language, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, sources))
    linked = extension.with_suffix(f".{os.getpid()}")
    subprocess.run([compiler, "-shared", *objects, "-o", linked], check=True)
    for path in objects:
        path.unlink()
    linked.rename(extension)  # whole or not at all


def _load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def register():
    """Makes `cuda_emulated` a backend on device cpu, after all others."""
    emulated = _load("kdkernels_emulated", _build())
    path = Path(backends.__file__).parent / "cuda.py"
    module = _load(f"{backends.__name__}.{NAME}", path)
    module._kernels = emulated.cuda
    module.DEVICE_TYPE = "cpu"
    module._place = lambda device: (0, 0)
    backends.NAMES = (*backends.NAMES, NAME)
