"""Data sets that have rows: Hugging Face ones on disk, and those of torchaudio.

A table has `len`, `text(row)`, `audio(row)` -> (float [samples, channels], rate), `check(row)`,
which raises where there is no audio, and `key`, which identifies its contents.
"""

import io
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np

from . import audio
from .extras import missing
from .files import TrainError


def is_hugging_face(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


@cache
def open_table(spec: str):
    return Torchaudio(spec) if spec.startswith("torchaudio:") else HuggingFace(Path(spec))


class HuggingFace:
    """A dataset that `datasets.Dataset.save_to_disk` wrote."""

    def __init__(self, folder: Path):
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise TrainError(
                f"{folder} is a Hugging Face dataset: {missing('datasets', 'hub')}, or "
                "write a manifest"
            ) from error
        if (folder / "dataset_dict.json").is_file():
            raise TrainError(f"{folder} holds several splits: name one, e.g. {folder / 'train'}")
        try:
            data = datasets.load_from_disk(str(folder))
        # what a missing, truncated or foreign file raises: OSError and ValueError (pyarrow's and
        # json's errors are such), and the others from json that does not have the expected form
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise TrainError(f"cannot read the dataset {folder}: {error}") from error
        if "audio" not in data.column_names:
            raise TrainError(f"{folder} has no column `audio`, only {data.column_names}")
        if isinstance(data.features["audio"], datasets.Audio):
            data = data.cast_column("audio", datasets.Audio(decode=False))
        self._data = data
        self._words = next((c for c in ("text", "sentence") if c in data.column_names), None)
        state = (folder / "state.json").stat()
        self.key = [state.st_size, state.st_mtime_ns]

    def __len__(self) -> int:
        return len(self._data)

    def text(self, row: int) -> str:
        if self._words is None:
            raise ValueError(f"no column `text` or `sentence`, only {self._data.column_names}")
        return self._data[self._words][row]

    def _item(self, row: int) -> dict:
        item = self._data["audio"][row]
        item = {"path": item} if isinstance(item, str) else item
        if not isinstance(item, dict) or not any(
            item.get(key) is not None for key in ("array", "bytes", "path")
        ):
            raise ValueError(f"`audio` is not audio but {str(item)[:40]}")
        return item

    def check(self, row: int) -> None:
        item = self._item(row)
        if item.get("array") is None:
            audio.check_header(self._file(item))
        elif not np.isfinite(np.asarray(item["array"], np.float32)).all():
            raise ValueError("samples that are not numbers")

    def audio(self, row: int) -> tuple[np.ndarray, int]:
        item = self._item(row)
        if item.get("array") is not None:
            return _columns(item["array"]), item["sampling_rate"]
        return audio.decode(self._file(item))

    @staticmethod
    def _file(item: dict):
        return io.BytesIO(item["bytes"]) if item.get("bytes") is not None else item["path"]


def _columns(array) -> np.ndarray:
    """float32 [samples, channels] of [samples], [channels, samples] or [samples, channels]."""
    samples = np.asarray(array, np.float32)
    if samples.ndim not in (1, 2):
        raise ValueError(f"samples of the shape {samples.shape}")
    if samples.ndim == 1:
        return samples[:, None]
    return samples.T if samples.shape[0] < samples.shape[1] else samples


class Torchaudio:
    """A dataset with torchaudio's items, (waveform [channels, samples], rate, transcript, ...).

    CLASS of `torchaudio.datasets`, or any importable `package.module.Class` that is called and
    read the same way. Where it has `get_metadata`, the file is read here: torchaudio's own
    reader needs torchcodec.
    """

    def __init__(self, spec: str):
        _, name, *arguments = spec.split(":")
        module, _, cls = name.rpartition(".")
        try:
            made = getattr(import_module(module or "torchaudio.datasets"), cls)
            self._data = made(*arguments)
        except (ImportError, OSError) as error:  # OSError: a wheel made for CUDA beside a CPU torch
            raise TrainError(
                f"{spec}: torchaudio cannot be used here ({str(error).splitlines()[0]}); install "
                "the torchaudio that fits this torch, or write a manifest"
            ) from error
        except (AttributeError, TypeError, RuntimeError, ValueError) as error:
            raise TrainError(f"{spec}: {error}") from error
        self._folders = [Path(arguments[0])] if arguments else []
        for attribute in ("_archive", "_path"):
            if hasattr(self._data, attribute):
                self._folders.insert(0, Path(getattr(self._data, attribute)))
        self._named = hasattr(self._data, "get_metadata")
        self.key = [spec, len(self._data)]

    def __len__(self) -> int:
        return len(self._data)

    def _item(self, row: int) -> tuple:
        return self._data.get_metadata(row) if self._named else self._data[row]

    def text(self, row: int) -> str:
        said = self._item(row)[2]
        return said.get("sentence", "") if isinstance(said, dict) else said

    def _file(self, row: int) -> Path:
        name = self._item(row)[0]
        places = [folder / name for folder in self._folders]
        return next((place for place in places if place.exists()), Path(name))

    def check(self, row: int) -> None:
        if self._named:
            audio.check_header(self._file(row))

    def audio(self, row: int) -> tuple[np.ndarray, int]:
        if self._named:
            return audio.decode(self._file(row))
        waveform, rate = self._item(row)[:2]
        return np.asarray(waveform, np.float32).T, rate
