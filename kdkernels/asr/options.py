"""The command line of the training program, made from the fields of `Settings`."""

import itertools
import re
import sys
from dataclasses import fields
from pathlib import Path

# argparse with files and types; of the light libraries the one that reads TOML and YAML alike,
# checks lists, and needs nothing but PyYAML
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from .settings import PRESETS, Settings, problem

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
each with =WEIGHT after it where several should not count equally.

The same command with the same --out resumes where it was, whatever ended it; finished stages are
used as they are. A run with other settings in that folder is set aside in OUT/previous, and what
does not depend on them is taken back; delete OUT/previous when you need nothing in it.

Several processes: torchrun --nproc-per-node 2 -m kdkernels.train ...; each batch is then divided
among them, and the results are those of one process but for rounding.
"""


def names(value) -> list[str]:
    """A list of words, or "A,B" as on the command line, in [] and quotes or not."""
    if isinstance(value, str):
        value = value.strip().removeprefix("[").removesuffix("]").split(",")
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise ValueError(f"expected names, e.g. alone,distilled, got {value!r}")
    return [word for x in value if (word := x.strip(" \"'"))]


class _Parser(ArgumentParser):
    def error(self, message, ex=None):
        """Without the usage text, which has so many options that it would hide the error."""
        wrong = re.fullmatch(r'Parser key "(\w+)":\s+Expected an? <class \'(\w+)\'>. (.*)', message)
        if wrong:
            name, kind, got = wrong.groups()
            got = got.removeprefix("Got value: ")
            what = "text, in quotes" if kind == "str" else f"a number ({kind})"
            message = f"--{name.replace('_', '-')} must be {what}, got {got}"
        self.exit(2, f"error: {message}; try --help\n")


def _parser(mode: str):
    class Help(DefaultHelpFormatter):
        def _fill_text(self, text, width, indent):
            return "".join(indent + line for line in text.splitlines(keepends=True))

        def _get_type_str(self, action):  # the metavars DIR, DATA, LIST and N say it
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
        try:
            Path(config).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--config: {config} cannot be read: {error}")
    shown = [word for word in arguments if not word.startswith("--print_config")]  # afterwards
    preset = parser.parse_args(shown).preset
    parser.set_defaults(PRESETS[preset])
    given = vars(parser.parse_args(arguments))
    settings = Settings(**{f.name: given[f.name] for f in fields(Settings)})
    error = problem(settings)
    if error:
        parser.error(error)
    return settings
