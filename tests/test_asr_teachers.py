"""Teachers of other makes, mapped to the student's alphabet and frame rate, or refused."""

import json
import sys
import types

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_train import TINY

from kdkernels import train
from kdkernels.asr import data, teachers, training
from kdkernels.asr.files import TrainError

CPU = training.Machine(torch.device("cpu"), torch.float32)
LETTERS = " abcdefghijklmnopqrstuvwxyz"
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8,) * 7,
    "num_conv_pos_embedding_groups": 2,
    "num_conv_pos_embeddings": 4,
}


def save(folder, kind, tokens):
    """A small random Hugging Face CTC model; the last token is its blank."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokens), pad_token_id=len(tokens) - 1, **SMALL
    )
    getattr(transformers, f"{kind}ForCTC")(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    return folder


TOKENS = ["<s>", "|", *LETTERS.upper()[1:], "<unk>", "<pad>"]


@pytest.mark.parametrize("kind", ["Wav2Vec2", "Hubert", "WavLM"])
def test_a_hugging_face_teacher(tmp_path, kind):
    folder = save(tmp_path / "teacher", kind, TOKENS)
    cache = tmp_path / "cache"
    source = data.synthesised(0, "test", 3)
    utterances = data.load(source, tmp_path, 1, lambda n: None)
    opened = teachers.open_teachers([str(folder)])
    alphabet = data.Alphabet.of([LETTERS])
    assert teachers.characters(opened) == LETTERS
    arguments = (opened, utterances, alphabet, CPU, cache, 0, lambda n: None)
    rows = teachers.cached(*arguments)
    ones = torch.ones(1000)
    for row, features in zip(rows, utterances.features, strict=True):
        assert row.shape == (len(features) // 3, 28)
        total = row.float().exp().sum(-1)
        torch.testing.assert_close(total, ones[: len(row)], atol=5e-3, rtol=0)
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:-100])  # truncated: made again
    assert all(map(torch.equal, teachers.cached(*arguments), rows))


def test_a_run_with_foreign_teachers_and_our_own(tmp_path):
    save(tmp_path / "hf", "Wav2Vec2", TOKENS)
    out = tmp_path / "out"
    spec = f'--teachers=["own=3","{tmp_path / "hf"}"]'
    arguments = [*TINY, "--arms=alone,distilled,pseudo_labels", "--top-k=4"]
    assert train.main([*arguments, spec, "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    own = report["parameters"]["student_alone"]
    assert report["parameters"]["teacher"] > 4 * own
    assert "student_pseudo_labels" in report["wer"]
    # and a model of this program as the only teacher of another run
    spec = f'--teachers=["{out / "teacher.safetensors"}"]'
    again = [*TINY, "--arms=alone,distilled", spec, "--cache", str(out / "cache")]
    assert train.main([*again, "--out", str(tmp_path / "second")]) == 0
    assert not (tmp_path / "second" / "teacher.safetensors").exists()


class Bundle:
    """As in torchaudio.pipelines."""

    sample_rate = 16000

    @staticmethod
    def get_labels():
        return ("-", "|", *LETTERS.upper()[1:])

    @staticmethod
    def get_model():
        class Model(torch.nn.Module):
            def forward(self, waveforms):
                frames = (waveforms.shape[1] - 400) // 320 + 1
                return torch.zeros(1, frames, 28), None

        return Model()


def test_a_torchaudio_pipeline(monkeypatch, tmp_path):
    module = types.ModuleType("torchaudio.pipelines")
    module.SMALL = Bundle()
    monkeypatch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))
    monkeypatch.setitem(sys.modules, "torchaudio.pipelines", module)
    opened = teachers.open_teachers(["torchaudio:SMALL"])
    utterances = data.load(data.synthesised(0, "test", 2), tmp_path, 1, lambda n: None)
    alphabet = data.Alphabet.of([LETTERS])
    rows = teachers.cached(opened, utterances, alphabet, CPU, tmp_path, 0, lambda n: None)
    expected = torch.full_like(rows[0].float(), -torch.log(torch.tensor(28.0)).item())
    torch.testing.assert_close(rows[0].float(), expected, atol=5e-3, rtol=0)
    with pytest.raises(TrainError, match="torchaudio:LARGE is not a CTC pipeline"):
        teachers.open_teachers(["torchaudio:LARGE"])


def test_without_torchaudio_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    with pytest.raises(TrainError, match="torchaudio cannot be used here"):
        teachers.open_teachers(["torchaudio:WAV2VEC2_ASR_BASE_960H"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "the teacher nowhere cannot be read"),
        (".", "is not a Hugging Face CTC model"),
        ("own=x", "the weight 'x' is not a number"),
        ("own=0", "the weight must be greater than 0"),
    ],
)
def test_teachers_that_are_none(spec, message):
    with pytest.raises(TrainError, match=message):
        teachers.open_teachers([spec])


def test_a_teacher_saved_with_its_processor(tmp_path):
    """Newer versions write one file for all of it."""
    save(tmp_path, "Wav2Vec2", TOKENS)
    (tmp_path / "preprocessor_config.json").unlink()
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=False)
    transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(tmp_path)
    ((teacher, _),) = teachers.open_teachers([str(tmp_path)])
    assert teacher.frames_per_second == 50
    assert not teacher._normalise
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").unlink(missing_ok=True)
    with pytest.raises(TrainError, match="hears 8000 Hz"):
        teachers.open_teachers([str(tmp_path)])


@pytest.mark.parametrize("kept", [0, 8, 0.5, -100])
@pytest.mark.parametrize("pickled", [False, True])
def test_weights_that_are_cut_short(tmp_path, kept, pickled):
    save(tmp_path, "Wav2Vec2", TOKENS)
    path = tmp_path / "model.safetensors"
    if pickled:
        weights = load_file(path)
        path.unlink()
        path = tmp_path / "pytorch_model.bin"
        torch.save(weights, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if kept != 0.5 else len(whole) // 2])
    with pytest.raises(TrainError, match=f"{tmp_path} is not a Hugging Face CTC model: ."):
        teachers.open_teachers([str(tmp_path)])


def test_weights_of_another_size_than_the_settings(tmp_path):
    save(tmp_path, "Wav2Vec2", TOKENS)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(TrainError, match=r"not all that config\.json asks for: lm_head\.weight"):
        teachers.open_teachers([str(tmp_path)])


def test_a_model_without_a_ctc_head_is_refused(tmp_path):
    """Transformers would give it a random one."""
    save(tmp_path, "Wav2Vec2", TOKENS)
    transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path).wav2vec2.save_pretrained(tmp_path)
    with pytest.raises(TrainError, match=r"lm_head\.bias, lm_head\.weight would be random"):
        teachers.open_teachers([str(tmp_path)])


def test_a_model_without_what_only_training_needs_is_taken(tmp_path):
    save(tmp_path, "Wav2Vec2", TOKENS)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["wav2vec2.masked_spec_embed"]
    save_file(weights, path, {"format": "pt"})
    assert teachers.open_teachers([str(tmp_path)])


@pytest.mark.parametrize("samples", [1, 320, 399, 400, 719, 720])
def test_an_utterance_shorter_than_a_frame_is_followed_by_silence(tmp_path, samples):
    """The convolutions of wav2vec 2.0 make a frame of 400 samples, and one more of every 320."""
    save(tmp_path, "Wav2Vec2", TOKENS)
    ((teacher, _),) = teachers.open_teachers([str(tmp_path)])
    noise = torch.randint(-3000, 3000, (samples,), generator=torch.Generator().manual_seed(0))
    utterances = types.SimpleNamespace(samples=lambda: iter([(0, noise.short())]))
    ((_, logits),) = teacher.logits(utterances, CPU)
    assert logits.shape == (1 + (samples >= 720), len(TOKENS))
    assert logits.isfinite().all()
    assert len(teachers.to_rate(logits, 50.0, 1, 100 / 3)) == 1  # the student's one frame


def test_an_unfitting_alphabet_is_told_before_the_training(tmp_path, capsys):
    save(tmp_path / "teacher", "Wav2Vec2", ["a", "|", "<pad>"])
    command = [*TINY, "--teachers", str(tmp_path / "teacher"), "--out", str(tmp_path / "out")]
    assert train.main(command) == 2
    assert "error: the teacher does not know 'b'" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_vocabulary_is_that_of_the_classes(tmp_path):
    save(tmp_path, "Wav2Vec2", ["a", "|", "<pad>"])
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text(json.dumps({"a": 0, "|": 1, "<pad>": 2, "<s>": 3}))
    ((teacher, _),) = teachers.open_teachers([str(tmp_path)])
    assert teacher.labels == ["a", " ", ""]
    for other in ({"eng": {"a": 0}}, ["a", "|", "<pad>"]):
        vocabulary.write_text(json.dumps(other))
        with pytest.raises(TrainError, match="is not a Hugging Face CTC model"):
            teachers.open_teachers([str(tmp_path)])


def test_a_teacher_that_spells_in_pieces_is_refused(tmp_path):
    save(tmp_path, "Wav2Vec2", ["ing", "a", "<pad>"])
    with pytest.raises(TrainError, match=r"pieces of words \('ing'\)"):
        teachers.open_teachers([str(tmp_path)])


def test_an_alphabet_is_mapped_or_refused():
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    alphabet = data.Alphabet(" a")
    mapped = teachers.to_alphabet(logits, ["a", None, "", " "], alphabet)
    assert mapped.tolist() == [[3.0, 4.0, 1.0]]
    with pytest.raises(TrainError, match="the teacher does not know ' '"):
        teachers.to_alphabet(logits, ["a", None, "", None], alphabet)
    with pytest.raises(TrainError, match="the student does not know 'b'"):
        teachers.to_alphabet(logits, ["a", "b", "", " "], alphabet)


def test_another_frame_rate_keeps_every_frame():
    probs = torch.eye(5)
    mapped = teachers.to_rate((probs + 1e-9).log(), 50.0, 3, 100 / 3).exp()
    # frames of 20 ms in frames of 30 ms: two thirds and one third
    expected = torch.tensor(
        [[2, 1, 0, 0, 0], [0, 1, 2, 0, 0], [0, 0, 0, 2, 1]], dtype=torch.float32
    )
    torch.testing.assert_close(mapped, expected / 3, atol=1e-5, rtol=0)
    twice = teachers.to_rate((probs + 1e-9).log(), 10.0, 10, 20.0).exp()
    torch.testing.assert_close(twice, probs.repeat_interleave(2, 0), atol=1e-5, rtol=0)
    same = torch.randn(4, 5)
    assert teachers.to_rate(same, 25.0, 4, 25.0) is same
    with pytest.raises(TrainError, match=r"5 frames, 0.10 s, .* says 12, 0.36 s"):
        teachers.to_rate(probs, 50.0, 12, 100 / 3)


def test_the_best_classes_and_the_mass_of_the_rest():
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)) * 3
    probs = logits.softmax(-1)
    kept = teachers.unpack(teachers.pack(logits, 3), 10).float().exp()
    best = probs.topk(3).indices
    torch.testing.assert_close(kept.gather(1, best), probs.gather(1, best), rtol=5e-3, atol=1e-4)
    torch.testing.assert_close(kept.sum(-1), torch.ones(6), atol=5e-3, rtol=0)
    assert torch.equal(teachers.unpack(teachers.pack(logits, 0), 10), logits.half())


def test_several_teachers_are_the_weighted_mean_of_their_distributions():
    a, b = torch.randn(2, 4, 5)
    mixed = teachers.mix([a, b], [0.25, 0.75]).exp()
    torch.testing.assert_close(mixed, 0.25 * a.softmax(-1) + 0.75 * b.softmax(-1))
