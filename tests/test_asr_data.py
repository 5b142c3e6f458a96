"""Audio, features, batches, decoding."""

import numpy as np
import pytest
import soundfile
import torch

from kdkernels.asr import (
    audio,
    batches,
    data,
    decode,
    features,
    model,
    options,
    settings,
    sources,
)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 15999, 44101])
def test_resampling_keeps_a_tone(rate):
    seconds = np.arange(rate // 2) / rate
    tone = np.sin(2 * np.pi * 440 * seconds).astype(np.float32)
    out = audio.resample(tone, rate)
    expected = np.sin(2 * np.pi * 440 * np.arange(len(out)) / audio.SAMPLE_RATE)
    assert abs(len(out) - audio.SAMPLE_RATE // 2) <= 1
    np.testing.assert_allclose(out[200:-200], expected[200:-200], atol=2e-3)


def test_resampling_removes_what_would_alias():
    seconds = np.arange(22050) / 22050
    tone = np.sin(2 * np.pi * 10500 * seconds).astype(np.float32)
    assert np.abs(audio.resample(tone, 22050)[200:-200]).max() < 0.01


def test_resampling_needs_little_memory_at_any_rate(monkeypatch):
    """Rates that share no factor would need a filter for each sample of a second."""
    made = []
    sinc = audio._sinc
    monkeypatch.setattr(audio, "_sinc", lambda *a: made.append(sinc(*a)) or made[-1])
    for rate in (44100, 44101, 767999):
        made.clear()
        audio.resample(np.zeros(1000, np.float32), rate)
        assert max(kernel.numel() for kernel in made) <= audio.FILTERS


def test_noise_has_the_ratio_asked_for():
    rng = np.random.default_rng(0)
    speech = rng.standard_normal(16000, np.float32)
    noise = audio.add_noise(speech, 20.0, 1.0, rng) - speech
    assert 10 * np.log10((speech**2).mean() / (noise**2).mean()) == pytest.approx(20, abs=1e-3)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_stereo_of_any_rate_is_read_as_mono_at_16_khz(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.full((44100, 2), [0.5, 0.25]), 44100)
    samples = audio.mono(*audio.decode(path))
    assert samples.dtype == np.int16
    assert samples.shape == (16000,)
    assert samples[8000] == pytest.approx(0.375 * 32767, abs=40)


def test_channels_that_cancel_each_other_are_heard():
    rng = np.random.default_rng(0)
    one, other = rng.uniform(-1, 1, (2, 8000)).astype(np.float32)
    nothing = np.zeros_like(one)
    for second in (-one, -0.95 * one, 0.03 * other - one):
        mixed, cancel = audio.mix(np.stack([nothing, one, second], 1))
        assert cancel
        np.testing.assert_array_equal(mixed, one)
    for channels in ([one], [one, one], [one, other], [one, *[nothing] * 5], [nothing, nothing]):
        mixed, cancel = audio.mix(np.stack(channels, 1))
        assert not cancel
        np.testing.assert_allclose(mixed, np.mean(channels, 0), atol=1e-6)
    assert np.abs(audio.mono(np.stack([one, -one], 1), audio.SAMPLE_RATE)).max() > 30000


@pytest.mark.parametrize("loudness", [0.5, 1.0, 1.5, 32768.0])
def test_samples_beyond_one_are_not_cut_off(loudness):
    tone = np.sin(2 * np.pi * 440 * np.arange(1, 8001) / audio.SAMPLE_RATE)  # reaches 1
    samples = audio.mono((loudness * tone).astype(np.float32)[:, None], audio.SAMPLE_RATE)
    np.testing.assert_allclose(samples, min(loudness, 1.0) * 32767 * tone, atol=1)


def test_features_are_normalised_and_loudness_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(16000, generator=generator) * 4000
    loud, soft = (features.log_mel((samples * g).short()).float() for g in (1.0, 0.25))
    assert loud.shape == (101, features.MELS)
    torch.testing.assert_close(loud.mean(0), torch.zeros(features.MELS), atol=1e-2, rtol=0)
    torch.testing.assert_close(loud.std(0), torch.ones(features.MELS), atol=2e-2, rtol=0)
    torch.testing.assert_close(loud, soft, atol=0.05, rtol=0)


@pytest.mark.parametrize("samples", [1, 200, 511])
def test_features_of_a_blink_of_audio_are_finite(samples):
    assert features.log_mel(torch.ones(samples, dtype=torch.int16)).isfinite().all()


def test_spec_augment_hides_some_and_changes_nothing_else():
    x = torch.rand(3, 100, features.MELS) + 1
    lengths = torch.tensor([100, 100, 50])
    y = features.spec_augment(x, lengths, torch.Generator().manual_seed(0))
    hidden = y == 0
    assert 0 < hidden.float().mean() < 0.6
    assert torch.equal(y[~hidden], x[~hidden])
    generator = torch.Generator().manual_seed(0)
    part = features.spec_augment(x[1:, :60], lengths[1:], generator, torch.tensor([1, 2]))
    assert torch.equal(y[1:, :60][:, :50], part[:, :50])  # however the step is shared out


def test_a_schedule_keeps_its_budget_and_hears_everything():
    lengths = [100 + 37 * i % 300 for i in range(300)]
    plan = batches.schedule(lengths, 0, 30.0, 60)
    assert plan == batches.schedule(lengths, 0, 30.0, 60)
    assert plan[:20] == batches.schedule(lengths, 0, 30.0, 20)
    assert all(max(lengths[i] for i in b) * len(b) <= 3000 for b in plan)
    assert {i for batch in plan for i in batch} == set(range(300))


def test_logits_do_not_depend_on_the_padding():
    torch.manual_seed(0)
    encoder = model.Encoder(16, 3, 5).eval()
    x = torch.randn(2, 90, features.MELS)
    lengths = torch.tensor([90, 60])
    together, T = encoder(x, lengths)
    alone, _ = encoder(x[1:, :60], lengths[1:])
    assert T.tolist() == [30, 20]
    torch.testing.assert_close(together[1, :20], alone[0], atol=1e-5, rtol=1e-5)


def test_a_text_too_long_for_its_audio_is_known():
    frames = torch.zeros(3 * model.STACK, features.MELS)
    assert not batches.unalignable("abc", frames)
    assert batches.unalignable("aba b", frames)
    assert batches.unalignable("abb", frames)


def test_greedy_decoding_merges_repeats_and_drops_blanks():
    alphabet = data.Alphabet.of(["ab", "b a"])
    assert alphabet.characters == " ab"
    path = torch.tensor([[0, 2, 2, 0, 2, 3, 0], [3, 3, 0, 0, 2, 2, 2]])
    logits = torch.nn.functional.one_hot(path, len(alphabet)).float()
    assert decode.greedy(logits, torch.tensor([7, 3]), alphabet) == ["aab", "b"]
    assert alphabet.decode(alphabet.encode("b a?").tolist()) == "b a"


def test_error_rates_and_their_intervals():
    references, hypotheses = ["a b c d", "e f"], ["a x c", "e f"]
    words = decode.word_errors(references, hypotheses)
    assert words.percent() == pytest.approx(100 * 2 / 6)
    assert decode.character_errors(["abcd"], ["abd"]).percent() == pytest.approx(25)
    drawn = decode.resamples(2, 0)
    low, high = decode.interval(words, drawn)
    assert low == 0
    assert high == pytest.approx(50)
    assert decode.reduction_interval(words, words, drawn)[0] <= 0


def test_text_is_normalised():
    assert sources.normalise("  Don't STOP_me, \u00c9lan  42! ") == "don't stop me \u00e9lan 42"
    assert sources.normalise("don\u2019t u\u0308ber") == "don't \u00fcber"
    hindi = "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e"
    assert sources.normalise(f"{hindi}\u0964") == hindi
    assert sources.normalise("\u0e17\u0e35\u0e48, \u0645\u06cc\u200c\u0631") == (
        "\u0e17\u0e35\u0e48 \u0645\u06cc\u0631"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher-steps", "0"], "--teacher-steps must be greater than 0, got 0"),
        (["--untranscribed-share", "1"], "--untranscribed-share must be in (0, 1), got 1.0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--min-confidence", "1"], "--min-confidence must be in [0, 1), got 1.0"),
        (["--blank-threshold", "2"], "--blank-threshold must be in (0, 1], got 2.0"),
        (
            ["--student-width=90", "--arms=alone,distilled,streaming"],
            "--student-width must be a multiple of 4, the heads of the attention of streaming, "
            "got 90",
        ),
        (["--learning-rate=-1e-3"], "--learning-rate must be greater than 0, got -0.001"),
        (["--kd-weight", "nan"], "--kd-weight must be a number (float), got nan"),
        (["--seeds", "two"], "--seeds must be a number (int), got two"),
        (["--arms", "distilled"], "--arms must have alone"),
        (["--test", "a.jsonl"], "own data needs --transcribed, --untranscribed and --test"),
    ],
)
def test_settings_that_make_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        options.parse(arguments)
    error = " ".join(capsys.readouterr().err.split())
    assert message in error


def test_a_switch_in_a_settings_file_is_true_or_false(tmp_path, capsys):
    config = tmp_path / "settings.yaml"
    config.write_text("skip_bad: true")
    assert options.parse(["--config", str(config)]).skip_bad
    config.write_text("skip_bad: 7")
    with pytest.raises(SystemExit, match="2"):
        options.parse(["--config", str(config)])
    assert "--skip-bad must be true or false, got 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"learning_rate: null", "--learning-rate has no value; give one, or leave it out"),
        (b"skip_bad: null", "--skip-bad has no value"),
        (b"arms: null", "--arms has no value"),
        (b"transcribed: 3", "--transcribed must be text, in quotes, got 3"),
        (b"teacher_steps: many", "--teacher-steps must be a number (int), got many"),
        (b"\xff\xfe", "settings.yaml cannot be read: 'utf-8' codec"),
    ],
)
def test_a_settings_file_that_makes_no_sense(tmp_path, capsys, content, message):
    config = tmp_path / "settings.yaml"
    config.write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        options.parse(["--config", str(config)])
    assert message in capsys.readouterr().err


def test_help_shows_defaults_as_they_are_written(capsys):
    with pytest.raises(SystemExit, match="0"):
        options.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: )" not in text
    assert "learn from; see below (default: own)" in text
    assert "(default: 48.0)" in text


def test_presets_are_overridden_by_options():
    parsed = options.parse(["--preset", "quick", "--teacher-steps", "7"])
    assert parsed.teacher_steps == 7
    assert parsed.student_steps == settings.PRESETS["quick"]["student_steps"]
