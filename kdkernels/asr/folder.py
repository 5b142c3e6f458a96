"""The folder of a run, OUT: what this run makes, and nothing of a run with other settings or data.

What another run left is set aside, in a folder of OUT/previous, before anything new begins. A stage
takes back from there what was made from exactly the same things: its files carry a key.
"""

import itertools
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from . import files, processes, report, settings
from .arms import TITLES
from .console import warn

STAGES = ("ssl", *TITLES)
SETTINGS = "settings.yaml"


def _of(stage: str) -> list[str]:
    """Paths in OUT that a stage may write."""
    return [
        f"{stage}.safetensors",
        f"{stage}.jsonl",
        f"checkpoints/{stage}",
        f"tensorboard/{stage}",
    ]


def _keys(path: Path) -> set[str]:
    """The keys of the readable files at `path`, a file or a folder of them."""
    if path.is_dir():
        return set().union(*map(_keys, path.glob("*.safetensors")))
    if path.suffix == ".safetensors":
        return {files.load_header(path).get("key")} - {None}
    try:
        return {json.loads(line)["key"] for line in path.read_text().splitlines()}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


@contextmanager
def alone(path: Path):
    """Lock the folder against other trainings: two would take each other's files away.

    Raises TrainError where it is locked. The lock ends with the process, however that ends.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        fcntl = None
    if processes.rank() > 0 or fcntl is None:
        yield
        return
    files.check_writable(path)
    with open(path / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise files.TrainError(
                f"process {file.read().strip()} is at work in {path}: wait for it, stop it, or "
                "choose another folder with --out"
            ) from error
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


class Folder:
    def __init__(self, path: Path, chosen: settings.Settings):
        self.path, self._settings = path, chosen
        self._own: set[str] = set()  # stages whose files are this run's

    def check(self) -> None:
        """Raises TrainError where files that a run would replace are no run's."""
        if "student_steps" in settings.read(self.path / SETTINGS):
            return
        parts = [part for stage in STAGES for part in _of(stage)]
        for path in (self.path / part for part in (SETTINGS, *parts, *report.FILES)):
            if path.exists() and not _keys(path):
                raise files.TrainError(
                    f"{path} would be replaced, and there is no {SETTINGS} of a training beside "
                    "it: choose another folder with --out, or move that file"
                )

    def begin(self) -> None:
        """Set aside what a run with other settings left, and write OUT/settings.yaml."""
        written = self.path / SETTINGS
        old = settings.read(written)
        changed = settings.changes(old, self._settings)
        if changed and (aside := self._set_aside(settings.digest(old))):
            os.replace(written, aside / written.name)
            warn(
                f"{self.path} held a run with other settings ({', '.join(changed)}): it is "
                f"set aside in {aside}, and what does not depend on them is taken back"
            )
        settings.save(self._settings, written)

    def claim(self, stage: str, key: str) -> None:
        """Keep only those of a stage's files that have this key; called before the stage begins."""
        if set().union(*(_keys(self.path / part) for part in _of(stage))) - {key}:
            aside = self._set_aside(settings.digest(vars(self._settings)))
            warn(
                f"{self.path} held {stage}, made from other data or by another version: it is set "
                f"aside in {aside}, with what came after it"
            )
        for run in sorted((self.path / "previous").glob("*")):
            found = [part for part in _of(stage) if (run / part).exists()]
            if {key} == set().union(*(_keys(run / part) for part in found)):
                for part in found:
                    if not (self.path / part).exists():
                        _move(run / part, self.path / part)
        self._own.add(stage)

    def _set_aside(self, name: str) -> Path | None:
        """Move what is not this run's to OUT/previous/NAME, or NAME-2 and so on where it would
        replace something; None where there is nothing to move."""
        teachers = {
            Path(spec.rpartition("=")[0] or spec).resolve() for spec in self._settings.teachers
        }
        parts = [part for stage in STAGES if stage not in self._own for part in _of(stage)]
        there = [
            part
            for part in (*parts, *report.FILES)
            if (self.path / part).exists() and (self.path / part).resolve() not in teachers
        ]
        numbered = (f"{name[:8]}-{i}" if i > 1 else name[:8] for i in itertools.count(1))
        folders = (self.path / "previous" / name for name in numbered)
        aside = next(f for f in folders if not any((f / part).exists() for part in there))
        for part in there:
            _move(self.path / part, aside / part)
        return aside if there else None


def _move(source: Path, target: Path) -> None:
    """Rename, replacing what is there."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(source, target)
    except OSError as error:
        raise files.TrainError(
            f"cannot move {source} to {target}: {error.strerror or error}; fix that and run the "
            "same command again"
        ) from error
