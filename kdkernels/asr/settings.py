"""Every setting of the training program: its default, its help, its presets, what is wrong with
it. options.py makes the command line from these."""

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import yaml

from . import files
from .arms import ARMS, TEACHERS
from .model import ChunkAttention

FRAMES = ("all", "nonblank", "neighbours", "threshold")


def option(default, help: str, **argument):
    """A field and its command-line option in one."""
    kind = {"default_factory": lambda: list(default)} if isinstance(default, list) else None
    return field(**(kind or {"default": default}), metadata={"help": help, **argument})


@dataclass(frozen=True)
class Settings:
    """One field, one option of the command line, one key of a settings file."""

    out: str = option("kdkernels-train", "folder for models and report", metavar="DIR")
    cache: str = option("", "folder for features and teacher logits [OUT/cache]", metavar="DIR")
    seed: int = option(0, "the corpus, the models and the order of batches are functions of it")
    seeds: int = option(1, "repeat with seed, seed + 1, ... and report means and intervals")

    transcribed: str = option("", "own data with transcripts; see below", metavar="DATA")
    untranscribed: str = option("", "own data, transcripts not read", metavar="DATA")
    dev: str = option("", "own data for the curves [from --transcribed]", metavar="DATA")
    test: str = option("", "own data for the final WER", metavar="DATA")
    skip_bad: bool = option(False, "leave out lines and files that cannot be used, and count them")

    transcribed_utterances: int = option(5000, "synthesised utterances that teach the teacher")
    untranscribed_utterances: int = option(5000, "synthesised utterances without a transcript")
    dev_utterances: int = option(120, "synthesised utterances of unseen voices for the curves")
    test_utterances: int = option(400, "synthesised utterances of other unseen voices")
    student_transcripts: int = option(
        400, "transcripts that the students get: the first ones of the transcribed set"
    )

    arms: list[str] = option(
        ["alone", "distilled", "distilled_without_transcripts", "transcribed"],
        f"students to train, A,B,... of {', '.join(ARMS)}",
        metavar="LIST",
    )
    teachers: list[str] = option(
        ["own"], "teachers that the students learn from; see below", metavar="LIST"
    )
    teacher_rows: list[str] = option(
        list(TEACHERS),
        f"with --ssl-steps: more teachers, for comparison, of {', '.join(TEACHERS)}",
        metavar="LIST",
    )
    teacher_width: int = option(160, "channels of the teacher")
    teacher_layers: int = option(8, "layers of the teacher")
    student_width: int = option(96, "channels of the student")
    student_layers: int = option(6, "layers of the student")
    chunk_frames: int = option(8, "streaming student: frames in a chunk, of 30 ms each")
    left_chunks: int = option(4, "streaming student: chunks of the past that it attends to")
    frame_shift: int = option(4, "streaming student: frames by which it may lag behind the teacher")

    ssl_steps: int = option(
        0,
        "self-supervised steps (BEST-RQ) before the teacher's own, and rows in the report on what "
        "they bring, for few transcripts and for all; 0: none",
    )
    ssl_learning_rate: float = option(
        1e-3,
        "peak learning rate in these steps; with that of --learning-rate the weights move so far "
        "that the teacher ends up worse than without them",
    )
    teacher_steps: int = option(3500, "training steps of the teacher")
    student_steps: int = option(3000, "training steps of each student")
    batch_seconds: float = option(48.0, "seconds of audio in a step, with padding, for every model")
    accumulate: int = option(1, "parts in which a step is computed, to save memory")
    learning_rate: float = option(3e-3, "peak learning rate: linear warm-up, then a cosine to zero")
    clip: float = option(1.0, "largest norm of a step's gradient")
    eval_every: int = option(100, "steps between two points of the dev curve")
    checkpoint_every: int = option(100, "steps between two checkpoints")
    keep: int = option(2, "checkpoints kept of each training: the newest ones, and the best")

    ctc_weight: float = option(1.0, "weight of the CTC term, per label, in the distilled student")
    kd_weight: float = option(3.0, "weight of the distillation term, per frame")
    kd_schedule: str = option(
        "constant",
        "kd_weight over the steps: constant, rise from 0, or fall to 0",
        choices=("constant", "rise", "fall"),
    )
    temperature: float = option(1.0, "temperature of the distillation term")
    divergence: str = option(
        "forward_kl",
        "divergence of the distillation term",
        choices=("forward_kl", "reverse_kl", "jsd"),
    )
    frames: str = option(
        "all",
        "frames distilled: all; nonblank: where the teacher's best class is not blank; neighbours: "
        "these and the ones beside them; threshold: where blank is less likely than "
        "--blank-threshold",
        choices=FRAMES,
    )
    blank_threshold: float = option(0.95, "see --frames")
    min_confidence: float = option(
        0.0,
        "leave out untranscribed utterances of which the teacher is less sure: mean, over the "
        "frames whose best class is not blank, of that class's probability",
    )
    top_k: int = option(0, "keep a frame's k greatest teacher logits and the rest's mass; 0: all")
    untranscribed_share: float = option(0.75, "share of untranscribed audio in a distillation step")
    noise_snr: float = option(0.0, "arm noisy: speech over added noise, in dB")

    precision: str = option("auto", "arithmetic of the encoder", choices=("auto", "bf16", "fp32"))
    device: str = option("auto", "cpu, cuda, or auto: cuda where there is one")
    workers: int = option(2, "processes that synthesise speech and compute features")
    tensorboard: bool = option(
        False,
        "write OUT/tensorboard too, with kdkernels[tensorboard]; OUT/*.jsonl is always written",
    )


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
        "arms": ["alone", "distilled", "distilled_without_transcripts"],
    },
    "full": {"arms": list(ARMS), "ssl_steps": 2500},
}


MAY_BE_ZERO = ("seed", "ctc_weight", "ssl_steps", "min_confidence", "top_k", "frame_shift")


def problem(settings: Settings) -> str | None:
    """What is wrong with the settings; None if nothing is."""
    for setting in fields(Settings):
        value = getattr(settings, setting.name)
        flag = "--" + setting.name.replace("_", "-")
        if value is None:  # in a settings file
            return f"{flag} has no value; give one, or leave it out"
        if setting.type is bool and not isinstance(value, bool):  # in a settings file
            return f"{flag} must be true or false, got {value!r}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if setting.name == "noise_snr":
            if not math.isfinite(value):
                return f"--noise-snr must be a finite number, got {value}"
            continue
        zero = setting.name in MAY_BE_ZERO
        if not (0 < value < math.inf or (zero and value == 0)):
            least = "at least 0" if zero else "greater than 0"
            return f"{flag} must be {least}, got {value}"
    if settings.min_confidence >= 1:
        return f"--min-confidence must be in [0, 1), got {settings.min_confidence}"
    if settings.blank_threshold > 1:
        return f"--blank-threshold must be in (0, 1], got {settings.blank_threshold}"
    if settings.temperature < 1e-30:
        return f"--temperature must be at least 1e-30, got {settings.temperature}"
    if settings.untranscribed_share >= 1:
        return f"--untranscribed-share must be in (0, 1), got {settings.untranscribed_share}"
    for name, known in (("arms", ARMS), ("teacher_rows", TEACHERS)):
        for word in getattr(settings, name):
            if word not in known:
                flag = name.replace("_", "-")
                example = ",".join([*known][:2])
                return f"--{flag} must be of {', '.join(known)}, e.g. {example}, got {word}"
    for needed in ("alone", "distilled"):
        if needed not in settings.arms:
            return f"--arms must have {needed}: the report compares with it"
    streaming = ", ".join(name for name in settings.arms if ARMS[name].streaming)
    if streaming and settings.student_width % ChunkAttention.HEADS:
        return (
            f"--student-width must be a multiple of {ChunkAttention.HEADS}, the heads of the "
            f"attention of {streaming}, got {settings.student_width}"
        )
    if not settings.teachers:
        return "--teachers must name one, e.g. own"
    manifests = (settings.transcribed, settings.untranscribed, settings.test)
    if any((*manifests, settings.dev)) and not all(manifests):
        return "own data needs --transcribed, --untranscribed and --test together"
    return None


def warnings(settings: Settings) -> list[str]:
    """What is allowed but probably a mistake."""
    # neighbours is none: dev WER without transcripts, 300 steps, 62.4, as with all; nonblank 84.7
    dropped = settings.frames in ("nonblank", "threshold")
    bare = [name for name in settings.arms if ARMS[name].only_distilled]
    if dropped and (bare or not settings.ctc_weight):
        whom = ", ".join(bare) if settings.ctc_weight else "every distilled student"
        return [
            f"--frames {settings.frames} drops blank frames, those beside what is said too, and "
            f"there is no CTC term to teach blank ({whom}): the student will insert words; use "
            "--frames all, or neighbours, which keeps those"
        ]
    return []


def save(settings: Settings, path: Path) -> None:
    """The resolved settings as a file that --config reads."""
    files.write_bytes(path, yaml.safe_dump(vars(settings), sort_keys=False).encode())


def read(path: Path) -> dict:
    """What `save` wrote; {} where it cannot be read."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


# places, and how often and fast things are done: results are the same under any of them
NO_RESULT = ("out", "cache", "workers", "checkpoint_every", "keep", "tensorboard")


def changes(old: dict, settings: Settings) -> list[str]:
    """The settings that affect results and have another value in `old`: "--seed 0 -> 1"."""

    def shown(value) -> str:
        return ",".join(value) if isinstance(value, list) else str(value) or "none"

    return [
        f"--{name.replace('_', '-')} {shown(old[name])} -> {shown(value)}"
        for name, value in vars(settings).items()
        if name not in NO_RESULT and name in old and old[name] != value
    ]


def digest(values: dict) -> str:
    """Digest of the settings that affect results."""
    return files.digest({name: x for name, x in values.items() if name not in NO_RESULT})


def with_seed(settings: Settings, seed: int) -> Settings:
    """The settings of one of several seeds: a folder of its own, the caches shared."""
    out = Path(settings.out)
    cache = settings.cache or str(out / "cache")
    return replace(settings, seed=seed, seeds=1, out=str(out / f"seed-{seed}"), cache=cache)
