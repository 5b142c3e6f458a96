"""Audio in windows, as one pass over it would read it; words, their times and confidences."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
from tones import RATE, in_blocks, sentence, tones

from kdkernels.asr import audio, features, files, frontend, model, recognise


def test_windows_put_together_are_the_stream():
    stream = torch.arange(100)
    for left, right, unit, size in ((0, 0, 1, 7), (6, 5, 3, 1), (9, 0, 3, 40), (3, 9, 1, 200)):
        seen = []
        for window, first, count in frontend.overlapping(stream.split(size), left, right, unit):
            kept = window[first : first + count].tolist()
            assert window[:first].tolist() == list(range(len(seen)))[len(seen) - first :]
            assert first == min(left, len(seen)) or first % unit == 0
            assert first >= min(left, len(seen))
            seen += kept
            after = window[first + count :].tolist()
            assert len(after) >= right or len(seen) + len(after) == 100
            assert after == list(range(100))[len(seen) : len(seen) + len(after)]
        assert seen == list(range(100))
    assert list(frontend.overlapping([], 1, 1)) == []


ENCODERS = pytest.mark.parametrize("sizes", [(16, 4, 6), (16, 4, 6, 4, 2), (16, 5, 6, 7, 1)])


@ENCODERS
def test_logits_in_windows_are_those_of_one_pass(sizes):
    torch.manual_seed(0)
    encoder = model.Encoder(*sizes).eval()
    x = torch.randn(1000, features.MELS)
    heard = torch.ones(1000, 1)
    heard[402:465] = 0
    with torch.no_grad():
        counts = heard[:999].view(1, -1, model.STACK).amax(2) > 0
        whole, _ = encoder(x[None], torch.tensor([1000]), counts)
        other = torch.where(heard > 0, x, torch.randn(1000, features.MELS))
        for size in (10, 64, 800):
            for rows in (x, other):  # of a pause nothing is read
                rows = torch.cat([rows, heard], 1)
                pieces = list(recognise.logits(rows.split(size), encoder))
                assert len(pieces) > 1
                scores = torch.cat(pieces)
                assert (scores[~counts[0]].argmax(1) == 0).all()
                scores, expected = scores[counts[0]], whole[counts]
                torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


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
    whole = torch.cat(list(frontend.resampled([samples], rate)))
    pieces = torch.cat(list(frontend.resampled(in_blocks(samples, 777), rate)))
    assert len(whole) == RATE
    torch.testing.assert_close(pieces, whole, atol=1, rtol=0)
    once = torch.from_numpy(audio.to_int16(audio.resample(samples, rate)))
    torch.testing.assert_close(whole, once, atol=1, rtol=0)


@pytest.mark.parametrize("samples", [1, 100, 511, 512, 1000, 16000])
def test_energies_in_blocks_are_those_at_once(samples):
    x = torch.randint(-9000, 9000, (samples,), generator=torch.Generator().manual_seed(0)).short()
    for size in (samples, 160, 333):
        rows = torch.cat(list(frontend.energies(x.split(size))))
        torch.testing.assert_close(rows, features.log_energies(x), atol=1e-4, rtol=1e-4)


def test_without_pauses_frames_are_normalised_as_in_training():
    x = torch.randint(-9000, 9000, (8000,), generator=torch.Generator().manual_seed(0)).short()
    energies = features.log_energies(x)  # 51 frames: each sees all the others
    rows, heard = torch.cat(list(frontend.normalised([energies]))).split([features.MELS, 1], 1)
    assert (heard == 1).all()
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


def test_turns_begin_after_pauses():
    maybe = torch.zeros(400, dtype=torch.bool)
    gap, tail = frontend.GAP, frontend.TAIL
    second = 150 + tail + gap  # short of a pause by one frame
    third = second + 50 + tail + gap + 1
    for start in (100, second, third):
        maybe[start : start + 50] = True
    heard, begun, later = frontend.turns(maybe)
    assert heard[100 : second + 50 + tail].all()
    assert not heard[:100].any()
    assert not heard[second + 50 + tail : third].any()
    assert begun[100:third].tolist() == [100] * (third - 100)
    assert later[100:third].tolist() == [third] * (third - 100)
    assert begun[third:].tolist() == [third] * (400 - third)
    assert frontend.turns(maybe[: third + 50 + gap])[0][-1]  # it ends before a pause is one


def test_another_voice_after_a_pause(recogniser):
    """One a bass, the other a treble, and 12 dB below."""
    noise = np.random.default_rng(7)
    texts = [sentence(random.Random(i), 12) for i in (7, 8, 9)]
    bass, treble, again = (tones(text, noise, noise=0)[0] for text in texts)
    treble = 0.25 * np.diff(treble, prepend=0)
    bass, again = (np.cumsum(x) * 0.05 for x in (bass, again))
    pause = np.zeros(RATE)
    samples = np.concatenate([bass, pause, treble, pause, again]).astype(np.float32)
    samples += 0.0005 * noise.standard_normal(len(samples)).astype(np.float32)
    for block in (4000, 320000):
        words = list(recognise.recognise(recogniser, in_blocks(samples, block), RATE))
        assert [word.text for word in words] == " ".join(texts).split()


@pytest.mark.parametrize("colour", [0.0, 2.0])
@pytest.mark.parametrize("block", [4000, 320000])
def test_noise_alone_says_nothing_however_long(recogniser, colour, block):
    """Much longer than the frames that normalise one: what normalised the last speech remains."""
    rng = np.random.default_rng(4)
    texts = [sentence(random.Random(i), 12) for i in range(2)]
    parts = [tones(text, rng, noise=0)[0] for text in texts]
    pause = np.zeros(50 * RATE, np.float32)
    samples = np.concatenate([parts[0], pause, parts[1], pause]).astype(np.float32)
    level = np.full(4 * RATE, 0.005, np.float32)
    noise = [audio.add_noise(level, 0.0, colour, rng) - level for _ in range(40)]
    samples += np.concatenate(noise)[: len(samples)]
    words = list(recognise.recognise(recogniser, in_blocks(samples, block), RATE))
    assert [word.text for word in words] == " ".join(texts).split()
    assert words[11].end < len(parts[0]) / RATE + 0.2
    assert words[12].start > len(parts[0]) / RATE + 49.8


@pytest.mark.parametrize("block", [4000, 320000])
def test_noise_without_a_word_is_speech_for_seconds_at_most(recogniser, block):
    noise = (0.02 * np.random.default_rng(8).standard_normal(20 * RATE)).astype(np.float32)
    words = list(recognise.recognise(recogniser, in_blocks(noise, block), RATE))
    assert all(word.end < 6 for word in words)
    speech, _, _ = tones("abc dab", np.random.default_rng(0))
    samples = np.concatenate([noise * 0.1, speech]).astype(np.float32)
    words = list(recognise.recognise(recogniser, in_blocks(samples, block), RATE))
    assert [word.text for word in words if word.start > 6] == ["abc", "dab"]
    assert list(recognise.recognise(recogniser, [np.zeros(9 * RATE, np.float32)], RATE)) == []


def test_a_quiet_voice_after_a_loud_one_is_heard(recogniser):
    """26 dB below it; at the latest when the loud one has been gone for half a minute."""
    rng = np.random.default_rng(5)
    text = sentence(random.Random(5), 120)
    loud, soft = (tones(t, rng, noise=0)[0] for t in (sentence(random.Random(6), 20), text))
    samples = np.concatenate([loud, 0.05 * soft])
    samples += 0.0003 * rng.standard_normal(len(samples)).astype(np.float32)
    words = list(recognise.recognise(recogniser, in_blocks(samples, 4000), RATE))
    assert [word.text for word in words[-40:]] == text.split()[-40:]


def test_a_known_transcript_is_aligned(recogniser, long):
    samples, text, starts, _ = long
    with torch.no_grad():
        scores = torch.cat(list(recognise.frames(recogniser, [samples], RATE)))
    words = recognise.align(scores, text, recogniser)
    assert " ".join(word.text for word in words) == text
    assert max(abs(w.start - start) for w, start in zip(words, starts, strict=True)) < 0.12
    assert recognise.align(scores[:3], text, recogniser) == []


def test_words_of_a_late_student_have_the_times_at_which_they_are_said(recogniser, long):
    samples, text, starts, ends = long
    encoder = copy.deepcopy(recogniser.encoder)
    encoder.shift = 7
    late = recogniser._replace(encoder=encoder)
    with torch.no_grad():
        scores = torch.cat(list(recognise.frames(recogniser, [samples], RATE)))
        delayed = torch.cat([scores[:1].expand(7, -1), scores])  # seven frames of the first silence
    for words in (list(recognise.words([delayed], late)), recognise.align(delayed, text, late)):
        for word, start, end in zip(words, starts, ends, strict=True):
            assert abs(word.start - start) < 0.12
            assert abs(word.end - end) < 0.12
    early = recognise.align(scores, text, late)
    assert all(0 <= word.start <= word.end for word in early)
    ahead = recognise.look_ahead(recogniser)
    assert recognise.look_ahead(late) == pytest.approx(ahead + 7 * 0.03)


@pytest.mark.parametrize(("shape", "shift"), [([16, 2, 6, 4, 2], 0), ([16, 2, 6, 4, 2, 5], 5)])
def test_a_file_says_how_late_its_student_is(tmp_path, shape, shift):
    """One of an earlier version does not."""
    tensors = model.Encoder(*shape).state_dict()
    files.save_tensors(tmp_path / "a.safetensors", tensors, "key", shape=shape, alphabet="abcde")
    assert recognise.load(tmp_path / "a.safetensors").shift == pytest.approx(shift * 0.03)


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
