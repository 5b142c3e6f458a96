"""Transcribing with a small model that is trained here, in seconds, to read tones: a letter is a
tone, a space a silence. So what is said, and when, is known."""

import io
import itertools
import json
import random
import subprocess
import sys
import wave

import numpy as np
import pytest
import soundfile
import srt
import torch
import webvtt

import kdkernels as kd
from kdkernels import transcribe
from kdkernels.asr import audio, data, features, files, model, recognise

LETTERS = "abcd"
LETTER, SPACE = 0.12, 0.15  # seconds
RATE = 16000


def tones(text, rng, gap=SPACE, noise=0.003):
    """(float32 samples at 16 kHz, start of each word, end of each word)."""
    parts, starts, ends, at = [], [], [], 0.0
    for before, letter in itertools.pairwise(f" {text} "):
        if letter == " ":
            ends.append(at)
            parts.append(np.zeros(int(gap * RATE)))
            at += gap
            continue
        if before == " ":
            starts.append(at)
        seconds = np.arange(int(LETTER * RATE)) / RATE
        pitch = 400 * 1.8 ** LETTERS.index(letter)
        parts.append(0.3 * np.sin(2 * np.pi * pitch * seconds) * np.hanning(len(seconds)) ** 0.3)
        at += LETTER
    samples = np.concatenate(parts)
    return (samples + noise * rng.standard_normal(len(samples))).astype(np.float32), starts, ends


def sentence(rng, words):
    """Words of two to four letters without repeats side by side."""
    said = []
    for _ in range(words):
        word = rng.choice(LETTERS)
        for _ in range(rng.randint(1, 3)):
            word += rng.choice([letter for letter in LETTERS if letter != word[-1]])
        said.append(word)
    return " ".join(said)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a student that reads tones."""
    torch.manual_seed(0)
    rng, noise = random.Random(0), np.random.default_rng(0)
    alphabet = data.Alphabet(" " + LETTERS)
    encoder = model.Encoder(24, 3, len(alphabet))
    texts = [sentence(rng, 5) for _ in range(48)]
    rows = [torch.from_numpy(audio.to_int16(tones(text, noise)[0])) for text in texts]
    rows = [features.log_mel(samples).float() for samples in rows]
    targets = [alphabet.encode(text) for text in texts]
    optimizer = torch.optim.AdamW(encoder.parameters(), 1e-2)
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 150)
        chosen = rng.sample(range(len(rows)), 8)
        x = torch.nn.utils.rnn.pad_sequence([rows[i] for i in chosen], batch_first=True)
        y = torch.nn.utils.rnn.pad_sequence([targets[i] for i in chosen], batch_first=True)
        lengths = torch.tensor([len(rows[i]) for i in chosen])
        logits, lengths = encoder(x, lengths)
        sizes = torch.tensor([len(targets[i]) for i in chosen])
        kd.ctc_loss(logits, y, lengths, sizes, batch_first=True).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("run")
    facts = {
        "shape": encoder.shape,
        "frames_per_second": encoder.frames_per_second,
        "alphabet": alphabet.characters,
    }
    path = folder / "student_distilled.safetensors"
    files.save_tensors(path, encoder.state_dict(), "key", **facts)
    return folder


@pytest.fixture(scope="module")
def recogniser(run):
    return recognise.load(run)


@pytest.fixture(scope="module")
def long():
    """(samples, text, starts, ends): 100 seconds, longer than any window."""
    rng = random.Random(1)
    text = sentence(rng, 200)
    samples, starts, ends = tones(text, np.random.default_rng(1))
    return samples, text, starts, ends


def in_blocks(samples, size):
    return (samples[i : i + size] for i in range(0, len(samples), size))


# ---- recognising ---------------------------------------------------------------------------------


def test_windows_put_together_are_the_stream():
    stream = torch.arange(100)
    for left, right, unit, size in ((0, 0, 1, 7), (6, 5, 3, 1), (9, 0, 3, 40), (3, 9, 1, 200)):
        seen = []
        for window, first, count in recognise.overlapping(stream.split(size), left, right, unit):
            kept = window[first : first + count].tolist()
            assert window[:first].tolist() == list(range(len(seen)))[len(seen) - first :]
            assert first == min(left, len(seen)) or first % unit == 0
            assert first >= min(left, len(seen))
            seen += kept
            after = window[first + count :].tolist()
            assert len(after) >= right or len(seen) + len(after) == 100
            assert after == list(range(100))[len(seen) : len(seen) + len(after)]
        assert seen == list(range(100))
    assert list(recognise.overlapping([], 1, 1)) == []


ENCODERS = pytest.mark.parametrize("sizes", [(16, 4, 6), (16, 4, 6, 4, 2), (16, 5, 6, 7, 1)])


@ENCODERS
def test_logits_in_windows_are_those_of_one_pass(sizes):
    torch.manual_seed(0)
    encoder = model.Encoder(*sizes).eval()
    x = torch.randn(1000, features.MELS)
    with torch.no_grad():
        whole, _ = encoder(x[None], torch.tensor([1000]))
        for size in (10, 64, 800):
            pieces = list(recognise.logits(x.split(size), encoder))
            assert len(pieces) > 1
            torch.testing.assert_close(torch.cat(pieces), whole[0], atol=1e-4, rtol=1e-4)


@ENCODERS
def test_what_a_frame_depends_on(sizes):
    torch.manual_seed(0)
    encoder = model.Encoder(*sizes).double().eval()
    x = torch.randn(1, 300, features.MELS, dtype=torch.float64, requires_grad=True)
    logits, _ = encoder(x, torch.tensor([300]))
    logits[0, 56].sum().backward()
    read = x.grad[0].abs().sum(1).reshape(-1, model.STACK).sum(1).nonzero()[:, 0].tolist()
    chunk = 56 // encoder.chunk * encoder.chunk
    assert chunk - encoder.past <= read[0] < chunk
    assert encoder.chunk > 1 or read[0] == chunk - encoder.past
    assert read[-1] == chunk + encoder.chunk - 1 + encoder.future


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000, 44101])
def test_resampling_in_blocks_is_resampling_at_once(rate):
    samples = np.random.default_rng(0).standard_normal(rate).astype(np.float32) * 0.1
    whole = torch.cat(list(recognise.resampled([samples], rate)))
    pieces = torch.cat(list(recognise.resampled(in_blocks(samples, 777), rate)))
    assert len(whole) == RATE
    torch.testing.assert_close(pieces, whole, atol=1, rtol=0)
    if rate != 44101:  # its filter bank would take gigabytes
        once = torch.from_numpy(audio.to_int16(audio.resample(samples, rate)))
        torch.testing.assert_close(whole, once, atol=1, rtol=0)


@pytest.mark.parametrize("samples", [1, 100, 511, 512, 1000, 16000])
def test_energies_in_blocks_are_those_at_once(samples):
    x = torch.randint(-9000, 9000, (samples,), generator=torch.Generator().manual_seed(0)).short()
    for size in (samples, 160, 333):
        rows = torch.cat(list(recognise.energies(x.split(size))))
        torch.testing.assert_close(rows, features.log_energies(x), atol=1e-4, rtol=1e-4)


def test_without_pauses_frames_are_normalised_as_in_training():
    x = torch.randint(-9000, 9000, (8000,), generator=torch.Generator().manual_seed(0)).short()
    energies = features.log_energies(x)  # 51 frames: each sees all the others
    rows = torch.cat(list(recognise.normalised([energies])))
    torch.testing.assert_close(rows, features.log_mel(x).float(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("block", [4000, 320000])
def test_every_word_once_at_its_time_whatever_the_blocks(recogniser, long, block):
    samples, text, starts, ends = long
    words = list(recognise.recognise(recogniser, in_blocks(samples, block), RATE))
    assert " ".join(word.text for word in words) == text
    late = [word.start - start for word, start in zip(words, starts, strict=True)]
    assert max(map(abs, late)) < 0.12
    assert max(abs(word.end - end) for word, end in zip(words, ends, strict=True)) < 0.12
    assert all(0.5 < word.confidence <= 1 for word in words)
    assert all(a.end <= b.start + 1e-6 for a, b in itertools.pairwise(words))


def test_silence_between_words_says_nothing(recogniser):
    rng, noise = random.Random(3), np.random.default_rng(3)
    parts = [tones(sentence(rng, 6), noise, noise=0)[0] for _ in range(2)]
    pause = np.zeros(8 * RATE)
    samples = np.concatenate([parts[0], pause, parts[1], pause])
    samples = (samples + 0.003 * noise.standard_normal(len(samples))).astype(np.float32)
    words = list(recognise.recognise(recogniser, in_blocks(samples, 4000), RATE))
    first = len(parts[0]) / RATE
    assert not [word for word in words if first < word.start < first + 7.5]
    assert len(words) == 12


def test_a_known_transcript_is_aligned(recogniser, long):
    samples, text, starts, _ = long
    with torch.no_grad():
        scores = torch.cat(list(recognise.frames(recogniser, [samples], RATE)))
    words = recognise.align(scores, text, recogniser)
    assert " ".join(word.text for word in words) == text
    assert max(abs(w.start - start) for w, start in zip(words, starts, strict=True)) < 0.12
    assert recognise.align(scores[:3], text, recogniser) == []


def test_a_wrong_word_is_less_certain(recogniser):
    samples, _, _ = tones("abc dab", np.random.default_rng(0))
    with torch.no_grad():
        scores = torch.cat(list(recognise.frames(recogniser, [samples], RATE)))
    right, wrong = recognise.align(scores, "abc dcb", recogniser)
    assert wrong.confidence < 0.5 < right.confidence


@pytest.mark.parametrize("samples", [0, 1, 400, 3000])
def test_a_blink_of_audio(recogniser, samples):
    assert isinstance(list(recognise.recognise(recogniser, [np.zeros(samples, "f4")], RATE)), list)


def test_no_word_is_longer_than_it_may_be(recogniser):
    label = torch.full((2000, len(recogniser.alphabet)), -9.0)
    label[torch.arange(2000), 2 + torch.arange(2000) % 2] = 9
    for size in (7, 2000):
        words = list(recognise.words(label.split(size), recogniser))
        assert max(word.end - word.start for word in words) < recognise.LONGEST_WORD + 0.1
        assert sum(len(word.text) for word in words) == 2000


# ---- recordings ----------------------------------------------------------------------------------


def call(*arguments):
    return transcribe.main([str(argument) for argument in arguments])


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
    sizes = [len(block) for block, _ in transcribe.blocks(tmp_path / "long.wav")]
    assert len(sizes) > 3
    assert max(sizes) == transcribe.BLOCK * RATE
    assert call(tmp_path / "long.wav", "--model", run, "--out", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "long.json").read_text())["text"] == text


def test_what_cannot_be_read_is_named_and_the_others_are_done(run, tmp_path, capsys):
    good = tmp_path / "good.wav"
    soundfile.write(good, tones("ab cd", np.random.default_rng(0))[0], RATE)
    soundfile.write(tmp_path / "whole.flac", np.random.default_rng(0).random(RATE), RATE)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    nan = np.zeros(RATE, "f4")
    nan[9] = np.nan
    soundfile.write(tmp_path / "nan.wav", nan, RATE, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("this is no audio" * 100)
    (tmp_path / "nothing.wav").write_bytes(b"")
    (tmp_path / "cut.wav").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "chopped.flac").write_bytes((tmp_path / "whole.flac").read_bytes()[:9000])
    soundfile.write(tmp_path / "slow.wav", np.zeros(100), 100)
    reasons = {
        "missing.wav": "there is no such file",
        "empty.wav": "holds no audio",
        "nan.wav": "holds samples that are no numbers",
        "text.wav": "cannot be read as audio",
        "nothing.wav": "cannot be read as audio",
        "cut.wav": "is truncated",
        "chopped.flac": "cannot be read as audio",
        "slow.wav": "has 100 samples a second",
        ".": "cannot be read as audio",
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


def test_nothing_is_lost(run, tmp_path, capsys):
    samples = tones("ab cd", np.random.default_rng(0))[0]
    for name in ("a.wav", "a.flac"):
        soundfile.write(tmp_path / name, samples, RATE)
    (tmp_path / "a.txt").write_text("my notes")
    assert call(tmp_path / "a.wav", "--model", run) == 2
    assert "a.txt exists; --force replaces it" in capsys.readouterr().err
    assert (tmp_path / "a.txt").read_text() == "my notes"
    assert call(tmp_path / "a.wav", tmp_path / "a.flac", "--model", run, "--force") == 2
    assert "would both be written to" in capsys.readouterr().err
    assert call(tmp_path / "a.wav", "--model", run, "--force") == 0
    assert (tmp_path / "a.txt").read_text() != "my notes"
    (tmp_path / "file").write_text("")
    assert call(tmp_path / "a.wav", "--model", run, "--out", tmp_path / "file" / "x") == 2
    assert "cannot write into the folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no model"),
        (b"", "cannot be read as a model"),
        (b"x" * 1000, "cannot be read as a model"),
        ({}, "is no model of `python -m kdkernels.train`"),
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
    [[], ["a.wav", "--stream"], ["a.wav", "--doubt", "2"], ["--stream", "--rate", "0"],
     ["--stream", "--channels", "0"]],
)  # fmt: skip
def test_arguments_that_make_no_sense(arguments):
    with pytest.raises(SystemExit, match="2"):
        call(*arguments, "--model", "x")


# ---- a stream ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", ["pcm", "pcm stereo", "wav", "endless wav"])
def test_a_stream_says_what_the_recording_says(monkeypatch, capsys, run, long, tmp_path, kind):
    samples = long[0][: 30 * RATE]
    channels = 2 if "stereo" in kind else 1
    content = pcm(samples, channels) if "pcm" in kind else wav(samples)
    if "endless" in kind:  # as a recorder writes that does not know when it will be stopped
        content = (
            content[:4] + b"\xff\xff\xff\xff" + content[8:40] + b"\xff\xff\xff\xff" + content[44:]
        )
    soundfile.write(tmp_path / "a.wav", audio.to_int16(samples), RATE)
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


@pytest.mark.parametrize("content", [b"", b"\0", b"RI"])
def test_a_stream_of_nothing(monkeypatch, capsys, run, content):
    assert stream(monkeypatch, run, content) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "0.0 s, 0 words\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"RIFF\0\0\0\0nonsense", "the wav stream cannot be read"),
        (b"RIFF", "the wav stream cannot be read"),
        (wav(np.zeros(100), width=1), "8 bits a sample; send 16"),
        (wav(np.zeros(100), rate=10), "10 samples a second"),
    ],
)
def test_a_wav_stream_that_cannot_be_read(monkeypatch, capsys, run, content, message):
    assert stream(monkeypatch, run, content) == 2
    assert message in capsys.readouterr().err


def test_from_the_command_line_through_a_pipe(run):
    samples = tones("ab cd dab", np.random.default_rng(0))[0]
    command = [sys.executable, "-W", "error", "-m", "kdkernels.transcribe", "--stream"]
    done = subprocess.run(
        [*command, "--model", str(run), "--doubt", "0"],
        input=pcm(samples), capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout == b"ab cd dab\n"
    assert done.stderr.startswith(b"1.3 s, 3 words; from the end of a word to its printing: ")
