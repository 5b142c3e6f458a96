"""One folder, one run: what another run left there is set aside, and is not lost."""

import os
import shutil

import pytest
import torch
from test_train import TINY

from kdkernels import train
from kdkernels.asr import batches, files
from kdkernels.asr.folder import Folder, alone
from kdkernels.asr.report import FILES
from kdkernels.asr.settings import Settings, save
from kdkernels.asr.training import Checkpoints

COMMAND = [*TINY, "--arms=alone,distilled"]
RESULTS = {"teacher.safetensors", "student_alone.safetensors", "student_distilled.safetensors"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    assert train.main([*COMMAND, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def steps(monkeypatch):
    """The steps that were drawn, of all trainings."""
    drawn = []
    draw = batches.Sampler.__call__

    def noted(self, step):
        drawn.append(step)
        return draw(self, step)

    monkeypatch.setattr(batches.Sampler, "__call__", noted)
    return drawn


def interrupt(monkeypatch, at):
    """As by Ctrl-C, when the step `at` is drawn."""

    def pressed(self, step, draw=batches.Sampler.__call__):
        if step == at:
            raise KeyboardInterrupt
        return draw(self, step)

    monkeypatch.setattr(batches.Sampler, "__call__", pressed)


def test_a_longer_run_in_the_same_folder(finished, tmp_path, capsys, monkeypatch, steps):
    """Interrupted before it has come as far as the one before it, it goes on where it was."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = {name: (out / name).read_bytes() for name in RESULTS}
    longer = [*COMMAND, "--out", str(out), "--teacher-steps=6", "--keep=1"]
    capsys.readouterr()
    with monkeypatch.context() as patched:
        interrupt(patched, at=3)
        assert train.main(longer) == 130
    warning, stopped = capsys.readouterr().err.splitlines()
    assert warning.startswith(
        f"warning: {out} held a run with other settings (--teacher-steps 4 -> 6): it is set aside"
    )
    assert stopped == "stopped: the same command goes on from the last checkpoint"
    names = {path.name for path in (out / "checkpoints" / "teacher").iterdir()}
    assert names == {"best.safetensors", "step-00000003.safetensors"}
    assert not {path.name for path in out.iterdir()} & (RESULTS | set(FILES))
    (aside,) = (out / "previous").iterdir()
    assert {path.name for path in aside.iterdir()} >= RESULTS | set(FILES) | {"settings.yaml"}

    steps.clear()
    assert train.main(longer) == 0
    assert capsys.readouterr().err == ""
    assert steps[:4] == [3, 4, 5, 0]  # the rest of the teacher; then a student
    assert (out / "teacher.safetensors").read_bytes() != before["teacher.safetensors"]
    assert (out / "report.md").exists()

    steps.clear()
    assert train.main([*COMMAND, "--out", str(out)]) == 0
    assert "(--teacher-steps 6 -> 4)" in capsys.readouterr().err
    assert {name: (out / name).read_bytes() for name in RESULTS} == before
    assert steps == [0]  # the batch whose loss is timed


@pytest.mark.parametrize("name", ["settings.yaml", "teacher.safetensors", "report.md"])
def test_files_of_others_are_not_replaced(tmp_path, capsys, name):
    (tmp_path / name).write_text("lr: 1")
    assert train.main([*COMMAND, "--out", str(tmp_path)]) == 2
    assert f"{tmp_path / name} would be replaced" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "lr: 1"


def test_a_link_is_followed_and_a_pipe_is_not_replaced(tmp_path):
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    (tmp_path / "file").write_text("old")
    link.symlink_to(tmp_path / "file")
    os.mkfifo(pipe)
    files.write_bytes(link, b"new")
    assert link.is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    with pytest.raises(files.TrainError, match="no regular file"):
        files.write_bytes(pipe, b"new")
    assert pipe.is_fifo()


def test_a_wrong_path_leaves_a_run_where_it_is(finished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = sorted(out.iterdir())
    data = [f"--{name}=typo.jsonl" for name in ("transcribed", "untranscribed", "test")]
    assert train.main([*COMMAND, "--out", str(out), *data]) == 2
    assert "cannot read typo.jsonl" in capsys.readouterr().err
    assert sorted(out.iterdir()) == before


def test_other_data_under_the_same_settings(tmp_path, capsys):
    chosen = Settings(out=str(tmp_path))
    save(chosen, tmp_path / "settings.yaml")
    for name in ("teacher", "student_alone", "student_distilled"):
        files.save_tensors(tmp_path / f"{name}.safetensors", {"x": torch.ones(1)}, name)
    files.save_tensors(tmp_path / "mine.safetensors", {"x": torch.ones(1)}, "no stage's")
    folder = Folder(tmp_path, chosen)
    folder.begin()
    assert capsys.readouterr().err == ""
    folder.claim("teacher", "teacher")
    folder.claim("student_distilled", "of other data")
    assert "held student_distilled, made from other data" in capsys.readouterr().err
    left = {"teacher.safetensors", "mine.safetensors"}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == left
    folder.claim("student_alone", "student_alone")
    left.add("student_alone.safetensors")
    assert {path.name for path in tmp_path.glob("*.safetensors")} == left


def test_what_was_set_aside_is_not_replaced(tmp_path):
    """Other data twice under the same settings."""
    for key in ("first", "second", "third"):
        folder = Folder(tmp_path, Settings(out=str(tmp_path)))
        folder.begin()
        folder.claim("teacher", key)
        files.save_tensors(tmp_path / "teacher.safetensors", {"x": torch.ones(1)}, key)
    kept = (tmp_path / "previous").rglob("teacher.safetensors")
    assert {files.load_header(path)["key"] for path in kept} == {"first", "second"}
    Folder(tmp_path, Settings(out=str(tmp_path))).claim("teacher", "first")
    assert files.load_header(tmp_path / "teacher.safetensors")["key"] == "first"


def test_one_process_in_a_folder(finished, capsys):
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    with alone(finished):
        assert train.main([*COMMAND, "--seed=1", "--out", str(finished)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: process {os.getpid()} is at work in {finished}: wait for it")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == before
    with alone(finished):
        pass


def test_a_teacher_that_lies_in_the_folder_stays_there(tmp_path):
    path = tmp_path / "teacher.safetensors"
    files.save_tensors(path, {"x": torch.ones(1)}, "another run's")
    save(Settings(), tmp_path / "settings.yaml")
    Folder(tmp_path, Settings(seed=1, teachers=[f"{path}=2"])).begin()
    assert path.exists()


def test_a_checkpoint_of_a_later_step_is_not_kept_instead_of_a_new_one(tmp_path):
    model = torch.nn.Linear(1, 1)
    (tmp_path / "step-00000099.safetensors").write_bytes(b"broken")
    for step in (1, 2, 3):
        Checkpoints(tmp_path, "key", 2, {}).save(
            model, torch.optim.AdamW(model.parameters()), {"step": step}
        )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000002.safetensors", "step-00000003.safetensors"]
