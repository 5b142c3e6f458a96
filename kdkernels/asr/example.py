"""The distilled student at work: the first test utterances as audio, with its captions."""

import copy
import io
from pathlib import Path

import numpy as np
import soundfile

from . import audio, captions, files, recognise, training
from .stages import Experiment, Trained

UTTERANCES, SHOWN = 10, 5  # captioned; in the table of the report
PAUSE = 1.0  # seconds between two


def texts(experiment: Experiment, models: dict[str, Trained]) -> list[dict[str, str]]:
    """A few test utterances and what two students recognised, for the report."""
    corpora = experiment.corpora
    few = corpora.test.part(0, SHOWN)
    alone, distilled = (
        training.transcribe(models[name].encoder, few, corpora.alphabet, experiment.on)
        for name in ("student_alone", "student_distilled")
    )
    return [
        {"said": said, "alone": a, "distilled": d}
        for said, a, d in zip(few.texts, alone, distilled, strict=True)
    ]


def write(experiment: Experiment, distilled: Trained, out: Path) -> None:
    """OUT/captions.wav, captions.vtt and captions.srt, as `kdkernels.transcribe` makes them."""
    corpora = experiment.corpora
    silence = np.zeros(round(PAUSE * audio.SAMPLE_RATE), np.int16)
    spoken = dict(corpora.test.part(0, UTTERANCES).samples())
    encoder = copy.deepcopy(distilled.encoder).cpu().eval()
    model = recognise.Recogniser(encoder, corpora.alphabet)
    samples = np.concatenate([x for i in sorted(spoken) for x in (spoken[i].numpy(), silence)])
    words = recognise.recognise(model, [samples.astype(np.float32) / 32768], audio.SAMPLE_RATE)
    shown = captions.captions(list(words), seconds=len(samples) / audio.SAMPLE_RATE)
    sound = io.BytesIO()
    soundfile.write(sound, samples, audio.SAMPLE_RATE, format="WAV", subtype="PCM_16")
    files.write_bytes(out / "captions.wav", sound.getvalue())
    files.write_bytes(out / "captions.vtt", captions.webvtt(shown).encode())
    files.write_bytes(out / "captions.srt", captions.srt(shown).encode())
