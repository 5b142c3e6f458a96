"""Teachers: models of this program, Hugging Face CTC models, torchaudio pipelines.

A teacher has `labels`, for each class a character, "" for the blank, or None for what no student
emits (<s>, <unk>); `frames_per_second`; `sha256` of its weights; `parameters`; and
`logits(dataset, on)`, which yields (index, logits [T, classes] on the CPU).

`cached` maps their logits to the student's alphabet and frame rate, mixes those of several
teachers, and keeps the result on disk.
"""

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import files, training
from .audio import SAMPLE_RATE
from .data import Alphabet, Dataset
from .extras import missing
from .files import TrainError
from .model import STACK, Encoder, read_encoder

SHARD = 2000  # utterances


class Own:
    """An encoder of this program."""

    def __init__(self, encoder: Encoder, characters: str):
        self.encoder = encoder
        self.labels = ["", *characters]
        self.frames_per_second = encoder.frames_per_second
        self.sha256 = files.tensors_digest(encoder.state_dict())
        self.parameters = encoder.parameter_count()

    @classmethod
    def of(cls, path: Path) -> "Own":
        """From OUT/NAME.safetensors."""
        return cls(*read_encoder(path, "the teacher "))

    def logits(self, data: Dataset, on: training.Machine) -> Iterator[tuple[int, Tensor]]:
        """Logits of a streaming student, which come late, are moved to where things are said."""
        self.encoder.to(on.device)
        for chosen, logits, lengths in training.run(self.encoder, data, on):
            for i, row, length in zip(chosen, logits.cpu(), lengths.tolist(), strict=True):
                later = torch.arange(length) + self.encoder.shift
                yield i, row[later.clamp(max=length - 1)]


class Foreign:
    """A model that reads samples at 16 kHz, one utterance at a time. Only utterances shorter than
    `least` samples, which its first frame takes, are padded."""

    def __init__(self, model, labels: list, hop: int, normalise: bool, least: int = 400):
        self.model, self.labels, self._normalise = model.eval(), labels, normalise
        self._least = least
        self.frames_per_second = SAMPLE_RATE / hop
        self.sha256 = files.tensors_digest(dict(model.state_dict()))
        self.parameters = sum(p.numel() for p in model.parameters())

    @torch.no_grad()
    def logits(self, data: Dataset, on: training.Machine) -> Iterator[tuple[int, Tensor]]:
        self.model.to(on.device)
        for index, samples in data.samples():
            audio = samples.float() / 32768
            if self._normalise:
                audio = (audio - audio.mean()) / (audio.var(correction=0) + 1e-7).sqrt()
            audio = F.pad(audio, (0, max(0, self._least - len(audio))))
            made = self.model(audio[None].to(on.device))
            yield index, (made.logits if hasattr(made, "logits") else made[0])[0].float().cpu()


def hugging_face(folder: Path) -> Foreign:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise TrainError(f"the teacher {folder}: {missing('transformers', 'hub')}") from error
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        model, loaded = transformers.AutoModelForCTC.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        random = {*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])}
        # absent from some published models: it hides spans in training and does nothing else
        random = {name for name in random if not name.endswith("masked_spec_embed")}
        if random:
            names = ", ".join(sorted(random)[:5])
            raise ValueError(
                f"its weights are not all that config.json asks for: {names} would be random; give "
                "a model that was saved with its CTC head"
            )
        hop, least = model.config.inputs_to_logits_ratio, 1
        convolutions = zip(model.config.conv_kernel, model.config.conv_stride, strict=True)
        for kernel, stride in reversed(list(convolutions)):
            least = (least - 1) * stride + kernel
        tokens = json.loads((folder / "vocab.json").read_text())
        if not isinstance(tokens, dict) or not all(isinstance(i, int) for i in tokens.values()):
            raise ValueError("vocab.json is not a table of one language's tokens and their numbers")
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a dozen kinds, by which file is truncated or foreign
        reason = str(error) or type(error).__name__
        raise TrainError(f"{folder} is not a Hugging Face CTC model: {reason}") from error
    rate = extractor.sampling_rate
    if rate != SAMPLE_RATE:
        raise TrainError(f"the teacher {folder} hears {rate} Hz; expected one of {SAMPLE_RATE} Hz")
    labels: list = [None] * model.config.vocab_size
    for token, i in tokens.items():
        if i < len(labels):  # the others have no class
            labels[i] = token
    blank = model.config.pad_token_id
    labels = [_label(str(folder), x, i == blank) for i, x in enumerate(labels)]
    return Foreign(model, labels, hop, getattr(extractor, "do_normalize", True), least)


def torchaudio_bundle(name: str) -> Foreign:
    """A bundle of torchaudio.pipelines, or any `package.module.BUNDLE` with the same methods."""
    module, _, attribute = name.rpartition(".")
    try:
        bundle = getattr(import_module(module or "torchaudio.pipelines"), attribute)
        model, labels = bundle.get_model(), bundle.get_labels()
    except (ImportError, OSError) as error:  # OSError: a wheel made for CUDA beside a CPU torch
        raise TrainError(
            f"torchaudio:{name}: torchaudio cannot be used here ({str(error).splitlines()[0]}); "
            "install the torchaudio that fits this torch"
        ) from error
    except AttributeError as error:
        raise TrainError(f"torchaudio:{name} is not a CTC pipeline: {error}") from error
    if bundle.sample_rate != SAMPLE_RATE:
        raise TrainError(f"torchaudio:{name} hears {bundle.sample_rate} Hz; expected {SAMPLE_RATE}")
    labels = [_label(name, label, i == 0) for i, label in enumerate(labels)]
    return Foreign(model, labels, 320, getattr(bundle, "_normalize_waveform", False))


def _label(teacher: str, token: str | None, blank: bool) -> str | None:
    if blank:
        return ""
    if token is None or (len(token) > 2 and token[0] + token[-1] in ("<>", "[]")):
        return None
    character = {"|": " ", "\u2581": " "}.get(token, token.lower())
    if len(character) != 1:
        raise TrainError(
            f"the teacher {teacher} spells in pieces of words ({token!r}); expected characters"
        )
    return character


def open_teachers(specs: list[str]) -> list[tuple[object | None, float]]:
    """(teacher, weight) of each of --teachers, weights adding up to 1; None is this run's own."""
    opened = []
    for spec in specs:
        name, sign, number = spec.rpartition("=")
        name, number = (name, number) if sign else (spec, "1")
        try:
            weight = float(number)
        except ValueError as error:
            raise TrainError(f"--teachers {spec}: the weight {number!r} is not a number") from error
        if not 0 < weight < float("inf"):
            raise TrainError(f"--teachers {spec}: the weight must be greater than 0")
        if name == "own":
            teacher = None
        elif name.startswith("torchaudio:"):
            teacher = torchaudio_bundle(name.removeprefix("torchaudio:"))
        elif Path(name).is_dir():
            teacher = hugging_face(Path(name))
        else:
            teacher = Own.of(Path(name))
        opened.append((teacher, weight))
    total = sum(weight for _, weight in opened)
    return [(teacher, weight / total) for teacher, weight in opened]


def characters(opened: list[tuple]) -> str:
    """The characters of these teachers, which the student's alphabet must have."""
    return "".join(x for teacher, _ in opened if teacher for x in teacher.labels if x)


# ---- to the student's alphabet and frame rate ----------------------------------------------------


def to_alphabet(logits: Tensor, labels: list, alphabet: Alphabet) -> Tensor:
    """[T, classes] -> [T, len(alphabet)]: the student's classes in their order.

    Classes that are not characters (<s>, <unk>) are left out; the rest is a distribution again.
    Raises TrainError where the student has a character that the teacher does not know, or the
    teacher one that the student does not.
    """
    wanted = ["", *alphabet.characters]
    if labels == wanted:
        return logits
    for whose, has, lacks in (("teacher", labels, wanted), ("student", wanted, labels)):
        missing = sorted({x for x in lacks if x is not None} - set(has))
        if missing:
            raise TrainError(
                f"the {whose} does not know {', '.join(map(repr, missing))}; teacher and student "
                "need the same characters: normalise the transcripts or take another teacher"
            )
    if len(set(labels) - {None}) != sum(x is not None for x in labels):
        raise TrainError("the teacher has two classes for one character: take another one")
    return logits[:, [labels.index(x) for x in wanted]]


def check_alphabets(opened: list[tuple], alphabet: Alphabet) -> None:
    """Raises TrainError for a teacher that cannot be mapped, before anything is trained."""
    for teacher, _ in opened:
        if teacher:
            to_alphabet(torch.zeros(1, len(teacher.labels)), teacher.labels, alphabet)


def to_rate(logits: Tensor, rate: float, T: int, new_rate: float) -> Tensor:
    """[frames, C] at `rate` frames a second -> [T, C] at `new_rate`, as log-probabilities.

    A new frame is the mean of the distributions of the old ones, weighted by their overlap with
    it: no frame is left out. Raises TrainError where the two do not end within 0.1 s.
    """
    frames = len(logits)
    if abs(frames / rate - T / new_rate) > 0.1:
        raise TrainError(
            f"the teacher says {frames} frames, {frames / rate:.2f} s, of an utterance of which "
            f"the student says {T}, {T / new_rate:.2f} s: they hear other audio or count otherwise"
        )
    if rate == new_rate and frames == T:
        return logits
    old = torch.arange(frames) / rate
    new = torch.arange(T)[:, None] / new_rate
    ends = torch.minimum(old + 1 / rate, new + 1 / new_rate)
    overlap = (ends - torch.maximum(old, new)).clamp(min=0)
    overlap[overlap.sum(1) < 1e-6, -1] = 1.0  # past the teacher's end: its last frame
    overlap = overlap / overlap.sum(1, keepdim=True)
    return (overlap @ logits.float().softmax(-1)).clamp(min=1e-7).log()


def mix(rows: list[Tensor], weights: list[float]) -> Tensor:
    """Log-probabilities of the weighted mean of several distributions; one is left as it is."""
    if len(rows) == 1:
        return rows[0]
    return sum(w * r.float().softmax(-1) for r, w in zip(rows, weights, strict=True)).log()


def pack(logits: Tensor, k: int) -> dict[str, Tensor]:
    """[T, C] -> what is kept on disk: all in float16, or the k best and the mass of the rest."""
    if not k or k >= logits.shape[-1] - 1:
        return {"logits": logits.half()}
    best = logits.float().log_softmax(-1).topk(k)
    rest = (1 - best.values.exp().sum(-1)).clamp(min=1e-7).log()
    return {
        "logits": best.values.half(), "classes": best.indices.short(), "rest": rest.half()
    }  # fmt: skip


def unpack(packed: dict[str, Tensor], C: int) -> Tensor:
    """float16 [T, C]; the rest's mass spread evenly over the classes that were not kept."""
    if "classes" not in packed:
        return packed["logits"]
    k = packed["classes"].shape[-1]
    even = packed["rest"].float() - torch.log(torch.tensor(float(C - k)))
    full = even[:, None].repeat(1, C)
    return full.scatter(1, packed["classes"].long(), packed["logits"].float()).half()


def cached(
    opened: list[tuple], data: Dataset, alphabet: Alphabet, on, folder: Path, top_k: int, done
) -> list[Tensor]:
    """float16 [T, C] for each utterance: the teachers' mixture at the student's frame rate.

    Kept in shards in `folder`, keyed by what is heard and who says it; made again where a shard
    is missing, truncated or foreign. `done(n)` is called after every n utterances.
    """
    who = [[t.sha256, weight, t.frames_per_second] for t, weight in opened]
    rows: list[Tensor] = []
    for start in range(0, len(data), SHARD):
        part = data.part(start, start + SHARD)
        rate = Encoder.frames_per_second
        key = files.digest("logits", who, alphabet.characters, part.key, part.sha256, rate, top_k)
        path = folder / f"logits-{key[:16]}.safetensors"
        found = files.load_tensors(path, key)
        if not found:
            made = [[] for _ in range(len(part))]
            for teacher, _ in opened:
                for i, logits in teacher.logits(part, on):
                    T = len(part.features[i]) // STACK
                    logits = to_alphabet(logits, teacher.labels, alphabet)
                    made[i].append(to_rate(logits, teacher.frames_per_second, T, rate))
            weights = [weight for _, weight in opened]
            packed = [pack(mix(r, weights), top_k) for r in made]
            tensors = {name: torch.cat([p[name] for p in packed]) for name in packed[0]}
            tensors["lengths"] = torch.tensor([len(p["logits"]) for p in packed])
            files.save_tensors(path, tensors, key, frames_per_second=rate)
            found = tensors, {}
        lengths = found[0]["lengths"].tolist()
        parts = {n: t.split(lengths) for n, t in found[0].items() if n != "lengths"}
        rows += [
            unpack({n: t[i] for n, t in parts.items()}, len(alphabet)) for i in range(len(lengths))
        ]
        done(len(part))
    return rows
