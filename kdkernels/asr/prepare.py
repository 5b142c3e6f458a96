"""The first stage: speech, synthesised or recorded, to features on disk and in memory."""

from pathlib import Path

from . import batches, data, features, sources
from .arms import ARMS
from .console import progress, warn
from .settings import Settings


def prepare(settings: Settings, cache: Path, more_characters: str) -> data.Corpora:
    """Speech -> features on disk -> memory. All manifests are checked before the work begins."""
    shards, skipped = {}, {}
    if settings.transcribed:
        for split in ("transcribed", "untranscribed", "test", "dev"):
            if spec := getattr(settings, split):
                said = split != "untranscribed"
                shards[split], skipped[split] = sources.read(spec, said, settings.skip_bad)
    else:
        for split in ("transcribed", "untranscribed", "dev", "test"):
            count = getattr(settings, f"{split}_utterances")
            shards[split] = data.synthesised(settings.seed, split, count)
    if any("noisy" in ARMS[name].hears for name in settings.arms):
        for clean, noisy in (("untranscribed", "noisy"), ("test", "noisy_test")):
            snr, seed = settings.noise_snr, settings.seed
            shards[noisy] = [data.Noisy(source, snr, seed) for source in shards[clean]]
    total = sum(len(shard) for several in shards.values() for shard in several)
    with progress(total, "speech and features", "utt") as bar:
        sets = {
            split: data.load(several, cache, settings.workers, bar.update, settings.skip_bad)
            for split, several in shards.items()
        }
    for split in skipped:
        skipped[split] += sum(map(len, shards[split])) - len(sets[split])
    for split, loaded in sets.items():
        if quiet := sum(map(features.silent, loaded.features)):
            warn(
                f"{quiet} of {len(loaded)} recordings of the {split} set are silent from end to "
                "end; are they the right files?"
            )
    if "dev" not in sets:
        sets["transcribed"], sets["dev"] = data.split_off_dev(sets["transcribed"])
    transcribed = sets["transcribed"]
    unheard = sum(map(batches.unalignable, transcribed.texts, transcribed.features))
    if unheard:
        warn(
            f"{unheard} of {len(transcribed)} transcripts are longer than their audio can "
            "hold and teach nothing; do audio and text belong together?"
        )
    student = transcribed.part(0, settings.student_transcripts)
    alphabet = data.Alphabet.of([*transcribed.texts, more_characters])
    return data.Corpora(**sets, student=student, alphabet=alphabet, skipped=skipped)
