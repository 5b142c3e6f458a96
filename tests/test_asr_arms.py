"""What an arm hears and learns from: frames, utterances, delays, masks, streaming."""

import json

import numpy as np
import pytest
import torch
from test_train import TINY

from kdkernels import train
from kdkernels.asr import (
    arms,
    batches,
    bestrq,
    data,
    decode,
    features,
    files,
    losses,
    markdown,
    model,
    report,
    settings,
    teachers,
    training,
)

B, A = 0, 1  # blank, a character


def logits_of(path, confidence=0.9):
    """[T, 3], with this best class of this probability in each frame."""
    rows = torch.full((len(path), 3), (1 - confidence) / 2)
    rows[range(len(path)), path] = confidence
    return rows.log()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"frames": "all"}, [1, 1, 1, 1, 1, 1]),
        ({"frames": "nonblank"}, [0, 0, 1, 0, 0, 1]),
        ({"frames": "neighbours"}, [0, 1, 1, 1, 1, 1]),
        ({"frames": "threshold", "blank_threshold": 0.89}, [0, 0, 1, 0, 0, 1]),
        ({"frames": "threshold", "blank_threshold": 0.91}, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_frames_are_chosen(options, expected):
    weight = losses.frame_weight(logits_of([B, B, A, B, B, A]), settings.Settings(**options))
    assert weight.tolist() == expected


def test_confidence_is_that_of_frames_that_say_something():
    logits = torch.cat([logits_of([B, A], 0.8), logits_of([A, B], 0.6)])
    assert losses.confidence(logits) == pytest.approx(0.7)
    assert losses.confidence(logits_of([B, B])) == 0


def test_a_delayed_teacher():
    logits, weights = losses.delay(torch.arange(6.0).view(3, 2), torch.ones(3), 2)
    assert weights.tolist() == [0, 0, 1]
    assert logits[2].tolist() == [0, 1]
    logits, weights = losses.delay(torch.ones(1, 2), torch.ones(1), 3)
    assert weights.tolist() == [0]


@pytest.mark.parametrize("frames", ["nonblank", "threshold"])
def test_dropping_blanks_without_a_ctc_term_is_warned_of(frames):
    (text,) = settings.warnings(settings.Settings(frames=frames))
    assert "distilled_without_transcripts" in text
    alone = settings.Settings(frames=frames, arms=["alone", "distilled"])
    assert not settings.warnings(alone)
    assert settings.warnings(settings.Settings(frames=frames, ctc_weight=0.0))
    assert not settings.warnings(settings.Settings(frames="neighbours"))


def test_a_streaming_encoder_sees_no_future_but_its_chunk():
    torch.manual_seed(0)
    encoder = model.Encoder(16, 4, 5, 4, 2).eval()
    x = torch.randn(1, 90, features.MELS)
    lengths = torch.tensor([90])
    whole, _ = encoder(x, lengths)
    changed = x.clone()
    changed[:, 48:] = 0  # frame 16 of the logits on: the fifth chunk on
    cut, _ = encoder(changed, lengths)
    torch.testing.assert_close(cut[:, :16], whole[:, :16], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(cut[:, 16:], whole[:, 16:], atol=1e-3)


def test_a_streaming_teacher_does_not_teach_late():
    torch.manual_seed(0)
    late = model.Encoder(16, 2, 3, chunk=4, left=1, shift=2)
    prompt = model.Encoder(16, 2, 3, chunk=4, left=1)
    prompt.load_state_dict(late.state_dict())
    rows = [torch.randn(frames, features.MELS) for frames in (60, 3)]  # 20 and 1 of logits
    dataset = data.Dataset(rows, ["", ""], 1.0, "key", "sha256", [])
    on = training.Machine(torch.device("cpu"), torch.float32)
    as_they_come = dict(teachers.Own(prompt, "ab").logits(dataset, on))
    moved = dict(teachers.Own(late, "ab").logits(dataset, on))
    assert torch.equal(moved[0][:18], as_they_come[0][2:])
    assert torch.equal(moved[0][18:], as_they_come[0][-1:].expand(2, -1))
    assert torch.equal(moved[1], as_they_come[1])


def pool(count, labelled):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(60 + 9 * i, features.MELS, generator=generator) for i in range(count)]
    texts = ["a" * (i + 1) for i in range(count)]
    dataset = data.Dataset(rows, texts, 1.0, "key", "sha256", [])
    logits = [torch.randn(len(row) // 3, 2, generator=generator) for row in rows]
    weights = [(torch.rand(len(row), generator=generator) < 0.5).float() for row in logits]
    return batches.Pool(dataset, data.Alphabet("a") if labelled else None, logits, weights)


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_pieces_of_a_step_add_up_to_it(world, accumulate):
    parts = [(pool(3, True), 0.5), (pool(4, False), 0.5)]
    torch.manual_seed(0)
    encoder = model.Encoder(8, 2, 2)
    chosen = settings.Settings()

    def gradient(sampler):
        encoder.zero_grad()
        for batch in sampler(0):
            logits, lengths = encoder(batch.features, batch.lengths)
            losses.distil(logits, lengths, batch, 0.0, chosen).backward()
        return torch.cat([p.grad.flatten() for p in encoder.parameters()])

    whole = gradient(batches.Sampler(parts, 0, 20.0, 1))
    ranks = [
        gradient(batches.Sampler(parts, 0, 20.0, 1, accumulate, rank, world))
        for rank in range(world)
    ]
    torch.testing.assert_close(torch.stack(ranks).mean(0), whole, rtol=1e-4, atol=1e-6)


def test_masked_frames_are_hidden_and_asked_for():
    (batch,) = batches.Sampler([(pool(4, False), 1.0)], 0, 20.0, 1)(0)
    quantiser = bestrq.Quantiser(0)
    masked = bestrq.mask(batch, quantiser, 3)
    asked = masked.targets >= 0
    T = asked.shape[1]
    assert 0.1 < asked.float().mean() < 0.7
    stacked, before = (
        x[:, : T * model.STACK].reshape(4, T, -1) for x in (masked.features, batch.features)
    )
    assert torch.equal(stacked[~asked], before[~asked])
    assert (stacked[asked] != before[asked]).any(-1).all()
    assert torch.equal(masked.targets[asked], quantiser(before)[asked])
    assert not asked[torch.arange(T) >= (batch.lengths // model.STACK)[:, None]].any()
    part = batch._replace(features=batch.features[1:], lengths=batch.lengths[1:], ids=batch.ids[1:])
    assert torch.equal(bestrq.mask(part, quantiser, 3).targets, masked.targets[1:])
    assert torch.equal(bestrq.Quantiser(0)(before), quantiser(before))


def test_masked_prediction_learns(tmp_path):
    """On a signal that can be predicted, the error of hidden frames falls."""
    t = torch.arange(240.0)[:, None]
    rows = [torch.sin(t / 20 * (1 + torch.arange(features.MELS) / 40)) for _ in range(4)]
    dataset = data.Dataset(rows, [""] * 4, 1.0, "key", "sha256", [])
    torch.manual_seed(0)
    encoder = model.Encoder(32, 2, bestrq.CODES)
    optimizer = torch.optim.Adam(encoder.parameters(), 3e-3)
    sampler = batches.Sampler([(batches.Pool(dataset, None), 1.0)], 0, 10.0, 60)
    values = []
    for step in range(60):
        batch = bestrq.mask(sampler(step)[0], bestrq.Quantiser(0), 1000 * step)
        logits, lengths = encoder(batch.features, batch.lengths)
        loss = losses.masked_prediction(logits, lengths, batch, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert sum(values[-10:]) < 0.5 * sum(values[:10])


def test_every_arm_and_every_teacher(tmp_path, capsys):
    """The full preset, with every option that changes a path of the program."""
    options = ["--preset=full", "--ssl-steps=3", "--frames=nonblank", "--temperature=2"]
    options += ["--divergence=jsd", "--kd-schedule=rise", "--min-confidence=0.01", "--top-k=5"]
    assert train.main([*TINY, *options, "--out", str(tmp_path)]) == 0
    assert "and there is no CTC term to teach blank" in capsys.readouterr().err
    report = json.loads((tmp_path / "report.json").read_text())
    students = {f"student_{name}" for name in arms.ARMS}
    assert report["wer"].keys() == students | {
        "teacher", *(f"teacher_{name}" for name in arms.TEACHERS)
    }  # fmt: skip
    assert report["noisy_wer"].keys() == {"student_distilled", "student_noisy"}
    assert report["loss_ms"]["difference"] < 1e-5
    assert "ssl" in report["curves"]
    for name, shift in (("streaming", 4), ("streaming_alone", 0), ("distilled", 0)):
        encoder, _ = model.read_encoder(tmp_path / f"student_{name}.safetensors")
        assert encoder.shift == shift


def test_no_utterance_that_the_teacher_is_sure_of(tmp_path, capsys):
    assert train.main([*TINY, "--min-confidence=0.99", "--out", str(tmp_path)]) == 2
    assert "lower --min-confidence" in capsys.readouterr().err


def test_no_utterance_in_which_the_teacher_hears_a_word(tmp_path, capsys):
    """A teacher of weights 0 says blank alone, of all classes the first; one with a space, that."""
    text = "--arms=alone,distilled,pseudo_labels"
    characters = " abcdefghijklmnopqrstuvwxyz"
    for best in (0, 1 + characters.index(" ")):
        encoder = model.Encoder(8, 2, 1 + len(characters))
        tensors = {name: torch.zeros_like(x) for name, x in encoder.state_dict().items()}
        tensors["head.bias"][best] = 9
        path, out = tmp_path / f"{best}.safetensors", tmp_path / f"out-{best}"
        files.save_tensors(path, tensors, "", shape=encoder.shape, alphabet=characters)
        arguments = [*TINY, text, "--teachers", str(path), "--cache", str(tmp_path / "cache")]
        assert train.main([*arguments, "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert "the teacher hears nothing in any utterance of the untranscribed set" in said
        assert not (out / "student_pseudo_labels.safetensors").exists()


def test_an_error_rate_over_seeds_is_never_below_zero():
    def of(seed, wer):
        rates = {"wer": {"a": wer}, "cer": {"a": wer}, "noisy_wer": {}}
        intervals = {
            f"{name}_interval": {k: [x, x] for k, x in r.items()} for name, r in rates.items()
        }
        times = {name: {} for name in ("loss_ms", "step_ms", "real_time_factor", "seconds")}
        return (
            rates
            | intervals
            | times
            | {"relative_reduction": 0.0, "relative_reduction_interval": [0.0, 0.0]}
            | {"behind_transcribed": wer - 100, "behind_transcribed_interval": [0.0, 0.0]}
            | {"steps_to_alone_wer": None, "seconds_to_alone_wer": None}
            | {"alone_best": {}, "curves": {}, "settings": {"seed": seed}}
        )

    together = report.over_seeds([of(0, 90.0), of(1, 140.0)])
    low, high = together["wer_interval"]["a"]
    assert low == 0
    assert high > 140
    assert together["behind_transcribed"] == 15
    low, high = together["behind_transcribed_interval"]  # standard error 25, Student's t 12.71
    assert (low, high) == (pytest.approx(15 - 317.75), pytest.approx(15 + 317.75))


def test_the_difference_of_two_rates_is_over_the_same_utterances():
    drawn = decode.resamples(4, 0)
    sizes = np.array([10, 10, 10, 10])
    a = decode.Errors(np.array([9, 1, 5, 2]), sizes)
    b = decode.Errors(np.array([8, 0, 4, 1]), sizes)  # everywhere one error of ten less
    assert decode.difference_interval(a, b, drawn) == pytest.approx([10, 10])


def test_a_change_that_rounds_to_zero_has_no_sign():
    assert [markdown.signed(x) for x in (0.3, -0.3, 35.4, -2.0)] == ["0", "0", "-35", "+2"]
    points = [markdown.points(x) for x in (0.04, -0.04, 1.26, -1.8)]
    assert points == ["+0.0", "+0.0", "+1.3", "-1.8"]
