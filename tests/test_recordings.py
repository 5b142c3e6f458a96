"""python -m kdkernels.transcribe AUDIO...: what is written, what is refused."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import srt
import torch
import webvtt
from tones import RATE, call, sentence, tones

from kdkernels.asr import audio, captions, files, recordings


@pytest.mark.parametrize(
    ("suffix", "rate", "channels"),
    [
        ("wav", 16000, 1),
        ("flac", 44100, 2),
        ("ogg", 48000, 1),
        ("wav", 22050, 6),
        ("mp3", 32000, 1),
    ],
)
def test_a_recording_of_any_kind(run, tmp_path, capsys, suffix, rate, channels):
    text = sentence(random.Random(5), 12)
    samples, starts, _ = tones(text, np.random.default_rng(5))
    seconds = len(samples) / RATE
    samples = audio.resample(samples, RATE, rate)
    path = tmp_path / f"talk.{suffix}"
    soundfile.write(path, np.repeat(samples[:, None], channels, 1), rate)
    assert call(path, "--model", run) == 0
    assert f"talk.{suffix}: {seconds:.1f} s, 12 words" in capsys.readouterr().out
    facts = json.loads((tmp_path / "talk.json").read_text())
    assert facts["text"] == text
    assert [word["word"] for word in facts["words"]] == text.split()
    for word, start in zip(facts["words"], starts, strict=True):
        assert abs(word["start"] - start) < 0.15
        assert 0 < word["confidence"] <= 1
    assert (tmp_path / "talk.txt").read_text().replace("(?)", "") == text + "\n"
    cues = webvtt.read(tmp_path / "talk.vtt")
    subtitles = list(srt.parse((tmp_path / "talk.srt").read_text()))
    assert len(cues) == len(subtitles) == len(facts["captions"])
    shown = " ".join(subtitle.content.replace("\n", " ") for subtitle in subtitles)
    assert shown.replace("(?)", "") == text


def test_a_long_recording_is_read_in_blocks(run, recogniser, long, tmp_path, monkeypatch):
    samples, text, _, _ = long
    soundfile.write(tmp_path / "long.wav", samples, RATE)
    sizes = [len(block) for block, _ in recordings.blocks(tmp_path / "long.wav")]
    assert len(sizes) > 3
    assert max(sizes) == recordings.BLOCK * RATE
    assert call(tmp_path / "long.wav", "--model", run, "--out", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "long.json").read_text())["text"] == text


def test_late_captions_are_told_of():
    words = [captions.Word("abcdefghi", i / 4, (i + 1) / 4, 1.0) for i in range(80)]  # 40 / s
    said = recordings.remarks(captions.captions(words), 20.0)
    assert said.startswith(", up to 17.")  # the tenth has to wait for nine, of 79 characters each
    assert "and after the end of the recording (--late 1.5 shows them in time" in said
    in_time = captions.captions(words, late=1.5)
    assert recordings.remarks(in_time, 20.0).endswith("of them faster than 20 characters a second")
    assert recordings.remarks(captions.captions(words[:9]), 20.0) == ""
    assert recordings.remarks([], 1.0) == ""


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_nobody_reads_what_it_says(run, tmp_path, closed):
    """As `python -m kdkernels.transcribe A B | head -1` does: B is transcribed too."""
    names = ("a", "b", "c")
    for name in names:
        soundfile.write(tmp_path / f"{name}.wav", tones("ab cd", np.random.default_rng(0))[0], RATE)
    paths = [str(tmp_path / f"{name}.wav") for name in ("a", "missing", "b", "c")]
    command = [sys.executable, "-m", "kdkernels.transcribe", *paths, "--model", str(run)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as process:
        getattr(process, closed).close()
        said = (process.stderr if closed == "stdout" else process.stdout).read()
        assert process.wait(120) == 1
    assert "Broken" not in said
    assert all((tmp_path / f"{name}.srt").exists() for name in names)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_under_what_it_says(run, tmp_path):
    samples = tones("ab cd", np.random.default_rng(0))[0]
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    command = [sys.executable, "-m", "kdkernels.transcribe", "--model", str(run)]
    with open("/dev/full", "w") as full:
        to = {"stdout": full, "stderr": subprocess.PIPE, "timeout": 120}
        done = subprocess.run([*command, str(tmp_path / "a.wav")], **to)
        assert (done.returncode, done.stderr) == (0, b"")
        assert (tmp_path / "a.srt").exists()
        raw = audio.to_int16(samples).tobytes()
        done = subprocess.run([*command, "--stream"], **to, input=raw)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: [Errno 28]")
    assert done.stderr.count(b"\n") == 1


def test_outputs_are_written_all_or_none(run, tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.wav"
    soundfile.write(path, tones("ab cd", np.random.default_rng(0))[0], RATE)
    real = files.write_bytes

    def write_bytes(path, data):
        if path.suffix == ".vtt":
            raise files.TrainError(f"cannot write {path}: disk full; run the same command again")
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", write_bytes)
        assert call(path, "--model", run) == 1
    assert "a.vtt: disk full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]
    assert call(path, "--model", run) == 0


def test_what_cannot_be_read_is_named_and_the_others_are_done(run, tmp_path, capsys):
    good = tmp_path / "good.wav"
    soundfile.write(good, tones("ab cd", np.random.default_rng(0))[0], RATE)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    nan = np.zeros(RATE, "f4")
    nan[9] = np.nan
    soundfile.write(tmp_path / "nan.wav", nan, RATE, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("this is no audio" * 100)
    (tmp_path / "nothing.wav").write_bytes(b"")
    (tmp_path / "header.wav").write_bytes(good.read_bytes()[:44])
    soundfile.write(tmp_path / "slow.wav", np.zeros(100), 100)
    reasons = {
        "missing.wav": "there is no such file",
        "empty.wav": "holds no audio",
        "nan.wav": "holds samples that are not numbers",
        "text.wav": "cannot be read as audio",
        "nothing.wav": "cannot be read as audio",
        "header.wav": "holds no audio",
        "slow.wav": "has 100 samples a second, expected one of 1000 to 768000",
        ".": "it is a folder",
    }
    bad = [tmp_path / name for name in reasons]
    assert call(*bad, good, "--model", run, "--out", tmp_path / "out") == 1
    said = capsys.readouterr()
    lines = said.err.splitlines()
    for path, reason, line in zip(bad, reasons.values(), lines, strict=False):
        assert line.startswith(f"error: {path} ")
        assert reason in line
    assert lines[len(bad) :] == [f"{len(bad)} of {len(bad) + 1} recordings could not be done"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"good.{suffix}" for suffix in ("txt", "json", "vtt", "srt")
    }
    assert said.out.startswith(f"{good}: ")


@pytest.mark.parametrize(
    ("suffix", "kept", "lacks"),
    [
        ("wav", 0.6, 0.4),
        ("aiff", 0.6, 0.4),
        ("flac", 0.6, 0.4),
        ("mp3", 0.6, 0.4),
        ("ogg", 0.6, math.nan),
        ("wav", 1.0, 0.0),
        ("aiff", 1.0, 0.0),
        ("flac", 1.0, 0.0),
        ("mp3", 1.0, 0.0),
        ("ogg", 1.0, 0.0),
    ],
)
def test_a_truncated_recording_is_transcribed_as_far_as_it_goes(
    run, tmp_path, capfd, suffix, kept, lacks
):
    text = sentence(random.Random(5), 24)
    samples, _, ends = tones(text, np.random.default_rng(5))
    seconds = len(samples) / RATE
    path = tmp_path / f"talk.{suffix}"
    soundfile.write(path, audio.resample(samples, RATE, 32000), 32000)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert call(path, "--model", run) == 0
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]
    facts = json.loads((tmp_path / "talk.json").read_text())
    words = [word["word"] for word in facts["words"]]
    there = sum(end < facts["seconds"] - 0.2 for end in ends)
    assert words[:there] == text.split()[:there]
    if lacks == 0.0:
        assert said == []
        return
    (line,) = said
    assert line.startswith(f"warning: {path} is truncated or damaged: ")
    assert line.endswith(f"cannot be read, beside {facts['seconds']:.1f} s that can")
    if math.isnan(lacks):
        assert ": its end cannot" in line
    else:
        missing = float(line.split("damaged: ")[1].split(" s")[0])
        assert missing + facts["seconds"] == pytest.approx(seconds, abs=0.1)
        assert missing == pytest.approx(lacks * seconds, abs=0.1 * seconds)


def test_an_mp3_that_does_not_count_its_frames_is_not_called_truncated(run, tmp_path, capfd):
    path = tmp_path / "a.mp3"
    quiet_then_loud = np.repeat([0.0, 0.1], 8 * RATE)
    quiet_then_loud *= np.random.default_rng(0).standard_normal(16 * RATE)
    soundfile.write(path, quiet_then_loud, RATE, bitrate_mode="VARIABLE")
    content = path.read_bytes()
    path.write_bytes(content[content.index(content[:2], 2) :])  # from its second frame on
    with soundfile.SoundFile(path) as file:
        assert file.frames > 1.2 * len(quiet_then_loud)  # what libsndfile guesses
    assert call(path, "--model", run) == 0
    assert "warning: " not in capfd.readouterr().err


@pytest.mark.parametrize("second", [-1.0, -0.9, 0.0, 1.0])
def test_channels_that_cancel_each_other(run, tmp_path, capsys, second):
    text = sentence(random.Random(5), 12)
    samples = tones(text, np.random.default_rng(5))[0]
    path = tmp_path / "talk.wav"
    soundfile.write(path, np.stack([samples, second * samples], 1), RATE)
    assert call(path, "--model", run) == 0
    assert json.loads((tmp_path / "talk.json").read_text())["text"] == text
    warned = [f"warning: {path}: {audio.CANCEL}"] if second < 0 else []
    assert capsys.readouterr().err.splitlines() == warned


def test_nothing_is_lost(run, tmp_path, capsys):
    samples = tones("ab cd", np.random.default_rng(0))[0]
    for name in ("a.wav", "a.flac"):
        soundfile.write(tmp_path / name, samples, RATE)
    (tmp_path / "a.txt").write_text("my notes")
    soundfile.write(tmp_path / "c.wav", samples, RATE)
    assert call(tmp_path / "a.wav", tmp_path / "c.wav", "--model", run) == 1
    assert "a.txt exists; --force replaces it" in capsys.readouterr().err
    assert (tmp_path / "a.txt").read_text() == "my notes"
    assert (tmp_path / "c.txt").exists()  # the others are done
    (tmp_path / "b").mkdir()
    soundfile.write(tmp_path / "b" / "a.wav", samples, RATE)
    both = (tmp_path / "a.wav", tmp_path / "b" / "a.wav")
    assert call(*both, "--model", run, "--out", tmp_path / "out") == 2
    assert "would both be written to" in capsys.readouterr().err
    assert call(tmp_path / "a.wav", "--model", run, "--force") == 0
    assert (tmp_path / "a.txt").read_text() != "my notes"
    (tmp_path / "file").write_text("")
    assert call(tmp_path / "a.wav", "--model", run, "--out", tmp_path / "file" / "x") == 2
    assert "cannot write into the folder" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch, capsys):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    soundfile.write(tmp_path / "a.wav", np.zeros(RATE), RATE)
    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    # without a model: none is asked
    assert recordings.run([tmp_path / "a.wav"], None, False, 0.5, 1.5, None) == 1
    said = capsys.readouterr().err
    assert f"cannot write into the folder {tmp_path}: Permission denied" in said
    assert "--out" in said


def test_recordings_that_differ_in_their_suffix_alone(run, tmp_path):
    names = ("a.wav", "a.flac", "b.wav")
    for name in names:
        soundfile.write(tmp_path / name, tones("ab cd", np.random.default_rng(0))[0], RATE)
    out = tmp_path / "out"
    assert call(*(tmp_path / name for name in names), "--model", run, "--out", out) == 0
    assert {p.name for p in out.glob("*.txt")} == {"a.wav.txt", "a.flac.txt", "b.txt"}


def test_a_run_of_several_seeds_names_the_folder_of_one(tmp_path, capsys):
    one = tmp_path / "seed-0" / "student_distilled.safetensors"
    one.parent.mkdir()
    one.touch()
    assert call("a.wav", "--model", tmp_path) == 2
    assert f"give the folder of one seed, such as {one.parent}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no model"),
        (b"", "cannot be read as a model"),
        (b"x" * 1000, "cannot be read as a model"),
        ({}, "is not a model of `python -m kdkernels.train`"),
        ({"shape": [8, 2, 5], "alphabet": " abcd"}, "cannot be read as a model"),
    ],
)
def test_a_model_that_cannot_be_used(tmp_path, capsys, content, message):
    path = tmp_path / "student_distilled.safetensors"
    if isinstance(content, dict):
        files.save_tensors(path, {"x": torch.zeros(1)}, "key", **content)
    elif content is not None:
        path.write_bytes(content)
    for place in (tmp_path, path):
        assert call("a.wav", "--model", place) == 2
        assert capsys.readouterr().err.startswith("error: ")
        assert call("a.wav", "--model", place) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [[], ["a.wav", "--stream"], ["a.wav", "--doubt", "2"], ["a.wav", "--late", "-1"],
     ["--stream", "--rate", "0"], ["--stream", "--channels", "0"]],
)  # fmt: skip
def test_arguments_that_make_no_sense(arguments):
    with pytest.raises(SystemExit, match="2"):
        call(*arguments, "--model", "x")
