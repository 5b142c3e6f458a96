"""The whole program on seconds of audio; what it says when something is wrong."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from safetensors.torch import load_file

from kdkernels import train
from kdkernels.asr.report import FILES

MODELS = (
    "teacher",
    "student_alone",
    "student_distilled",
    "student_distilled_without_transcripts",
    "student_transcribed",
)
TINY = [
    *("--transcribed-utterances=6", "--untranscribed-utterances=6", "--dev-utterances=2"),
    *("--test-utterances=4", "--student-transcripts=3", "--teacher-steps=4", "--student-steps=4"),
    *("--eval-every=2", "--batch-seconds=12", "--teacher-width=16", "--teacher-layers=2"),
    *("--student-width=8", "--student-layers=2", "--workers=1", "--checkpoint-every=1"),
]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("run") / "out"
    assert train.main([*TINY, "--out", str(folder)]) == 0
    return folder


def times(folder):
    files = [*folder.glob("*.safetensors"), *(folder / "cache").iterdir()]
    return {path.name: path.stat().st_mtime_ns for path in files}


def again(out, capsys, *arguments):
    """Run in the same folder; returns what was said on stderr."""
    capsys.readouterr()
    assert train.main([*TINY, "--out", str(out), *arguments]) == 0
    return capsys.readouterr().err


def test_a_run_writes_models_and_a_report(out):
    names = {path.name for path in out.iterdir()}
    models = {f"{name}.{suffix}" for name in MODELS for suffix in ("safetensors", "jsonl")}
    written = {".lock", "cache", "checkpoints", "settings.yaml", *FILES}
    assert names == models | written
    vtt = (out / "captions.vtt").read_text()
    assert vtt.startswith("WEBVTT")
    assert soundfile.info(out / "captions.wav").duration > 4  # a second after each of four
    report = json.loads((out / "report.json").read_text())
    for table in ("wer", "cer", "wer_interval", "parameters", "curves", "step_ms"):
        assert report[table].keys() == set(MODELS)
    for name in MODELS:
        low, high = report["wer_interval"][name]
        assert low <= report["wer"][name] <= high
        assert [point["step"] for point in report["curves"][name]] == [2, 4]
    behind = report["wer"][MODELS[3]] - report["wer"][MODELS[4]]
    low, high = report["behind_transcribed_interval"]
    assert low <= report["behind_transcribed"] <= high
    assert report["behind_transcribed"] == pytest.approx(behind)
    assert report["loss_ms"]["fused"] > 0
    assert report["loss_ms"]["torch"] > 0
    assert report["loss_ms"]["difference"] < 1e-5
    assert len(report["corpus"]["sha256"]) == 64
    for name in ("wer", "loss"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.md").read_text()
    assert "student distilled" in page
    assert f"everything transcribed: {round(behind, 1) + 0:+} points (interval " in page
    assert "never with LibriSpeech" in page


def test_the_same_command_again_does_no_stage_twice(out, capsys):
    before, written = times(out), {name: (out / name).read_bytes() for name in FILES}
    assert again(out, capsys) == ""
    assert times(out) == before
    assert {name: (out / name).read_bytes() for name in FILES} == written
    (out / "report.json").write_text("{}")
    assert again(out, capsys) == ""
    report, same = json.loads(written["report.json"]), json.loads((out / "report.json").read_text())
    assert same.pop("loss_ms") != report.pop("loss_ms")  # measured anew
    for table in ("real_time_factor", "seconds"):
        del report[table], same[table]
    assert same == report


def test_the_same_seed_gives_the_same_models(out, tmp_path):
    assert train.main([*TINY, "--out", str(tmp_path)]) == 0
    corpus = [json.loads((o / "report.json").read_text())["corpus"] for o in (out, tmp_path)]
    assert corpus[0] == corpus[1]
    for name in MODELS:
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (out, tmp_path))
        assert all((a[key] == b[key]).all() for key in a)


def altered(content, at=0.6):
    """One bit of it is another."""
    changed = bytearray(content)
    changed[int(at * len(content))] ^= 4
    return bytes(changed)


@pytest.mark.parametrize("kind", ["truncated", "altered", "foreign", "empty", "missing"])
@pytest.mark.parametrize("pattern", ["logits-*", "features-*"])
def test_a_cache_that_cannot_be_used_is_made_again(out, capsys, kind, pattern):
    path, other = sorted((out / "cache").glob(pattern))[:2]
    good = path.read_bytes()
    content = {"truncated": good[: len(good) // 2], "foreign": other.read_bytes(), "empty": b""}
    content["altered"] = altered(good)
    path.unlink()
    if kind in content:
        path.write_bytes(content[kind])
    said = again(out, capsys)
    assert path.read_bytes() == good
    if kind in content:
        assert f"{path} " in said
        assert "made again" in said


def test_a_student_of_another_size_leaves_the_teacher_alone(out, capsys):
    before = times(out)
    again(out, capsys, "--student-width", "12")
    changed = {name for name, time in times(out).items() if before.get(name) != time}
    assert changed == {f"{name}.safetensors" for name in MODELS[1:]}
    again(out, capsys)


def test_from_the_command_line_no_bar_where_there_is_no_terminal(out):
    command = [sys.executable, "-W", "error", "-m", "kdkernels.train", *TINY, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "# Distillation report" in done.stdout


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_nobody_reads_what_it_says(out, tmp_path, closed):
    """As `python -m kdkernels.train ... | head -1` does: the training goes on."""
    shutil.copytree(out, tmp_path / "out")
    for path in (tmp_path / "out" / "report.md", tmp_path / "out" / "student_alone.safetensors"):
        path.write_text("")  # which is told on stderr
    command = [sys.executable, "-m", "kdkernels.train", *TINY, "--out", str(tmp_path / "out")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as process:
        getattr(process, closed).close()
        other = process.stderr if closed == "stdout" else process.stdout
        said = other.read()
        assert process.wait(120) == 0
    assert "Broken" not in said
    same = (out / "student_alone.safetensors").read_bytes()
    assert (tmp_path / "out" / "student_alone.safetensors").read_bytes() == same
    assert "# Distillation report" in (tmp_path / "out" / "report.md").read_text()


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    text = capsys.readouterr().out
    for word in ("--preset", "--seed", "--out", "--transcribed", "audio_filepath"):
        assert word in text
    assert "<function" not in text


def test_importing_kdkernels_needs_none_of_this():
    extras = {"kdkernels.asr", "espeakng_loader", "jiwer", "soundfile"}
    code = f"import sys, kdkernels; assert not {extras} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---- own data ------------------------------------------------------------------------------------


def write_manifest(folder, name, entries):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.fixture
def recordings(tmp_path):
    """Manifests of six files of noise, wav and flac, 22,050 and 16,000 Hz."""
    rng = np.random.default_rng(0)
    entries = []
    for i in range(6):
        rate = (16000, 22050)[i % 2]
        name = f"a{i}." + ("wav", "flac")[i // 2 % 2]
        soundfile.write(tmp_path / name, 0.1 * rng.standard_normal(2 * rate), rate)
        entries.append({"audio_filepath": name, "duration": 2.0, "text": f"Hello, world {i}!"})
    untranscribed = [{"audio_filepath": e["audio_filepath"]} for e in entries]
    flags = []
    for name in ("transcribed", "untranscribed", "test"):
        path = write_manifest(tmp_path, name, untranscribed if name[0] == "u" else entries)
        flags += [f"--{name}", str(path)]
    return tmp_path, entries, [*TINY, "--out", str(tmp_path / "out"), *flags]


def test_own_recordings(recordings):
    folder, _, arguments = recordings
    assert train.main(arguments) == 0
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["corpus"]["utterances"] == {
        "transcribed": 5, "student": 3, "untranscribed": 6, "dev": 1, "test": 6
    }  # fmt: skip
    assert report["corpus"]["hours"]["test"] == pytest.approx(12 / 3600)
    assert "LibriSpeech" not in (folder / "out" / "report.md").read_text()
    assert train.main([*arguments, "--dev", str(folder / "test.jsonl")]) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 3: not JSON: Expecting property name"),
        ("[1, 2]", "line 3: not a JSON object but [1, 2]; expected e.g."),
        ('"a0.wav"', 'line 3: not a JSON object but "a0.wav"; expected e.g.'),
        ('{"text": "a"}', "line 3: `audio_filepath` is missing; expected e.g."),
        ('{"audio_filepath": "a0.wav"}', "line 3: `text` is missing; expected e.g."),
        ('{"audio_filepath": 7, "text": "a"}', "line 3: `audio_filepath` is not text"),
        ('{"audio_filepath": "a0.wav", "text": 7}', "line 3: `text` is not text but 7"),
        ('{"audio_filepath": "a0.wav", "text": "..."}', "line 3: `text` has no word"),
        ('{"audio_filepath": "a0.wav", "text": "a", "duration": "x"}', "`duration` is not a"),
        ('{"audio_filepath": "a0.wav", "text": "a", "duration": [1]}', "`duration` is not a"),
        ('{"audio_filepath": "a0.wav", "text": "a", "duration": NaN}', "must be seconds from 0 on"),
        ('{"audio_filepath": "a0.wav", "text": "a", "duration": 1, "offset": -1}', "from 0 on"),
        ('{"audio_filepath": "a0.wav", "text": "a", "offset": 1}', "`offset` needs a `duration`"),
        ('{"audio_filepath": "no.wav", "text": "a"}', "no.wav; fix its path"),
        (
            '{"audio_filepath": "a0.wav", "text": "a", "duration": 9}',
            "a0.wav has 2.0 s, but `duration` promises 9.0 s",
        ),
        ('{"audio_filepath": "empty.wav", "text": "a"}', "empty.wav holds no audio"),
        ('{"audio_filepath": "nothing.wav", "text": "a"}', "nothing.wav cannot be read as audio"),
        ('{"audio_filepath": "text.wav", "text": "a"}', "text.wav cannot be read as audio"),
        (
            '{"audio_filepath": "cut.wav", "text": "a"}',
            "cut.wav is truncated: its header promises more",
        ),
        (
            '{"audio_filepath": "cut.flac", "text": "a"}',
            "cut.flac is truncated: its header promises more",
        ),
        ('{"audio_filepath": ".", "text": "a"}', "cannot be read as audio"),
    ],
)
def test_a_bad_line_is_named_before_the_work_begins(recordings, capsys, line, message):
    folder, entries, arguments = recordings
    soundfile.write(folder / "empty.wav", np.zeros(0), 16000)
    (folder / "nothing.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is no audio" * 100)
    (folder / "cut.wav").write_bytes((folder / "a0.wav").read_bytes()[:20000])
    (folder / "cut.flac").write_bytes((folder / "a2.flac").read_bytes()[:20000])
    path = folder / "transcribed.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries[:2]) + line + "\n")
    assert train.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert "transcribed.jsonl, line 3" in said
    assert not list((folder / "out").rglob("*.safetensors"))


def test_samples_that_are_no_numbers(recordings, capsys):
    folder, entries, arguments = recordings
    samples = np.full(32000, 0.1, "f4")
    samples[31000] = np.nan
    soundfile.write(folder / "nan.wav", samples, 16000, subtype="FLOAT")
    write_manifest(folder, "untranscribed", [entries[0], {"audio_filepath": "nan.wav"}])
    assert train.main(arguments) == 2
    said = capsys.readouterr().err
    assert f"untranscribed.jsonl, line 2: {folder / 'nan.wav'} holds samples that are not" in said
    assert train.main([*arguments, "--skip-bad"]) == 0
    assert "warning: 1 of 2 lines" in capsys.readouterr().err
    report = (folder / "out" / "report.md").read_text()
    assert "left out: 1 of the untranscribed set" in report
    assert "left out: 0" not in report


def test_audio_that_is_damaged_in_the_middle(recordings, capsys):
    folder, _, arguments = recordings
    content = bytearray((folder / "a2.flac").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 500] = 500 * b"U"
    (folder / "a2.flac").write_bytes(content)
    assert train.main(arguments) == 2
    assert f"transcribed.jsonl, line 3: {folder / 'a2.flac'} cannot" in capsys.readouterr().err
    assert train.main([*arguments, "--skip-bad"]) == 0
    report = json.loads((folder / "out" / "report.json").read_text())["corpus"]
    assert report["skipped"] == {"transcribed": 1, "untranscribed": 1, "test": 1}
    assert report["utterances"]["test"] == 5


def test_recordings_of_nothing_are_warned_of(recordings, capsys):
    folder, _, arguments = recordings
    for name in ("a0.wav", "a1.wav"):
        soundfile.write(folder / name, np.zeros(32000), 16000)
    assert train.main(arguments) == 0
    said = capsys.readouterr().err.splitlines()
    silent = "recordings of the {} set are silent from end to end; are they the right files?"
    splits = ("transcribed", "untranscribed", "test")
    assert said == [f"warning: 2 of 6 {silent.format(split)}" for split in splits]


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00"])
def test_a_manifest_that_cannot_be_used(recordings, capsys, content):
    folder, _, arguments = recordings
    (folder / "test.jsonl").unlink()
    if content is not None:
        (folder / "test.jsonl").write_bytes(content)
    assert train.main(arguments) == 2
    assert f"{folder / 'test.jsonl'}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train.main([*TINY, "--out", str(tmp_path / "file" / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: cannot write into the folder {tmp_path / 'file' / 'out'}: ")
    assert "--out" in said


@pytest.mark.parametrize(
    "missing",
    ["espeakng_loader", "jiwer", "jsonargparse", "matplotlib", "safetensors", "soundfile", "tqdm"],
)
def test_a_missing_package_is_named(tmp_path, missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from kdkernels import train\n"
        f"sys.exit(train.main({[*TINY, '--out', str(tmp_path)]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert 'pip install "kdkernels[train]"' in done.stderr
    assert "Traceback" not in done.stderr
    assert missing.replace("_", "-") in done.stderr.replace("_", "-")
