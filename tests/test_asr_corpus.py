"""The corpus is a function of its seed: the same bytes however often it was interrupted."""

import random

import pytest
import torch

from kdkernels.asr import corpus, data
from kdkernels.asr.files import TrainError


def build(folder, count=4, seed=0):
    sources = [data.Synthesised(seed, "test", i, i + 2) for i in range(0, count, 2)]
    return data.load(sources, folder, 1, lambda n: None)


def test_two_builds_are_the_same_one_of_them_interrupted(tmp_path):
    whole = build(tmp_path / "a")
    build(tmp_path / "b", 2)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "b").iterdir()}
    assert len(kept) == 1
    resumed = build(tmp_path / "b")
    assert resumed.sha256 == whole.sha256
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert all(map(torch.equal, whole.features, resumed.features))
    a, b = (sorted((tmp_path / x).iterdir()) for x in "ab")
    assert [p.name for p in a] == [p.name for p in b]
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b]


def test_another_seed_is_another_corpus(tmp_path):
    assert build(tmp_path, 2, 0).sha256 != build(tmp_path, 2, 1).sha256


def test_test_and_dev_share_no_voice_and_no_sentence_with_training():
    said = {
        split: [corpus.utterance(0, split, i) for i in range(500)]
        for split in ("transcribed", "untranscribed", "dev", "test")
    }
    for held in ("dev", "test"):
        for other in said.keys() - {held} - ({"dev"} if held == "test" else set()):
            for part in (lambda u: u.text, lambda u: u.voice.split("+")[1]):
                assert not set(map(part, said[held])) & set(map(part, said[other]))


def test_sentences_are_of_the_grammar():
    words = {w for phrases in corpus.WORDS.values() for phrase in phrases for w in phrase.split()}
    words |= {thing + "s" for thing in corpus.WORDS["thing"]}
    words |= {w for template in corpus.TEMPLATES for w in template.split() if "{" not in w}
    rng = random.Random(0)
    for _ in range(200):
        assert set(corpus.sentence(rng).split()) <= words


def test_every_voice_speaks():
    espeak = data.Espeak()
    for voice in {v for voices in corpus.VOICES.values() for v in voices}:
        samples = espeak.speak("hello", f"en-us+{voice}", 160, 50, 50)
        assert len(samples) > espeak.sample_rate // 10
    with pytest.raises(TrainError, match="no voice 'en-us-nobody'"):
        espeak.speak("hello", "en-us-nobody", 160, 50, 50)
