"""Every error has one form: the operator, the argument, what was expected, what was given."""

import functools

import numpy as np
import pytest
import torch
from helpers import problem, randn

import kdkernels
from kdkernels import _checks

OPS = ("kd_loss", "ctc_loss", "ctc_kd_loss", "ctc_posteriors", "ctc_align")
CTC = ("ctc_loss", "ctc_posteriors", "ctc_align", "ctc_kd_loss")
pytestmark = pytest.mark.large  # the checks come before a backend is chosen
P = problem(T=12, N=3, C=7, S=4, seed=1)


def call(on, op, logits=P.logits, targets=P.targets, input_lengths=P.input_lengths,
         target_lengths=P.target_lengths, **options):  # fmt: skip
    logits = logits.to(on.device) if isinstance(logits, torch.Tensor) else logits
    first = (logits, logits) if op == "ctc_kd_loss" else (logits,)
    return getattr(on, op)(*first, targets, input_lengths, target_lengths, **options)


def lengths(values, which):
    full = {"input_lengths": [12, 12, 12], "target_lengths": [4, 4, 4]}
    return {**full, which: values}


@pytest.mark.parametrize("op", CTC)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"blank": 7}, ValueError, r"expected `blank` in \[0, 7\), got 7"),
        ({"blank": -1}, ValueError, r"expected `blank` in \[0, 7\), got -1"),
        ({"blank": 0.5}, TypeError, r"expected `blank` to be an integer, got float"),
        ({"logits": [1.0]}, TypeError, r"expected `(student_)?logits` to be a tensor, got list"),
        ({"logits": P.logits.long()}, TypeError, r"expected `(student_)?logits` of dtype .*int64"),
        ({"logits": P.logits[None]}, ValueError, r"expected `(student_)?logits` of 2 or 3 dims"),
        ({"logits": P.logits[..., :0]}, ValueError, r"expected `(student_)?logits` with at least"),
        ({"targets": [[1, 2]]}, TypeError, r"expected `targets` to be a tensor, got list"),
        ({"targets": P.targets.float()}, TypeError, r"expected `targets` of an integer dtype"),
        ({"targets": P.targets > 2}, TypeError, r"expected `targets` of an integer dtype"),
        ({"targets": P.targets[None]}, ValueError, r"expected `targets` of 1 or 2 dims"),
        (
            {"targets": P.targets[:2]},
            ValueError,
            r"expected `targets` of 3 rows, got shape \(2, 4\)",
        ),
        ({"targets": P.targets[0]}, ValueError, r"`targets` to hold sum\(target_lengths\) = \d+ "),
        ({"input_lengths": [12, 12]}, ValueError, r"expected `input_lengths` of shape \(3,\)"),
        ({"input_lengths": 12}, ValueError, r"expected `input_lengths` of shape \(3,\)"),
        ({"input_lengths": [1.5, 2, 3]}, TypeError, r"expected `input_lengths` to be integers"),
        ({"input_lengths": None}, TypeError, r"`input_lengths` to be integers, got None"),
        (
            {"logits": P.logits.to_sparse()},
            ValueError,
            r"`(student_)?logits` to be dense, got torch.sparse_coo",
        ),
        ({"input_lengths": torch.ones(3)}, TypeError, r"`input_lengths` of an integer dtype"),
        ({"targets": P.targets.to_sparse()}, ValueError, r"expected `targets` to be dense, got"),
        ({"batch_first": "no"}, TypeError, r"expected `batch_first` to be True or False, got 'no'"),
        ({"batch_first": None}, TypeError, r"expected `batch_first` to be True or False, got None"),
        ({"backend": "no"}, ValueError, r"expected `backend` in .*, got 'no'"),
    ],
)
def test_ctc_arguments(on, op, arguments, error, message):
    with pytest.raises(error, match=f"^{op}: .*{message.removeprefix('expected ')}"):
        # A partial with another backend: the keyword of the call wins.
        call(on, op, **arguments)


@pytest.mark.parametrize("op", CTC)
@pytest.mark.parametrize(
    ("which", "values", "limit"),
    [
        ("input_lengths", [12, 13, 1], 12),
        ("input_lengths", [12, -1, 1], 12),
        ("target_lengths", [4, 5, 0], 4),
        ("target_lengths", [4, -2, 0], 4),
    ],
)
@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_lengths_out_of_range(on, op, which, values, limit, kind):
    message = rf"^{op}: expected `{which}` in \[0, {limit}\], got {values[1]} \(utterance 1\)"
    with pytest.raises(ValueError, match=message):
        call(on, op, **{k: kind(v) for k, v in lengths(values, which).items()})


@pytest.mark.parametrize("op", CTC)
@pytest.mark.parametrize("blank", [0, 3, 6])
@pytest.mark.parametrize("wrong", [-1, 7, 100, "blank"])
@pytest.mark.parametrize("shape", ["padded", "concatenated"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_labels_out_of_range(on, op, blank, wrong, shape, dtype):
    labels = torch.tensor([c for c in range(7) if c != blank])
    targets = labels[torch.randint(6, (3, 4), generator=torch.Generator().manual_seed(2))]
    value = blank if wrong == "blank" else wrong
    targets[1, 2] = value
    targets = targets.to(dtype)
    counts = [4, 3, 2]
    call(on, op, targets=targets, target_lengths=[4, 2, 4], input_lengths=[12] * 3, blank=blank)
    if shape == "concatenated":
        targets = torch.cat([row[:n] for row, n in zip(targets, counts, strict=True)])
    message = (
        rf"^{op}: expected `targets` in \[0, 7\) and other than blank \({blank}\), got {value} "
        r"\(utterance 1\)$"
    )
    with pytest.raises(ValueError, match=message):
        call(on, op, targets=targets, target_lengths=counts, input_lengths=[12] * 3, blank=blank)


@pytest.mark.parametrize("op", CTC)
def test_batch_first_is_suggested(on, op):
    logits = torch.zeros(3, 12, 7)  # [N, T, C], for targets [N, S]
    with pytest.raises(ValueError, match=r"of 12 rows, .* give batch_first=True$"):
        call(on, op, logits=logits)


@pytest.mark.parametrize("op", ["ctc_loss", "ctc_kd_loss"])
def test_ctc_reduction(on, op):
    with pytest.raises(ValueError, match=rf"^{op}: expected `reduction` in .*, got 'batchmean'"):
        call(on, op, reduction="batchmean")


S, T = randn(2, 3, 5), randn(2, 3, 5, seed=1)


@pytest.mark.parametrize("op", ["kd_loss", "ctc_kd_loss"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, r"expected `temperature` > 0, got 0.0"),
        ({"temperature": -1}, ValueError, r"expected `temperature` > 0, got -1.0"),
        (
            {"temperature": float("nan")},
            ValueError,
            r"expected `temperature` to be finite, got nan",
        ),
        (
            {"temperature": float("inf")},
            ValueError,
            r"expected `temperature` to be finite, got inf",
        ),
        (
            {"temperature": torch.tensor(2.0)},
            TypeError,
            r"expected `temperature` to be a number, got a tensor \(temperature.item\(\) is one\)",
        ),
        ({"rescale": "no"}, TypeError, r"expected `rescale` to be True or False, got 'no'"),
        ({"temperature": "2"}, TypeError, r"expected `temperature` to be a number, got str"),
        ({"teacher_temperature": 0}, ValueError, r"expected `teacher_temperature` > 0, got 0.0"),
        ({"divergence": "kl"}, ValueError, r"expected `divergence` in .*, got 'kl'"),
        ({"divergence": "jsd", "beta": 0.0}, ValueError, r"expected `beta` in \(0, 1\), got 0.0"),
        ({"divergence": "jsd", "beta": 1}, ValueError, r"expected `beta` in \(0, 1\), got 1.0"),
        ({"reduction": "average"}, ValueError, r"expected `reduction` in .*, got 'average'"),
    ],
)
def test_distillation_options(on, op, options, error, message):
    def kd_loss():
        return on.kd_loss(S.to(on.device), T.to(on.device), **options)

    run = kd_loss if op == "kd_loss" else functools.partial(call, on, op, **options)
    with pytest.raises(error, match=f"^{op}: {message}"):
        run()


def test_numbers_may_be_numpy_s(on):
    student, teacher = S.to(on.device), T.to(on.device)
    expected = on.kd_loss(student, teacher, temperature=2.0)
    for two in (np.float32(2), np.float64(2), np.int64(2)):
        assert on.kd_loss(student, teacher, temperature=two) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "options", "error", "message"),
    [
        (
            S,
            T[:1],
            {},
            ValueError,
            r"expected `teacher_logits` of shape \(2, 3, 5\), got \(1, 3, 5\)",
        ),
        (S, T[..., :4], {}, ValueError, r"expected `teacher_logits` of shape"),
        (S, T.int(), {}, TypeError, r"expected `teacher_logits` of dtype float32"),
        (S, 1.0, {}, TypeError, r"expected `teacher_logits` to be a tensor, got float"),
        (S.bool(), T, {}, TypeError, r"expected `student_logits` of dtype float32"),
        (
            torch.tensor(1.0),
            T,
            {},
            ValueError,
            r"expected `student_logits` with at least one class",
        ),
        (S, T, {"weight": torch.ones(3, 2)}, ValueError, r"expected `weight` of shape \(2, 3\)"),
        (S, T, {"weight": torch.ones(2, 3).int()}, TypeError, r"expected `weight` of a bool or"),
        (S, T, {"weight": [1.0]}, TypeError, r"expected `weight` to be a tensor, got list"),
        (
            S,
            T,
            {"weight": torch.ones(2, 3, requires_grad=True)},
            ValueError,
            r"expected `weight` without requires_grad",
        ),
        (S[0, 0], T[0, 0], {"reduction": "batchmean"}, ValueError, r"`student_logits` of 2 dims"),
    ],
)
def test_kd_loss_arguments(on, student, teacher, options, error, message):
    def move(x):
        return x.detach().to(on.device).requires_grad_(x.requires_grad) if torch.is_tensor(x) else x

    with pytest.raises(error, match=f"^kd_loss: .*{message.removeprefix('expected ')}"):
        on.kd_loss(move(student), move(teacher), **{k: move(v) for k, v in options.items()})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"labelled": torch.ones(3)}, TypeError, r"expected `labelled` of dtype bool"),
        ({"labelled": torch.ones(2).bool()}, ValueError, r"expected `labelled` of shape \(3,\)"),
        ({"labelled": "all"}, TypeError, r"expected `labelled` to be a bool tensor, got 'all'"),
        ({"labelled": [None] * 3}, TypeError, r"expected `labelled` to be a bool tensor, got \[No"),
        (
            {"frame_weight": torch.ones(12, 3).to_sparse()},
            ValueError,
            r"expected `frame_weight` to be dense, got torch.sparse_coo",
        ),
        (
            {"frame_weight": torch.ones(3, 12)},
            ValueError,
            r"expected `frame_weight` of shape \(12, 3\)",
        ),
        (
            {"kd_weight": 2},
            ValueError,
            r"expected `kd_weight` in \[0, 1\] where `ctc_weight` is not given, got 2.0",
        ),
        (
            {"kd_weight": -1},
            ValueError,
            r"expected `kd_weight` in \[0, 1\] where `ctc_weight` is not given, got -1.0",
        ),
        (
            {"zero_infinity": "no"},
            TypeError,
            r"expected `zero_infinity` to be True or False, got 'no'",
        ),
        ({"kd_weight": "1"}, TypeError, r"expected `kd_weight` to be a number, got str"),
        ({"ctc_weight": float("inf")}, ValueError, r"expected `ctc_weight` to be finite, got inf"),
    ],
)
def test_ctc_kd_loss_options(on, options, error, message):
    options = {k: v.to(on.device) if torch.is_tensor(v) else v for k, v in options.items()}
    with pytest.raises(error, match=f"^ctc_kd_loss: {message}"):
        call(on, "ctc_kd_loss", **options)


@pytest.mark.parametrize("op", ["ctc_loss", "ctc_kd_loss"])
@pytest.mark.parametrize("name", ["targets", "input_lengths", "target_lengths"])
def test_tensors_without_values(on, op, name):
    nothing = torch.ones((3, 4) if name == "targets" else 3, dtype=torch.long, device="meta")
    with pytest.raises(ValueError, match=f"^{op}: expected `{name}` with values, got a tensor on"):
        call(on, op, **{name: nothing})


def test_nested_tensors(on):
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
    with pytest.raises(ValueError, match="expected `student_logits` to be dense, got a nested"):
        on.kd_loss(nested, nested)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kdkernels.KDLoss(temperature=-2), "KDLoss: expected `temperature` > 0, got -2"),
        (lambda: kdkernels.KDLoss(reduction="x"), "KDLoss: expected `reduction` in .*, got 'x'"),
        (lambda: kdkernels.CTCLoss(backend="no"), "CTCLoss: expected `backend` in .*, got 'no'"),
        (
            lambda: kdkernels.CTCKDLoss(reduction="batchmean"),
            "CTCKDLoss: expected `reduction` in .*, got 'batchmean'",
        ),
        (
            lambda: kdkernels.CTCKDLoss(divergence="l2"),
            "CTCKDLoss: expected `divergence` in .*, got 'l2'",
        ),
        (
            lambda: kdkernels.CTCKDLoss(kd_weight=2),
            r"CTCKDLoss: expected `kd_weight` in \[0, 1\] where `ctc_weight` is not given, got 2.0",
        ),
        (
            lambda: kdkernels.CTCLoss(blank="_"),
            "CTCLoss: expected `blank` to be an integer, got str",
        ),
        (
            lambda: kdkernels.KDLoss(rescale="no"),
            "KDLoss: expected `rescale` to be True or False, got 'no'",
        ),
        (
            lambda: kdkernels.CTCLoss(batch_first=None),
            "CTCLoss: expected `batch_first` to be True or False, got None",
        ),
    ],
)
def test_modules_check_options_when_made(make, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        make()


def test_available_names_public_operators():
    with pytest.raises(ValueError, match=r"expected `op` in \['ctc_align', .*'kd_loss'\], got 'x'"):
        kdkernels.available("x")


def test_another_device(on):
    other = torch.device("meta")
    x = S.to(on.device)
    with pytest.raises(ValueError, match=r"^kd_loss: expected `teacher_logits` on .*, got meta"):
        on.kd_loss(x, T.to(other))
    with pytest.raises(ValueError, match=r"^kd_loss: expected `weight` on .*, got meta"):
        on.kd_loss(x, T.to(on.device), weight=torch.ones(2, 3, device=other))


def test_environment_variable_is_named(monkeypatch):
    monkeypatch.setenv("KDKERNELS_BACKEND", "nonsense")
    with pytest.raises(
        ValueError, match=r"expected KDKERNELS_BACKEND in \[.*'cpp', .*'reference'.*\]"
    ):
        kdkernels.kd_loss(P.logits, P.logits)


def test_concatenated_targets_are_padded_on_their_way_to_a_device():
    """Of those whose lengths are at hand: kernels would have to reckon with one that has all."""
    targets, lengths = torch.tensor([5, 6, 1, 2, 3]), torch.tensor([2, 0, 3])
    padded, _, same = _checks.to_device("cpu", targets, torch.tensor([9, 9, 9]), lengths)
    assert padded.shape == (3, 3)
    assert padded[0, :2].tolist() == [5, 6]
    assert padded[2].tolist() == [1, 2, 3]
    assert torch.equal(same, lengths)
    none = torch.zeros(2, dtype=torch.long)
    assert _checks.to_device("cpu", targets[:0], none, none)[0].shape == (2, 0)
    assert _checks.to_device("cpu", targets[:0], none[:0], none[:0])[0].shape == (0, 0)
    rows = torch.ones(3, 4, dtype=torch.long)
    assert _checks.to_device("cpu", rows, lengths, lengths)[0] is rows
