"""Accuracy as a benchmark of its own: where float32 stops being enough, and for whom."""

import math

import torch

from . import peers
from .contenders import (
    BETA,
    TEMPERATURE,
    eager_ctc,
    eager_kd,
    evaluate,
    make_inputs,
    ours_ctc,
    ours_kd,
)
from .shapes import Shape


def ctc_against_T(tiny: bool = False, backend: str | None = None) -> list[dict]:
    """Greatest absolute error of a frame's gradient against utterances of T frames."""

    def ours(i, x, reduction):
        return ours_ctc(i, x, reduction, backend)

    points = []
    for T in (25, 50) if tiny else (50, 100, 200, 400, 800, 1600, 3200):
        inputs = make_inputs(Shape("ctc_loss", T, 4, 32, T // 5))
        _, true = evaluate(eager_ctc, inputs.to(torch.float64))
        losses = {"ours": ours, "eager": eager_ctc}
        errors = {n: (evaluate(f, inputs)[1] - true).abs().max().item() for n, f in losses.items()}
        points.append({"T": T} | errors)
    return points


def kd_against_kl(tiny: bool = False, backend: str | None = None) -> list[dict]:
    """Relative error of the summed loss against the true KL of a row, in nats."""
    losses = {
        "ours": lambda i, x: ours_kd(i, x, "sum", backend),
        "eager": lambda i, x: eager_kd(i, x, "sum"),
    }
    if peers.runs("trl", "cpu"):
        losses["trl"] = lambda i, x: peers.trl_divergence(
            i, x, "sum", temperature=TEMPERATURE, beta=BETA
        )
    rows, C = (4, 50) if tiny else (16, 5000)
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(rows, C, generator=g) * 2
    noise = torch.randn(rows, C, generator=g)
    points = []
    for exponent in range(0, -9, -1):
        # KL is about half the variance of the difference of the logits, temperature taken off
        student = teacher + noise * (TEMPERATURE * math.sqrt(2 * 10**exponent))
        inputs = make_inputs(Shape("kd_loss", 1, rows, C))
        inputs = inputs._replace(student=student, teacher=teacher)
        true = true_kl(student.double(), teacher.double())
        scale = TEMPERATURE**2
        errors = {
            n: (f(inputs, student).double() / scale / true - 1).abs().item()
            for n, f in losses.items()
        }
        points.append({"kl": true.item() / rows} | errors)
    return points


def true_kl(student, teacher):
    """Summed KL in float64, every term of which is >= 0: right at any size."""
    log_q, log_p = (x.div(TEMPERATURE).log_softmax(-1) for x in (student, teacher))
    d = log_p - log_q
    return (log_p.exp() * (torch.expm1(-d) + d)).sum()


def accuracy(args) -> dict:
    return {
        "ctc_against_T": ctc_against_T(args.tiny, args.backend),
        "kd_against_kl": kd_against_kl(args.tiny, args.backend),
    }
