"""Every setting of the training program: its default, its help, its presets, its command line."""

import argparse
import math
from dataclasses import dataclass, field, fields, replace

EPILOG = """
Without manifests the speech is synthesised by espeak-ng, so that the whole experiment runs
anywhere from nothing. On your own data, give --transcribed, --untranscribed and --test: JSON
lines as in NeMo, {"audio_filepath": "a.wav", "duration": 3.1, "text": "hello"}, paths relative to
the manifest's folder, any format that libsndfile reads (wav, flac, ogg, mp3).

Every finished stage stays on disk: run the same command again and it goes on from there.
"""


def option(default, help: str, **argument):
    """A field and its command-line option in one."""
    return field(default=default, metadata={"help": help, **argument})


@dataclass(frozen=True)
class Settings:
    out: str = option("kdkernels-train", "folder for models and report", metavar="DIR")
    cache: str = option("", "folder for features and teacher logits [OUT/cache]", metavar="DIR")
    seed: int = option(0, "the corpus, the models and the order of batches are functions of it")

    transcribed: str = option("", "own data: manifest with transcripts", metavar="FILE")
    untranscribed: str = option("", "own data: manifest, transcripts not read", metavar="FILE")
    dev: str = option("", "own data: manifest for the curves [from --transcribed]", metavar="FILE")
    test: str = option("", "own data: manifest for the final WER", metavar="FILE")

    transcribed_utterances: int = option(5000, "synthesised utterances that teach the teacher")
    untranscribed_utterances: int = option(5000, "synthesised utterances without a transcript")
    dev_utterances: int = option(120, "utterances of unseen voices for the curves")
    test_utterances: int = option(400, "synthesised utterances of other unseen voices")
    student_transcripts: int = option(
        400, "transcripts that the students get: the first ones of the transcribed set"
    )

    teacher_width: int = option(160, "channels of the teacher")
    teacher_layers: int = option(8, "layers of the teacher")
    student_width: int = option(96, "channels of the student")
    student_layers: int = option(6, "layers of the student")

    teacher_steps: int = option(2500, "training steps of the teacher")
    student_steps: int = option(2000, "training steps of each student")
    batch_seconds: float = option(48.0, "audio in a step, with padding: the same for everyone")
    learning_rate: float = option(3e-3, "its peak: linear warm-up, then a cosine to zero")
    eval_every: int = option(100, "steps between two points of the dev curve")
    ctc_weight: float = option(1.0, "weight of the CTC term, per label, in the distilled student")
    kd_weight: float = option(3.0, "weight of the distillation term, per frame")
    temperature: float = option(1.0, "temperature of the distillation term")
    untranscribed_share: float = option(0.75, "share of untranscribed audio in a distillation step")
    precision: str = option("auto", "arithmetic of the encoder", choices=("auto", "bf16", "fp32"))
    device: str = option("auto", "cpu, cuda, or auto: cuda where there is one")
    workers: int = option(2, "processes that synthesise speech and compute features")


PRESETS = {
    "default": {},
    "quick": {
        "transcribed_utterances": 2500,
        "untranscribed_utterances": 2500,
        "dev_utterances": 60,
        "test_utterances": 200,
        "teacher_steps": 900,
        "student_steps": 600,
        "eval_every": 50,
    },
}


def parse(arguments: list[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(
        prog="python -m kdkernels.train",
        description="Train a teacher, a student alone and a student distilled from the teacher; "
        "compare their word error rates.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="default",
        help="default: about 10 minutes on two cores; quick: about 3; "
        "the options below override it one by one",
    )
    for setting in fields(Settings):
        details = dict(setting.metadata)
        if setting.default != "":
            details["help"] += f" [{setting.default}]"
        if setting.type is not str:
            details["metavar"] = "N"
        parser.add_argument(
            "--" + setting.name.replace("_", "-"),
            type=setting.type,
            default=argparse.SUPPRESS,
            **details,
        )
    given = vars(parser.parse_args(arguments))
    settings = replace(Settings(), **{**PRESETS[given.pop("preset")], **given})
    error = problem(settings)
    if error:
        parser.error(error)
    return settings


def problem(settings: Settings) -> str | None:
    """What is wrong with the settings, if anything."""
    for setting in fields(Settings):
        value = getattr(settings, setting.name)
        if not isinstance(value, int | float):
            continue
        zero = setting.name in ("seed", "ctc_weight")
        if not (0 < value < math.inf or (zero and value == 0)):
            least = "at least 0" if zero else "greater than 0"
            return f"--{setting.name.replace('_', '-')} must be {least}, got {value}"
    if settings.temperature < 1e-30:
        return f"--temperature must be at least 1e-30, got {settings.temperature}"
    if settings.untranscribed_share >= 1:
        return f"--untranscribed-share must be in (0, 1), got {settings.untranscribed_share}"
    manifests = (settings.transcribed, settings.untranscribed, settings.test)
    if any((*manifests, settings.dev)) and not all(manifests):
        return "own data needs --transcribed, --untranscribed and --test together"
    return None
