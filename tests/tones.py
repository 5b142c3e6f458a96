"""A small model that is trained here, in seconds, to read tones: a letter is a tone, a space a
silence. So what is said, and when, is known."""

import itertools
import random

import numpy as np
import torch

import kdkernels as kd
from kdkernels import transcribe
from kdkernels.asr import audio, data, features, files, model

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


def train(folder):
    """`folder` with a student that reads tones."""
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
    facts = {
        "shape": encoder.shape,
        "frames_per_second": encoder.frames_per_second,
        "alphabet": alphabet.characters,
    }
    path = folder / "student_distilled.safetensors"
    files.save_tensors(path, encoder.state_dict(), "key", **facts)


def in_blocks(samples, size):
    return (samples[i : i + size] for i in range(0, len(samples), size))


def call(*arguments):
    """The exit code of python -m kdkernels.transcribe."""
    return transcribe.main([str(argument) for argument in arguments])
