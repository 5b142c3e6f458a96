"""Manifests, Kaldi folders, Hugging Face and torchaudio datasets; every bad line named."""

import json
import sys

import datasets
import numpy as np
import pytest
import soundfile

from kdkernels.asr import data, sources, tables
from kdkernels.asr.files import TrainError


@pytest.fixture
def folder(tmp_path):
    """Half a second of a rising ramp at three rates, one of them stereo."""
    for name, rate, channels in (("a.wav", 16000, 1), ("b.flac", 44100, 2), ("c.wav", 8000, 1)):
        ramp = np.linspace(0, 0.5, rate // 2)[:, None].repeat(channels, 1)
        soundfile.write(tmp_path / name, ramp, rate)
    return tmp_path


def heard(shards):
    """[(text, samples)] of all shards, in order."""
    return [(text, samples) for shard in shards for samples, text in shard.utterances({})]


def check(shards, texts=("one", "two", "three")):
    utterances = heard(shards)
    assert [text for text, _ in utterances] == list(texts)
    for _, samples in utterances:
        assert samples.dtype == np.int16
        assert len(samples) == 8000
        assert samples[6000] == pytest.approx(0.375 * 32767, rel=0.02)


def test_a_manifest_and_its_offsets(folder):
    entries = [
        {"audio_filepath": "a.wav", "text": "One.", "duration": 0.5},
        {"audio_filepath": str(folder / "b.flac"), "text": "two"},
        {"audio_filepath": "c.wav", "text": "three", "duration": None},
        {"audio_filepath": "a.wav", "text": "four", "offset": 0.25, "duration": 0.125},
    ]
    path = folder / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    (shard,), skipped = sources.read(str(path), True)
    assert skipped == 0
    check([sources.Recorded(shard.lines[:3])])
    ((text, samples),) = heard([sources.Recorded(shard.lines[3:])])
    assert (text, len(samples)) == ("four", 2000)
    assert samples[0] == pytest.approx(0.25 * 32767, rel=0.02)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"audio_filepath": "a\\u0000b.wav", "text": "a"}', "cannot be opened"),
        (b'{"audio_filepath": "%s.wav", "text": "a"}' % (5000 * b"a"), "File name too long"),
        (b'{"audio_filepath": "circle.wav", "text": "a"}', "circle.wav"),
        (b'{"audio_filepath": "a.wav", "text": "a", "duration": 1%s}' % (400 * b"0"), "is not a"),
        (50000 * b"[", "not JSON: "),
        (b'{"audio_filepath": "a.wav", "text": "caf\xe9"}', "not UTF-8"),
    ],
)
def test_a_line_that_no_reader_expects(folder, line, message):
    (folder / "circle.wav").symlink_to("circle.wav")
    good = b'{"audio_filepath": "a.wav", "text": "one"}'
    path = folder / "m.jsonl"
    path.write_bytes(b"\r\n".join([good, line, good]))
    with pytest.raises(TrainError, match=rf"1 of 3 lines(.|\n)*m\.jsonl, line 2: .*{message}"):
        sources.read(str(path), True)
    (shard,), skipped = sources.read(str(path), True, skip_bad=True)
    assert (len(shard), skipped) == (2, 1)


def test_a_line_ends_at_a_newline_and_nowhere_else(folder):
    entry = {"audio_filepath": "a.wav", "text": "one\u2028two\u0085three"}
    (folder / "m.jsonl").write_text(json.dumps(entry, ensure_ascii=False), encoding="utf-8")
    (shard,), _ = sources.read(str(folder / "m.jsonl"), True)
    assert [line.text for line in shard.lines] == ["one two three"]


@pytest.mark.parametrize(
    ("times", "samples"),
    [
        ({"duration": 0.25}, 4000),  # clearly shorter: as with "offset": 0
        ({"duration": 0.25, "offset": 0}, 4000),
        ({"duration": 0.48}, 8000),  # the whole file's, rounded
        ({"duration": 0.52}, 8000),
        ({"duration": 0.48, "offset": 0}, 7680),
        ({"duration": 1 / 16000, "offset": 0.25}, 1),
    ],
)
def test_a_duration_says_how_much_is_heard(folder, times, samples):
    path = folder / "m.jsonl"
    path.write_text(json.dumps({"audio_filepath": "a.wav", "text": "one", **times}))
    ((_, found),) = heard(sources.read(str(path), True)[0])
    assert len(found) == samples


@pytest.mark.parametrize(
    "times",
    [
        {"duration": 0},
        {"duration": 0, "offset": 0.25},
        {"duration": 2e-5, "offset": 0.25},
        {"duration": 0.05, "offset": 0.5},  # from the end on
    ],
)
def test_less_than_a_sample_is_a_bad_line(folder, times):
    path = folder / "m.jsonl"
    path.write_text(json.dumps({"audio_filepath": "a.wav", "text": "one", **times}))
    with pytest.raises(TrainError, match=r"line 1: .*a\.wav has no sample between"):
        sources.read(str(path), True)


def test_a_kaldi_folder(folder):
    (folder / "wav.scp").write_text(f"u1 a.wav\nu2 {folder / 'b.flac'}\nu3 c.wav\n")
    (folder / "text").write_text("u2 TWO\nu1 One\nu3 three\n")
    check(sources.read(str(folder), True)[0])
    check(sources.read(str(folder), False)[0], ("", "", ""))
    (folder / "segments").write_text("s1 u1 0.0 0.25\ns2 u1 0.25 0.5\n")
    (folder / "text").write_text("s1 first half\ns2 second half\n")
    utterances = heard(sources.read(str(folder), True)[0])
    assert [(text, len(samples)) for text, samples in utterances] == [
        ("first half", 4000), ("second half", 4000)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("wav.scp", "u1 a.wav\nu2 gone.wav\n", "wav.scp, line 2: there is no file"),
        ("wav.scp", "u1 a.wav\nu2 sox b.flac |\n", "wav.scp, line 2: no file but a command"),
        ("wav.scp", "u1 a.wav\nu2\n", "wav.scp, line 2: no file for u2"),
        ("text", "u1 one\n", "wav.scp, line 2: .*text has no line u2"),
        ("text", "u1 one\nu2 ...\n", "text, line 2: `text` has no word"),
        ("segments", "u1 u1 0 0.2\nu2 u2 0\n", "segments, line 2: expected `utterance recording"),
        ("segments", "u1 u1 0 0.2\nu2 u9 0 0.2\n", "segments, line 2: wav.scp has no recording u9"),
        ("segments", "u1 u1 0 0.2\nu2 u2 0.3 0.2\n", "segments, line 2: the segment ends before"),
        ("segments", "u1 u1 0 0.2\nu2 u2 0.1 0.10001\n", "segments, line 2: .* has no sample"),
        (
            "segments",
            "u1 u1 0 0.2\nu2 u2 0 9\n",
            "segments, line 2: .*b.flac has 0.5 s, but the segment",
        ),
    ],
)
def test_a_bad_line_of_a_kaldi_folder(folder, capsys, name, text, message):
    (folder / "wav.scp").write_text("u1 a.wav\nu2 b.flac\n")
    (folder / "text").write_text("u1 one\nu2 two\n")
    (folder / name).write_text(text)
    with pytest.raises(TrainError, match=f"1 of 2 lines of (.|\n)*{message}"):
        sources.read(str(folder), True)
    shards, skipped = sources.read(str(folder), True, skip_bad=True)
    assert skipped == 1
    assert len(shards[0]) == 1
    assert "warning: 1 of 2 lines" in capsys.readouterr().err


def test_lines_of_a_kaldi_folder_that_have_no_name_of_their_own(folder, capsys):
    """Two lines for one recording, segment or transcript; one whose name no letters spell."""
    (folder / "wav.scp").write_text("r1 a.wav\nr2 b.flac\nr1 b.flac\n")
    (folder / "segments").write_text("s1 r1 0 0.2\ns1 r2 0 0.2\ns2 r2 0 0.2\n")
    (folder / "text").write_bytes(b"s1 one\ns2 two\n\ns2 three\ncaf\xe9 four\n")
    with pytest.raises(TrainError, match="4 of 6 lines of ") as error:
        sources.read(str(folder), True)
    for name, line, reason in (
        ("wav.scp", 3, f"{folder / 'wav.scp'}, line 1 is for r1 too; keep one"),
        ("segments", 2, f"{folder / 'segments'}, line 1 is for s1 too; keep one"),
        ("text", 4, f"{folder / 'text'}, line 2 is for s2 too; keep one"),
        ("text", 5, "not UTF-8"),
    ):
        assert f"{folder / name}, line {line}: {reason}" in str(error.value)
    (shard,), skipped = sources.read(str(folder), True, skip_bad=True)
    assert skipped == 4
    assert [(line.path, line.text) for line in shard.lines] == [
        (str(folder / "a.wav"), "one"), (str(folder / "b.flac"), "two")
    ]  # fmt: skip


def test_a_transcript_without_a_recording(folder):
    (folder / "wav.scp").write_text("u1 a.wav\nu2 b.flac\n")
    (folder / "text").write_text("u1 one\nu2 two\nu3 three\n")
    with pytest.raises(
        TrainError, match=r"1 of 3 lines(.|\n)*text, line 3: .*wav.scp has no .* u3"
    ):
        sources.read(str(folder), True)
    assert sources.read(str(folder), True, skip_bad=True)[1] == 1
    assert sources.read(str(folder), False)[1] == 0  # where no transcript is read


def test_a_folder_that_is_no_data_set(tmp_path):
    with pytest.raises(TrainError, match=r"has no wav\.scp: expected a Kaldi folder"):
        sources.read(str(tmp_path), True)


def test_nothing_left_is_an_error(folder):
    (folder / "m.jsonl").write_text("{}\n" * 30)
    with pytest.raises(TrainError, match=r"30 of 30 lines(.|\n)*and 10 more"):
        sources.read(str(folder / "m.jsonl"), True)
    with pytest.raises(TrainError, match="no utterance that can be used"):
        sources.read(str(folder / "m.jsonl"), True, skip_bad=True)


def damaged(content):
    """A fiftieth of the file, in its middle, is something else."""
    middle, size = len(content) // 2, len(content) // 50
    return content[:middle] + size * b"U" + content[middle + size :]


@pytest.fixture
def half_bad(folder):
    """A manifest: noise, of which the second and third file are damaged where no header tells."""
    rng = np.random.default_rng(0)
    entries = []
    for name in ("good.flac", "bad.flac", "bad.ogg", "good.wav"):
        soundfile.write(folder / name, 0.1 * rng.standard_normal(8 * 16000), 16000)
        entries.append({"audio_filepath": name, "text": name[0] + name[-1], "duration": 8.0})
    for name in ("bad.flac", "bad.ogg"):
        (folder / name).write_bytes(damaged((folder / name).read_bytes()))
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return folder


def test_audio_that_is_damaged_in_the_middle_is_named_or_left_out(half_bad, capsys):
    shards, skipped = sources.read(str(half_bad / "m.jsonl"), True)
    assert skipped == 0
    arguments = shards, half_bad / "cache", 1, lambda n: None
    for _ in range(2):  # the second time from the cache
        with pytest.raises(
            TrainError, match=r"2 of 4 recordings cannot be used; .*skip-bad"
        ) as error:
            data.load(*arguments)
        flac, ogg = str(error.value).splitlines()[1:]
        assert f"m.jsonl, line 2: {half_bad / 'bad.flac'} cannot be read as audio" in flac
        assert f"m.jsonl, line 3: {half_bad / 'bad.ogg'} is damaged: of 128000 samples" in ogg
    loaded = data.load(*arguments, skip_bad=True)
    assert capsys.readouterr().err.startswith("warning: 2 of 4 recordings cannot be used and are")
    assert loaded.texts == ["gc", "gv"]
    assert loaded.seconds == 16
    heard = dict(loaded.samples())
    for i, name in enumerate(("good.flac", "good.wav")):
        assert np.array_equal(heard[i], soundfile.read(half_bad / name, dtype="int16")[0])
    noisy = [data.Noisy(shard, 20.0, 0) for shard in shards]
    with pytest.raises(TrainError, match=r"m\.jsonl, line 2: "):
        data.load(noisy, *arguments[1:])


def test_a_shard_without_a_good_recording(half_bad):
    (shard,), _ = sources.read(str(half_bad / "m.jsonl"), True)
    shards = [sources.Recorded(shard.lines[1:3]), sources.Recorded(shard.lines[3:])]
    arguments = half_bad / "cache", 1, lambda n: None
    assert data.load(shards, *arguments, skip_bad=True).texts == ["gv"]
    with pytest.raises(TrainError, match="no recording of a set can be used"):
        data.load(shards[:1], *arguments, skip_bad=True)


def test_a_damaged_part_is_no_harm_to_the_others(half_bad):
    line = {"audio_filepath": "bad.flac", "text": "a", "duration": 1.0}
    (half_bad / "m.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "offset": 3.5}))
    shards, _ = sources.read(str(half_bad / "m.jsonl"), True)
    with pytest.raises(TrainError, match=r"1 of 2 recordings(.|\n)*line 2: "):
        data.load(shards, half_bad / "cache", 1, lambda n: None)


def hugging_face(folder, **columns):
    rows = datasets.Dataset.from_dict(columns)
    rows.cast_column("audio", datasets.Audio(decode=False)).save_to_disk(str(folder / "hf"))
    return str(folder / "hf")


def test_a_hugging_face_dataset(folder):
    items = [
        {"bytes": (folder / "a.wav").read_bytes(), "path": None},
        {"bytes": None, "path": str(folder / "b.flac")},
        {"bytes": (folder / "c.wav").read_bytes(), "path": "c.wav"},
    ]
    spec = hugging_face(folder, audio=items, sentence=["One", "two!", "three"])
    shards, _ = sources.read(spec, True)
    check(shards)
    assert len(data.load(shards, folder / "cache", 1, lambda n: None)) == 3


def test_a_bad_row_of_a_hugging_face_dataset(folder):
    items = [
        {"bytes": b"no audio", "path": None},
        {"bytes": None, "path": str(folder / "a.wav")},
    ]
    spec = hugging_face(folder, audio=items, text=["one", None])
    with pytest.raises(TrainError) as error:
        sources.read(spec, True)
    for row in range(2):
        assert f"{spec}, row {row}: " in str(error.value)
    assert len(sources.read(spec, False, skip_bad=True)[0][0]) == 1


def test_a_row_whose_samples_are_no_numbers_is_named(folder):
    soundfile.write(folder / "a.wav", np.full(99, np.nan, "f4"), 16000, subtype="FLOAT")
    items = [{"bytes": (folder / "a.wav").read_bytes(), "path": None}]
    spec = hugging_face(folder, audio=items, text=["one"])
    with pytest.raises(TrainError, match="hf, row 0: samples that are not numbers"):
        sources.read(spec, True)


def test_a_row_that_is_damaged_in_the_middle_is_named(half_bad):
    items = [{"bytes": (half_bad / "bad.ogg").read_bytes(), "path": None}]
    spec = hugging_face(half_bad, audio=items, text=["one"])
    shards, _ = sources.read(spec, True)
    with pytest.raises(TrainError, match="hf, row 0: is damaged"):
        data.load(shards, half_bad / "cache", 1, lambda n: None)


def test_samples_are_looked_at_where_they_are_used(folder):
    samples = np.full(32000, 0.1, "f4")
    samples[20000] = np.inf
    soundfile.write(folder / "part.wav", samples, 16000, subtype="FLOAT")
    line = {"audio_filepath": "part.wav", "text": "one", "offset": 0.5, "duration": 0.5}
    (folder / "m.jsonl").write_text(json.dumps(line))
    (shard,), _ = sources.read(str(folder / "m.jsonl"), True)
    assert len(heard([shard])[0][1]) == 8000
    (folder / "m.jsonl").write_text(json.dumps({**line, "duration": 1.0}))
    with pytest.raises(TrainError, match=r"part\.wav holds samples that are not numbers"):
        sources.read(str(folder / "m.jsonl"), True)


def test_a_hugging_face_dataset_that_cannot_be_used(folder):
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"x": [1]})}).save_to_disk(
        str(folder / "several")
    )
    with pytest.raises(TrainError, match="several splits: name one"):
        sources.read(str(folder / "several"), True)
    with pytest.raises(TrainError, match="has no column `audio`"):
        sources.read(str(folder / "several" / "train"), True)


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"x" * 50, 0.5])
def test_a_broken_hugging_face_dataset(folder, name, content):
    spec = hugging_face(folder, audio=[{"bytes": b"no audio", "path": None}], text=["one"])
    path = folder / "hf" / name
    good = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(good[: int(content * len(good))] if content == 0.5 else content)
    tables.open_table.cache_clear()
    with pytest.raises(TrainError, match=r"cannot read the dataset|has no wav\.scp"):
        sources.read(spec, True)


@pytest.mark.parametrize("channels", [1, 2])
def test_decoded_samples_in_a_table(folder, channels):
    """As `datasets` decodes several channels: [channels, samples]."""
    samples = np.random.default_rng(0).uniform(-1, 1, 16000).astype("f4")
    array = [samples.tolist()] * channels if channels > 1 else samples.tolist()
    audio = {"array": array, "sampling_rate": 16000}
    rows = datasets.Dataset.from_dict({"audio": [audio], "text": ["one"]})
    rows.save_to_disk(str(folder / "hf"))
    tables.open_table.cache_clear()
    (shard,), _ = sources.read(str(folder / "hf"), True)
    ((heard, _),) = shard.utterances({})
    np.testing.assert_allclose(heard, 32767 * samples, atol=1)


@pytest.mark.parametrize("audio", ["", {"bytes": None, "path": None}, 7])
def test_a_column_audio_that_holds_none(folder, audio):
    rows = datasets.Dataset.from_dict({"audio": [audio], "text": ["one"]})
    rows.save_to_disk(str(folder / "hf"))
    tables.open_table.cache_clear()
    with pytest.raises(TrainError, match="row 0: "):
        sources.read(str(folder / "hf"), True)


TORCHAUDIO = """
import soundfile, torch
class Named:  # as torchaudio.datasets.LIBRISPEECH
    def __init__(self, root, url="all"):
        self._archive = root
    def __len__(self):
        return 3
    def get_metadata(self, n):
        return ("a.wav", "b.flac", "c.wav")[n], 16000, ("ONE", "TWO", "THREE")[n], 1, 2, 3
class Items(Named):  # as torchaudio.datasets.LJSPEECH
    get_metadata = property()
    def __getitem__(self, n):
        name, _, text, *_ = Named.get_metadata(self, n)
        samples, rate = soundfile.read(f"{self._archive}/{name}", always_2d=True)
        return torch.from_numpy(samples.T), rate, text
"""


@pytest.mark.parametrize("name", ["Named", "Items"])
def test_a_torchaudio_dataset(folder, monkeypatch, name):
    (folder / "corpora.py").write_text(TORCHAUDIO)
    monkeypatch.syspath_prepend(str(folder))
    tables.open_table.cache_clear()
    spec = f"torchaudio:corpora.{name}:{folder}"
    check(sources.read(spec, True)[0])
    (folder / "b.flac").unlink()
    tables.open_table.cache_clear()
    with pytest.raises(TrainError, match="row 1: "):
        sources.read(spec, True)


@pytest.mark.parametrize("broken", [True, False])
def test_torchaudio_that_is_missing_or_does_not_load(tmp_path, monkeypatch, broken):
    if broken:  # a wheel made for CUDA, beside a torch for CPUs
        monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
        (tmp_path / "torchaudio").mkdir()
        (tmp_path / "torchaudio" / "__init__.py").write_text("raise OSError('libc10_cuda.so')")
        monkeypatch.syspath_prepend(str(tmp_path))
    else:
        monkeypatch.setitem(sys.modules, "torchaudio", None)
    with pytest.raises(TrainError, match="torchaudio cannot be used here"):
        sources.read(f"torchaudio:LIBRISPEECH:{tmp_path}", True)


def test_noise_is_added_at_the_ratio_asked_for_and_is_the_same_again(folder):
    (folder / "m.jsonl").write_text(json.dumps({"audio_filepath": "a.wav", "text": "one"}))
    (clean,), _ = sources.read(str(folder / "m.jsonl"), True)
    noisy = data.Noisy(clean, 20.0, 0)
    (((text, a),), ((_, b),), ((_, speech),)) = map(heard, ([noisy], [noisy], [clean]))
    assert text == "one"
    assert np.array_equal(a, b)
    noise = a.astype(float) - speech
    ratio = 10 * np.log10((speech.astype(float) ** 2).mean() / (noise**2).mean())
    assert ratio == pytest.approx(20, abs=0.2)
    assert noisy.key() != data.Noisy(clean, 10.0, 0).key()
