"""python -m kdkernels.transcribe --stream: words as they become final."""

import io
import json
import subprocess
import sys
import wave

import numpy as np
import pytest
import soundfile
import torch
from tones import RATE, SPACE, call, tones

from kdkernels.asr import audio, recognise
from kdkernels.asr.stream import blocks


def pcm(samples, channels=1):
    return np.repeat(audio.to_int16(samples)[:, None], channels, 1).astype("<i2").tobytes()


def wav(samples, rate=RATE, channels=1, width=2):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(pcm(samples, channels))
    return buffer.getvalue()


def wavex(samples, subtype):
    """WAVE_FORMAT_EXTENSIBLE."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format="WAVEX", subtype=subtype)
    return buffer.getvalue()


class Pipe(io.BytesIO):
    """Cannot seek, like standard input."""

    def seekable(self):
        return False

    def seek(self, *_):
        raise OSError("no seeking here")

    tell = seek


def stream(monkeypatch, run, content, *arguments):
    monkeypatch.setattr(sys, "stdin", type("Input", (), {"buffer": Pipe(content)})())
    return call("--stream", "--model", run, *arguments)


def test_channels_in_opposite_phase(monkeypatch, capsys, run):
    samples = tones("ab cd abc", np.random.default_rng(0))[0]
    both = audio.to_int16(np.stack([samples, -samples], 1)).astype("<i2").tobytes()
    assert stream(monkeypatch, run, both, "--channels", "2", "--doubt", "0") == 0
    said = capsys.readouterr()
    assert said.out == "ab cd abc\n"
    assert said.err.splitlines()[0] == f"warning: the stream: {audio.CANCEL}"
    assert said.err.count("warning") == 1


@pytest.mark.parametrize("kind", ["pcm", "pcm stereo", "wav", "endless wav", "wavex"])
def test_a_stream_says_what_the_recording_says(monkeypatch, capsys, run, long, tmp_path, kind):
    samples = long[0][: 30 * RATE]
    channels = 2 if "stereo" in kind else 1
    content = pcm(samples, channels) if "pcm" in kind else wav(samples)
    if "endless" in kind:  # as a recorder writes that does not know when it will be stopped
        content = (
            content[:4] + b"\xff\xff\xff\xff" + content[8:40] + b"\xff\xff\xff\xff" + content[44:]
        )
    soundfile.write(tmp_path / "a.wav", audio.to_int16(samples), RATE)
    if kind == "wavex":
        content = wavex(audio.to_int16(samples), "PCM_16")
    assert call(tmp_path / "a.wav", "--model", run) == 0
    capsys.readouterr()
    offline = json.loads((tmp_path / "a.json").read_text())["words"]
    assert stream(monkeypatch, run, content, "--json", "--channels", channels) == 0
    said = capsys.readouterr()
    streamed = [json.loads(line) for line in said.out.splitlines()]
    assert len(streamed) == len(offline)
    for a, b in zip(streamed, offline, strict=True):
        assert (a["word"], a["start"], a["end"]) == (b["word"], b["start"], b["end"])
        assert a["confidence"] == pytest.approx(b["confidence"], abs=1e-3)
    assert f"{len(samples) / RATE:.1f} s, {len(offline)} words" in said.err


def test_words_come_as_soon_as_they_are_final(monkeypatch, capsys, run, recogniser, long):
    samples = long[0][: 30 * RATE]
    assert stream(monkeypatch, run, pcm(samples), "--json") == 0
    said = capsys.readouterr()
    lags = [json.loads(line)["latency"] for line in said.out.splitlines()][:-6]  # but at the end
    ahead = recognise.look_ahead(recogniser)
    # until the space after it is heard with its context; and no word before it could be
    assert all(ahead <= lag + 0.05 for lag in lags)
    assert max(lags) <= ahead + SPACE + 0.25
    assert f"{ahead:.2f} s are what the model must hear after it" in said.err


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_words_do_not_wait_in_a_buffer(monkeypatch, run, long, form):
    """What had been written when the stream ended, into a pipe that keeps some 8 KB back."""
    out, there = io.TextIOWrapper(io.BytesIO()), []

    class Watched(Pipe):
        def read(self, size):
            data = super().read(size)
            if not data:
                there.append(out.buffer.getvalue().decode())
            return data

    monkeypatch.setattr(sys, "stdout", out)
    source = Watched(pcm(long[0][: 10 * RATE]))
    monkeypatch.setattr(sys, "stdin", type("Input", (), {"buffer": source})())
    assert call("--stream", "--model", run, *form) == 0
    assert len(there[0].split()) > 5


def test_what_follows_the_look_ahead_changes_no_word(recogniser, long):
    samples = long[0][: 20 * RATE].copy()
    cut = 10 * RATE
    other = np.concatenate([samples[:cut], np.random.default_rng(9).random(10 * RATE, "f4")])
    final = 10 - recognise.look_ahead(recogniser)
    with torch.no_grad():
        a, b = (torch.cat(list(recognise.frames(recogniser, [x], RATE))) for x in (samples, other))
    same = int(final / recogniser.frame)
    torch.testing.assert_close(a[:same], b[:same], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(a[same + 20], b[same + 20], atol=1e-4)


def test_a_stream_prints_words_and_lines(monkeypatch, capsys, run):
    rng = np.random.default_rng(0)
    parts = [tones("ab cd", rng)[0], 0.003 * rng.standard_normal(2 * RATE), tones("dab", rng)[0]]
    assert stream(monkeypatch, run, pcm(np.concatenate(parts)), "--doubt", "0") == 0
    assert capsys.readouterr().out == "ab cd\ndab\n"


@pytest.mark.parametrize("content", [b"", b"\0"])
def test_a_stream_of_nothing(monkeypatch, capsys, run, content):
    assert stream(monkeypatch, run, content) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: standard input ended before a sample came")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"RIFF\0\0\0\0nonsense", "the wav stream cannot be read"),
        (b"RIFF", "the wav stream cannot be read"),
        (wavex(np.zeros(100), "FLOAT"), "the wav stream cannot be read (unknown format: 3)"),
        (wav(np.zeros(100), width=1), "8 bits a sample; send 16"),
        (wav(np.zeros(100), rate=10), "10 samples a second"),
    ],
)
def test_a_wav_stream_that_cannot_be_read(monkeypatch, capsys, run, content, message):
    assert stream(monkeypatch, run, content) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "said"),
    [("FLAC", "flac"), ("OGG", "ogg"), ("MP3", "mp3"), ("AIFF", "aiff"), ("CAF", "caf"),
     ("AU", "au"), ("RF64", "rf64")],
)  # fmt: skip
def test_a_stream_of_another_format_is_refused(monkeypatch, capsys, run, kind, said):
    written = io.BytesIO()
    endian = "BIG" if kind == "AU" else None
    soundfile.write(written, 0.1 * np.ones(RATE, "f4"), RATE, format=kind, endian=endian)
    assert stream(monkeypatch, run, written.getvalue()) == 2
    said_all = capsys.readouterr()
    assert said_all.err.startswith(f"error: the stream is {said}, expected raw 16-bit samples")
    assert said_all.out == ""


def test_quiet_samples_are_of_no_format():
    for sample in range(-1024, 1024):
        content = np.full(4, sample, "<i2").tobytes()
        rate, _ = blocks(io.BytesIO(content), RATE, 1)
        assert rate == RATE


def test_standard_input_that_is_closed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert call("--stream", "--model", "x") == 2
    said = capsys.readouterr().err
    assert said == "error: --stream: standard input is closed; pipe audio into it\n"


def test_from_the_command_line_through_a_pipe(run):
    samples = tones("ab cd dab", np.random.default_rng(0))[0]
    command = [sys.executable, "-W", "error", "-m", "kdkernels.transcribe", "--stream"]
    done = subprocess.run(
        [*command, "--model", str(run), "--doubt", "0"],
        input=pcm(samples), capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout == b"ab cd dab\n"
    assert done.stderr == b"1.3 s, 3 words\n"  # none was final before the stream ended
