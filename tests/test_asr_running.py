"""Killed and started again, a full disk, a broken checkpoint, two processes."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import TINY, altered

from kdkernels import train
from kdkernels.asr import files, options, recognise, settings, training

STUDENT = "student_distilled.safetensors"
ARMS = "--arms=alone,distilled"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("run") / "out"
    assert train.main([*TINY, ARMS, "--out", str(folder)]) == 0
    return folder


def again(out, capsys, *arguments):
    capsys.readouterr()
    code = train.main([*TINY, ARMS, "--out", str(out), *arguments])
    return code, capsys.readouterr().err


def test_killed_at_any_moment_it_ends_with_the_same_bits(out, tmp_path, capsys):
    """SIGKILL, to processes forked from one that has imported everything: they begin at once."""
    command = [*TINY, ARMS, "--out", str(tmp_path)]
    for awaited in (
        "cache/features-*",
        "checkpoints/teacher/step-00000002.*",
        "checkpoints/student_distilled/step-00000001.*",
    ):
        process = multiprocessing.get_context("forkserver").Process(
            target=train.main, args=(command,)
        )
        process.start()
        while not list(tmp_path.glob(awaited)) and process.is_alive():
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / STUDENT).exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".draft.tmp").write_text("of another program")
    (tmp_path / ".report.json.999999999.kdkernels-tmp").write_text("half")
    assert again(tmp_path, capsys) == (0, "")
    assert (tmp_path / STUDENT).read_bytes() == (out / STUDENT).read_bytes()
    assert not list(tmp_path.rglob("*.kdkernels-tmp"))
    assert (tmp_path / "mine" / ".draft.tmp").exists()


def test_killed_right_after_a_checkpoint_it_has_the_best(out, tmp_path, capsys, monkeypatch):
    best = "checkpoints/student_alone/best.safetensors"
    step = files.load_header(out / best)["step"]
    save = training.Checkpoints.save

    def killed(checkpoints, model, optimizer, facts):
        save(checkpoints, model, optimizer, facts)
        if checkpoints.folder.name == "student_alone" and facts["step"] == step:
            raise KeyboardInterrupt

    cache = ("--cache", str(out / "cache"))
    with monkeypatch.context() as patched:
        patched.setattr(training.Checkpoints, "save", killed)
        assert again(tmp_path, capsys, *cache)[0] == 130
    assert again(tmp_path, capsys, *cache)[0] == 0
    assert (tmp_path / best).read_bytes() == (out / best).read_bytes()


@pytest.mark.parametrize("broken", [1, 2])
@pytest.mark.parametrize("how", [altered, lambda content: content[:1000]], ids=["altered", "cut"])
def test_of_broken_checkpoints_the_one_before_is_used(out, capsys, broken, how):
    good = (out / STUDENT).read_bytes()
    (out / STUDENT).unlink()
    newest = sorted((out / "checkpoints" / "student_distilled").glob("step-*"))[-broken:]
    for path in newest:
        path.write_bytes(how(path.read_bytes()))
    code, said = again(out, capsys)
    assert code == 0
    assert said.count("cannot be read") == broken
    assert said.count("the checkpoint before it is used") == 1  # of two, where one is broken
    assert said.count("the training begins anew") == broken - 1
    assert f"{newest[0]} " in said
    assert (out / STUDENT).read_bytes() == good


def test_a_model_that_was_altered_is_made_again(out, capsys):
    good = (out / STUDENT).read_bytes()
    (out / STUDENT).write_bytes(altered(good))
    code, said = again(out, capsys)
    assert code == 0
    assert f"{out / STUDENT} cannot be read (it is damaged" in said
    assert (out / STUDENT).read_bytes() == good


def test_a_training_that_diverges_is_stopped(tmp_path, capsys):
    command = [*TINY, ARMS, "--learning-rate=1e30", "--out", str(tmp_path)]
    for _ in range(2):  # again, and what is kept is the step before
        assert train.main(command) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: teacher: at step ")
        assert "Lower --learning-rate (1e+30)" in said
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_few_checkpoints_are_kept_and_the_best(out):
    names = sorted(path.name for path in (out / "checkpoints" / "student_alone").iterdir())
    assert names == ["best.safetensors", "step-00000003.safetensors", "step-00000004.safetensors"]


@pytest.mark.parametrize("name", ["teacher", "student_alone"])
def test_the_best_is_a_model_like_the_last(out, name):
    best = recognise.load(out / "checkpoints" / name / "best.safetensors")
    last = recognise.load(out / f"{name}.safetensors")
    assert best.encoder.shape == last.encoder.shape
    assert best.alphabet.characters == last.alphabet.characters


def test_a_full_disk_is_told_and_costs_nothing(out, tmp_path, capsys, monkeypatch):
    written = []

    def fsync(descriptor):
        written.append(descriptor)
        if len(written) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = ("--cache", str(out / "cache"))
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", fsync)
        code, said = again(tmp_path, capsys, *cache)
    assert code == 2
    assert said.startswith("error: cannot write ")
    assert "No space left on device; fix that and run the same command again" in said
    assert again(tmp_path, capsys, *cache)[0] == 0
    assert (tmp_path / STUDENT).read_bytes() == (out / STUDENT).read_bytes()


def test_metrics_have_a_line_for_each_point(out):
    rows = [json.loads(line) for line in (out / "student_alone.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(row["loss"] > 0 for row in rows)


def test_the_printed_settings_are_those_of_the_preset(capsys):
    with pytest.raises(SystemExit, match="0"):
        options.parse(["--preset", "quick", "--keep=3", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["teacher_steps"] == settings.PRESETS["quick"]["teacher_steps"]
    assert printed["keep"] == 3


def test_the_resolved_settings_can_be_given_back(out):
    parsed = options.parse(["--config", str(out / "settings.yaml")])
    assert parsed == options.parse([*TINY, ARMS, "--out", str(out)])


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.toml", "teacher_steps = 7\nseed = 3\n"), ("a.yaml", "teacher_steps: 7\nseed: 3\n")],
)
def test_a_settings_file_and_the_command_line_over_it(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    given = ["--preset=quick", f"--config={tmp_path / name}", "--seed=4", "--skip-bad"]
    parsed = options.parse(given)
    assert parsed.skip_bad
    assert (parsed.teacher_steps, parsed.seed) == (7, 4)
    assert parsed.student_steps == settings.PRESETS["quick"]["student_steps"]


@pytest.mark.parametrize(("name", "text"), [("a.toml", "seed = 3"), ("a.yaml", "seed: 3")])
def test_settings_are_printed_in_the_format_of_their_file(tmp_path, capsys, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(SystemExit, match="0"):
        options.parse([f"--config={path}", "--arms=alone,distilled", "--print_config"])
    path.write_text(capsys.readouterr().out)
    assert options.parse([f"--config={path}"]) == settings.Settings(
        seed=3, arms=["alone", "distilled"]
    )


@pytest.mark.parametrize(
    "given", ["alone,distilled", "[alone, distilled]", '["alone","distilled"]', "alone,distilled,"]
)
@pytest.mark.parametrize("config", ["", "teachers = ['own']"])
def test_a_list_on_the_command_line(tmp_path, given, config):
    path = tmp_path / "a.toml"
    path.write_text(config)
    for more in ([], [f"--config={path}"]):
        parsed = options.parse([*more, "--arms", given])
        assert parsed == settings.Settings(arms=["alone", "distilled"])


@pytest.mark.parametrize("arms", ["--arms=alone distilled", "--arms=[1]", "--config=a.yaml"])
def test_a_list_with_a_mistake_shows_a_right_one(tmp_path, monkeypatch, capsys, arms):
    (tmp_path / "a.yaml").write_text("arms: 7")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        options.parse([arms])
    assert "alone,distilled" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"), [("tcher_steps = 7", "tcher_steps"), ("seed = 'x'", "seed")]
)
def test_a_settings_file_with_a_mistake(tmp_path, text, message, capsys):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        options.parse(["--config", str(tmp_path / "a.toml")])
    assert message in capsys.readouterr().err


def test_two_seeds_make_one_report(out, tmp_path, capsys):
    cache = ("--cache", str(out / "cache"))
    assert again(tmp_path, capsys, *cache, "--seeds=2")[0] == 0
    together = json.loads((tmp_path / "report.json").read_text())
    each = [json.loads((tmp_path / f"seed-{s}" / "report.json").read_text()) for s in (0, 1)]
    for name in ("teacher", "student_alone", "student_distilled"):
        mean = sum(r["wer"][name] for r in each) / 2
        assert together["wer"][name] == pytest.approx(mean)
        low, high = together["wer_interval"][name]
        assert low <= mean <= high
    assert "Means over seeds 0, 1" in (tmp_path / "report.md").read_text()


def test_two_processes_do_what_one_does(out, tmp_path):
    """gloo; each computes half of every batch. And one that computes it in three pieces."""
    own = [*TINY, ARMS, "--precision=fp32", "--cache", str(out / "cache"), "--out"]
    one, two, three = (tmp_path / x for x in ("one", "two", "three"))
    assert train.main([*own, str(one)]) == 0
    assert train.main([*own, str(three), "--accumulate=3"]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "kdkernels.train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *own, str(two)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("# Distillation report") == 1
    for name in ("teacher", "student_alone", "student_distilled"):
        models = [load_file(folder / f"{name}.safetensors") for folder in (one, two, three)]
        for other in models[1:]:
            for key, expected in models[0].items():
                torch.testing.assert_close(other[key], expected, rtol=1e-5, atol=2e-6)
    curves = [json.loads((x / "report.json").read_text())["curves"] for x in (one, two, three)]
    for name, curve in curves[0].items():
        for other in curves[1:]:
            for a, b in zip(curve, other[name], strict=True):
                assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


def test_tensorboard_shows_the_curve(out, tmp_path, capsys):
    """Read back by TensorBoard itself. A finished training is not shown again."""
    for name in ("student_alone", "teacher"):
        for path in (out / f"{name}.safetensors", out / f"{name}.jsonl"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert again(tmp_path, capsys, "--cache", str(out / "cache"), "--tensorboard")[0] == 0
    board = EventAccumulator(str(tmp_path / "tensorboard" / "student_distilled")).Reload()
    curve = json.loads((tmp_path / "report.json").read_text())["curves"]["student_distilled"]
    for name in ("wer", "loss"):
        shown = [(event.step, event.value) for event in board.Scalars(name)]
        assert shown == [(p["step"], pytest.approx(p[name], rel=1e-6)) for p in curve]


def test_tensorboard_that_is_missing_is_said(out, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, said = again(tmp_path, capsys, "--cache", str(out / "cache"), "--tensorboard")
    assert code == 2
    assert 'tensorboard is missing: pip install "kdkernels[tensorboard]"' in said
