"""Files written whole or not at all, and reused only when they are exactly what was asked for.

A file of tensors carries the key of what it was made from; a missing, truncated or foreign file
reads as None, and the stage that owns it makes it again.
"""

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor


class TrainError(Exception):
    """Something the user can mend: shown as one message, exit code 2, no traceback."""


def digest(*parts) -> str:
    """sha256, in hex, of anything json can write: the key of a file made from these parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write through a temporary file and a rename: a reader sees the old file or the new one."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise TrainError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def check_writable(folder: Path) -> None:
    """Make the folder and write into it once, before any long work begins."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TrainError(
            f"cannot write into the folder {folder}: {error.strerror or error}; "
            "choose another with --out (and --cache)"
        ) from error


def save_tensors(path: Path, tensors: dict[str, Tensor], key: str, **facts) -> None:
    """safetensors, with `key` and `facts` (anything json can write) in its header."""
    metadata = {"key": key, "facts": json.dumps(facts)}
    write_bytes(path, safetensors.torch.save(tensors, metadata))


def load_tensors(path: Path, key: str) -> tuple[dict[str, Tensor], dict] | None:
    """The tensors and facts of a file made with this key; None when it must be made again."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") == key:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, json.loads(metadata["facts"])
        reason = "was made from other data or settings"
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        reason = f"cannot be read ({error})"
    print(f"{path} {reason}: made again", file=sys.stderr)
    return None
