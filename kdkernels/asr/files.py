"""Files written whole or not at all, and reused only when they are exactly what was asked for.

A file of tensors carries the key of what it was made from and a digest of its contents. A missing,
damaged or foreign file reads as None, and the stage that owns it makes it again.
"""

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .console import write

UNFINISHED = ".kdkernels-tmp"  # how the name ends of a file that is being written


class TrainError(Exception):
    """Something the user can fix: shown as one message, exit code 2, no traceback."""


def digest(*parts) -> str:
    """sha256, in hex, of anything json can write: the key of a file made from these parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """sha256 of names and values."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        sha256.update(values.view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write through a temporary file and a rename: a reader sees the old file or the new one."""
    temporary = None
    try:
        if path.exists() and not path.is_file():  # a rename would replace a device by a file
            raise TrainError(f"cannot write {path}: it is no regular file; choose another")
        target = path.resolve()  # a link stays, and leads to what is written
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}{UNFINISHED}")
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise TrainError(
            f"cannot write {path}: {error.strerror or error}; fix that and run the same command "
            "again"
        ) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def check_writable(folder: Path, options: str = "--out") -> None:
    """Make the folder and try to write into it, before any long work; `options` choose it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TrainError(
            f"cannot write into the folder {folder}: {error.strerror or error}; "
            f"choose another with {options}"
        ) from error


def save_tensors(path: Path, tensors: dict[str, Tensor], key: str, **facts) -> None:
    """safetensors, with `key` and `facts` (anything json can write) in its header."""
    content = digest(key, facts, tensors_digest(tensors))
    # a single entry: safetensors does not fix the order of several
    header = json.dumps({"key": key, "content": content, **facts})
    write_bytes(path, safetensors.torch.save(tensors, {"kdkernels": header}))


def load_header(path: Path) -> dict:
    """The key and the facts of a file of `save_tensors`; {} where it cannot be read."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("kdkernels", "{}"))
    except (safetensors.SafetensorError, OSError, ValueError):
        return {}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a file of `save_tensors`, and its key and facts.

    Raises OSError where it cannot be opened, ValueError where it is damaged or of another kind.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("kdkernels", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
    if "content" not in header:
        raise ValueError("not a file of this program, or of another version of it")
    facts = {name: x for name, x in header.items() if name not in ("key", "content")}
    if digest(header.get("key"), facts, tensors_digest(tensors)) != header.get("content"):
        raise ValueError("it is damaged: what it holds is not what was written")
    return tensors, {"key": header["key"], **facts}


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes had begun to write, by its name, which nothing else has."""
    for path in folder.rglob(f".*{UNFINISHED}"):
        pid = path.name.removesuffix(UNFINISHED).rpartition(".")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)


def load_tensors(
    path: Path, key: str, otherwise: str = "made again"
) -> tuple[dict[str, Tensor], dict] | None:
    """The tensors and facts of a file made with this key; None when it must be made again.

    What is wrong with an existing file is reported on stderr, with what happens `otherwise`.
    """
    if not path.exists():
        return None
    try:
        tensors, facts = read_tensors(path)
        if facts["key"] == key:
            return tensors, facts
        reason = "was made from other data or settings"
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({error})"
    write(f"{path} {reason}: {otherwise}", sys.stderr)
    return None
