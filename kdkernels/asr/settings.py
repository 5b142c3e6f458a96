"""Every setting of the training program: its default, its help, its presets, its command line."""

import itertools
import math
import re
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import yaml

# argparse with files and types; of the light libraries the one that reads TOML and YAML alike,
# checks lists, and needs nothing but PyYAML
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from . import files
from .arms import ARMS, TEACHERS
from .model import ChunkAttention

EPILOG = """
Without --transcribed the speech is synthesised by espeak-ng, so that the whole experiment runs
anywhere from nothing. On your own data, give --transcribed, --untranscribed and --test, each one of
  FILE                             JSON lines as in NeMo, {"audio_filepath": "a.wav", "duration":
                                   3.1, "text": "hello"}, paths relative to the file's folder
  FOLDER with wav.scp              Kaldi: wav.scp, text, and segments where there are any
  FOLDER of datasets.save_to_disk  Hugging Face: columns "audio" and "text" (or "sentence")
  torchaudio:CLASS:ROOT[:ARGUMENT] e.g. torchaudio:LIBRISPEECH:/data:train-clean-100
Audio is any format that libsndfile reads (wav, flac, ogg, mp3), any rate, any number of channels.

A teacher of your own (--teachers) is one of
  FILE.safetensors     a model that this program has trained
  FOLDER               a Hugging Face CTC model (Wav2Vec2ForCTC, HubertForCTC, WavLMForCTC)
  torchaudio:BUNDLE    e.g. torchaudio:WAV2VEC2_ASR_BASE_960H
  own                  the one this run trains
each with =WEIGHT after it where several shall not count the same.

The same command with the same --out goes on where it was, whatever ended it; finished stages are
used as they are. Where a run with other settings is there, it is set aside in OUT/previous, and
what does not depend on them is taken back; delete OUT/previous when you need nothing of it.

Several processes: torchrun --nproc-per-node 2 -m kdkernels.train ...; the batches are then shared
out among them, and the results are those of one process but for rounding.
"""

FRAMES = ("all", "nonblank", "neighbours", "threshold")


def option(default, help: str, **argument):
    """A field and its command-line option in one."""
    kind = {"default_factory": lambda: list(default)} if isinstance(default, list) else None
    return field(**(kind or {"default": default}), metadata={"help": help, **argument})


def names(value) -> list[str]:
    """A list of words, or "A,B" as on the command line, in [] and quotes or not."""
    if isinstance(value, str):
        value = value.strip().removeprefix("[").removesuffix("]").split(",")
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise ValueError(f"expected names, e.g. alone,distilled, got {value!r}")
    return [word for x in value if (word := x.strip(" \"'"))]


@dataclass(frozen=True)
class Settings:
    """One field, one option of the command line, one key of a settings file."""

    out: str = option("kdkernels-train", "folder for models and report", metavar="DIR")
    cache: str = option("", "folder for features and teacher logits [OUT/cache]", metavar="DIR")
    seed: int = option(0, "the corpus, the models and the order of batches are functions of it")
    seeds: int = option(1, "repeat with seed, seed + 1, ... and report means and intervals")

    transcribed: str = option("", "own data with transcripts", metavar="DATA")
    untranscribed: str = option("", "own data, transcripts not read", metavar="DATA")
    dev: str = option("", "own data for the curves [from --transcribed]", metavar="DATA")
    test: str = option("", "own data for the final WER", metavar="DATA")
    skip_bad: bool = option(False, "leave out lines and files that cannot be used, and count them")

    transcribed_utterances: int = option(5000, "synthesised utterances that teach the teacher")
    untranscribed_utterances: int = option(5000, "synthesised utterances without a transcript")
    dev_utterances: int = option(120, "utterances of unseen voices for the curves")
    test_utterances: int = option(400, "synthesised utterances of other unseen voices")
    student_transcripts: int = option(
        400, "transcripts that the students get: the first ones of the transcribed set"
    )

    arms: list[str] = option(
        ["alone", "distilled", "distilled_without_transcripts", "transcribed"],
        f"students to train, A,B,... of {', '.join(ARMS)}",
        metavar="LIST",
    )
    teachers: list[str] = option(["own"], "whom the students learn from; see below", metavar="LIST")
    teacher_rows: list[str] = option(
        list(TEACHERS),
        f"with --ssl-steps: teachers trained besides, for comparison, of {', '.join(TEACHERS)}",
        metavar="LIST",
    )
    teacher_width: int = option(160, "channels of the teacher")
    teacher_layers: int = option(8, "layers of the teacher")
    student_width: int = option(96, "channels of the student")
    student_layers: int = option(6, "layers of the student")
    chunk_frames: int = option(8, "streaming student: frames that it waits for, of 30 ms each")
    left_chunks: int = option(4, "streaming student: chunks of the past that it attends to")
    frame_shift: int = option(4, "streaming student: frames by which it may come after the teacher")

    ssl_steps: int = option(
        0,
        "self-supervised steps (BEST-RQ) before the teacher's own, and rows in the report of what "
        "they bring, for few transcripts and for all; 0: it starts from nothing",
    )
    ssl_learning_rate: float = option(
        1e-3,
        "its peak in these steps; with that of --learning-rate the weights move so far that the "
        "teacher ends up worse than from nothing",
    )
    teacher_steps: int = option(3500, "training steps of the teacher")
    student_steps: int = option(3000, "training steps of each student")
    batch_seconds: float = option(48.0, "audio in a step, with padding: the same for everyone")
    accumulate: int = option(1, "parts in which a step is computed, to save memory")
    learning_rate: float = option(3e-3, "its peak: linear warm-up, then a cosine to zero")
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
        "of teacher and student",
        choices=("forward_kl", "reverse_kl", "jsd"),
    )
    frames: str = option(
        "all",
        "frames distilled: all; nonblank: where the teacher's best class is no blank; neighbours: "
        "these and the ones beside them; threshold: where blank is less likely than "
        "--blank-threshold",
        choices=FRAMES,
    )
    blank_threshold: float = option(0.95, "see --frames")
    min_confidence: float = option(
        0.0,
        "leave out untranscribed utterances of which the teacher is less sure: mean, over the "
        "frames whose best class is no blank, of that class's probability",
    )
    top_k: int = option(0, "keep the k best teacher logits of a frame and the rest's mass; 0: all")
    untranscribed_share: float = option(0.75, "share of untranscribed audio in a distillation step")
    noise_snr: float = option(0.0, "arm noisy: speech above the noise that is added, dB")

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


class _Parser(ArgumentParser):
    def error(self, message, ex=None):
        """Without the usage text: of so many options it would hide what is wrong."""
        wrong = re.fullmatch(r'Parser key "(\w+)":\s+Expected an? <class \'(\w+)\'>. (.*)', message)
        if wrong:
            name, kind, got = wrong.groups()
            got = got.removeprefix("Got value: ")
            message = f"--{name.replace('_', '-')} must be a number ({kind}), got {got}"
        self.exit(2, f"error: {message}; try --help\n")


def _parser(mode: str):
    class Help(DefaultHelpFormatter):
        def _fill_text(self, text, width, indent):
            return "".join(indent + line for line in text.splitlines(keepends=True))

        def _get_type_str(self, action):  # DIR, DATA, LIST and N say it
            return None

        def _get_help_string(self, action):
            if action.default == "" or action.default is False:
                return action.help
            text = super()._get_help_string(action)
            if isinstance(action.default, list):  # as it is written on the command line
                text = text.replace("%(default)s", ",".join(action.default))
            return text

    parser = _Parser(
        prog="python -m kdkernels.train",
        description="Train a teacher, a student alone and students distilled from the teacher; "
        "compare their word error rates.",
        epilog=EPILOG,
        formatter_class=Help,
        parser_mode=mode,
    )
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="settings, in a TOML or YAML file"
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="default",
        help="default: about 6 minutes on two quiet cores; quick: about 3; full: "
        "every arm, an hour or more; the options below override it one by one",
    )
    for setting in fields(Settings):
        details = dict(setting.metadata)
        if setting.type is bool:
            details["action"] = "store_true"
        elif "choices" not in details:
            numeric = setting.type in (int, float)
            details["type"] = names if setting.type == list[str] else setting.type
            details.setdefault("metavar", "N" if numeric else "NAME")
        default = getattr(Settings(), setting.name)
        parser.add_argument("--" + setting.name.replace("_", "-"), default=default, **details)
    return parser


def parse(arguments: list[str] | None = None) -> Settings:
    arguments = sys.argv[1:] if arguments is None else arguments
    pairs = itertools.pairwise([*arguments, ""])
    configs = [
        after if name == "--config" else name.removeprefix("--config=")
        for name, after in pairs
        if name == "--config" or name.startswith("--config=")
    ]
    parser = _parser("toml" if any(c.endswith(".toml") for c in configs) else "yaml")
    for config in configs:
        if not Path(config).is_file():
            parser.error(f"--config: there is no file {config!r}")
    shown = [word for word in arguments if not word.startswith("--print_config")]  # afterwards
    preset = parser.parse_args(shown).preset
    parser.set_defaults(PRESETS[preset])
    given = vars(parser.parse_args(arguments))
    settings = Settings(**{f.name: given[f.name] for f in fields(Settings)})
    error = problem(settings)
    if error:
        parser.error(error)
    return settings


MAY_BE_ZERO = ("seed", "ctc_weight", "ssl_steps", "min_confidence", "top_k", "frame_shift")


def problem(settings: Settings) -> str | None:
    """What is wrong with the settings, if anything."""
    for setting in fields(Settings):
        value = getattr(settings, setting.name)
        flag = "--" + setting.name.replace("_", "-")
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
    """What is allowed, and probably a mistake."""
    # neighbours is none: dev WER without transcripts, 300 steps, 62.4 as with all; nonblank 84.7
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


# places, the pace of the work and of its copies: a result is the same under any of them
NO_RESULT = ("out", "cache", "workers", "checkpoint_every", "keep", "tensorboard")


def changes(old: dict, settings: Settings) -> list[str]:
    """The settings on which results depend, where `old` has another value: "--seed 0 -> 1"."""

    def shown(value) -> str:
        return ",".join(value) if isinstance(value, list) else str(value) or "none"

    return [
        f"--{name.replace('_', '-')} {shown(old[name])} -> {shown(value)}"
        for name, value in vars(settings).items()
        if name not in NO_RESULT and name in old and old[name] != value
    ]


def digest(values: dict) -> str:
    """Of the settings on which results depend."""
    return files.digest({name: x for name, x in values.items() if name not in NO_RESULT})


def with_seed(settings: Settings, seed: int) -> Settings:
    """The settings of one of several seeds: a folder of its own, the caches shared."""
    out = Path(settings.out)
    cache = settings.cache or str(out / "cache")
    return replace(settings, seed=seed, seeds=1, out=str(out / f"seed-{seed}"), cache=cache)
