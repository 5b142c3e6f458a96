"""Problems, and expected values that come from definitions and from torch's double, never from
kdkernels."""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


def rng(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, scale=1.0, dtype=torch.float64):
    return (scale * torch.randn(shape, generator=rng(seed), dtype=torch.float64)).to(dtype)


# ---------------------------------------------------------------------------------------------- CTC


class Problem(NamedTuple):
    logits: torch.Tensor  # [T, N, C] float64
    targets: torch.Tensor  # [N, S]
    input_lengths: torch.Tensor
    target_lengths: torch.Tensor

    @property
    def rest(self):
        return self[1:]

    def to(self, device, dtype):
        logits, *rest = self
        return Problem(logits.to(dtype).to(device), *(x.to(device) for x in rest))


REGIMES = (
    "normal",
    "wide",
    "peaked",
    "blank_collapsed",
    "trained",
    "shifted",
    "tight",
    "extreme",
)


def problem(T=30, N=3, C=12, S=6, regime="normal", seed=0, full=False):
    """A CTC problem that can be aligned, blank 0; lengths vary unless `full`."""
    g = rng(seed)
    targets = torch.randint(1, C, (N, S), generator=g)
    target_lengths = torch.full((N,), S)
    if not full and N > 1:
        target_lengths[1:] = torch.randint(0, S + 1, (N - 1,), generator=g)
    needed = torch.tensor(
        [frames_needed(t, n) for t, n in zip(targets, target_lengths, strict=True)]
    )
    if regime == "tight":
        T = int(needed.max())
        input_lengths = needed.clone()
    else:
        assert needed.max() <= T
        input_lengths = torch.full((N,), T)
        if not full and N > 1:
            room = torch.rand(N - 1, generator=g)
            input_lengths[1:] = needed[1:] + (room * (T - needed[1:] + 1)).long().clamp(max=T)
            input_lengths = torch.minimum(input_lengths, torch.tensor(T))
    logits = torch.randn((T, N, C), generator=g, dtype=torch.float64)
    if regime == "wide":
        logits *= 3
    elif regime == "peaked":
        logits *= 20
    elif regime == "extreme":
        logits = torch.where(logits > 0, 256.0, -256.0).double()
    elif regime == "blank_collapsed":
        logits[:, :, 0] = math.log(0.999 / 0.001) + math.log(C - 1) + 0.5
    elif regime in ("trained", "shifted"):
        for n in range(N):
            t_n = int(input_lengths[n])
            path = some_path(targets[n, : target_lengths[n]].tolist(), t_n, g)
            if regime == "shifted":
                path = path.roll(t_n // 3)
            logits[torch.arange(t_n), n, path] += 14
    return Problem(logits, targets, input_lengths, target_lengths)


def frames_needed(target, length):
    labels = target[: int(length)].tolist()
    return len(labels) + sum(a == b for a, b in itertools.pairwise(labels))


def some_path(labels, T, g):
    """A random path of T frames for the labels, blank 0."""
    path = []
    for before, label in zip([None, *labels], labels, strict=False):
        path += ([0] if label == before else []) + [label]
    while len(path) < T:
        at = int(torch.randint(0, len(path) + 1, (1,), generator=g))
        path.insert(at, path[at - 1] if at and at % 2 else (path[at] if at < len(path) else 0))
    return torch.tensor(path, dtype=torch.long)


def ctc_oracle(p, reduction="sum", blank=0, zero_infinity=False):
    """Loss and gradient from torch's double, which is right wherever the loss is finite."""
    logits = p.logits.detach().double().cpu().contiguous().requires_grad_()
    rest = [x.cpu().long() for x in p.rest]
    losses = F.ctc_loss(logits.log_softmax(-1), *rest, blank, "none", zero_infinity)
    finite = losses.isfinite()
    grads = torch.zeros_like(logits)
    scale = torch.ones_like(losses)
    if reduction == "mean":
        scale = 1 / (rest[2].clamp(min=1).double() * len(losses))
    if finite.any():
        (grads,) = torch.autograd.grad((losses * scale)[finite].sum(), logits)
        grads = torch.where(finite[:, None], grads, 0.0)
    losses = losses.detach()
    return (losses if reduction == "none" else (losses * scale).sum()), grads


def collapse(path, blank):
    return [c for c, _ in itertools.groupby(path) if c != blank]


def enumerate_paths(log_probs, target, blank):
    """{path: log-probability} over every path of `target`; log_probs [T][C] nested lists."""
    T, C = len(log_probs), len(log_probs[0])
    paths = itertools.product(range(C), repeat=T)
    return {
        path: sum(log_probs[t][c] for t, c in enumerate(path))
        for path in paths
        if collapse(path, blank) == target
    }


# ----------------------------------------------------------------------------------------------- KD


def kd_oracle(
    s,
    t,
    *,
    temperature=1.0,
    teacher_temperature=None,
    divergence="forward_kl",
    beta=0.5,
    weight=None,
    reduction="mean",
    rescale=True,
):
    """Loss and both gradients from the definition, in float64 and torch's autograd."""
    s = s.detach().double().cpu().requires_grad_()
    t = t.detach().double().cpu().requires_grad_()
    log_s = F.log_softmax(s / temperature, -1)
    log_t = F.log_softmax(t / (teacher_temperature or temperature), -1)

    def kl(a, b):
        return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    if divergence == "forward_kl":
        rows = kl(log_t, log_s)
    elif divergence == "reverse_kl":
        rows = kl(log_s, log_t)
    else:
        log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log(1 - beta))
        rows = beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)
    if rescale:
        rows = rows * temperature**2
    w = torch.ones_like(rows) if weight is None else weight.double().cpu()
    rows = rows * w
    if reduction == "none":
        loss = rows
    elif reduction == "sum":
        loss = rows.sum()
    elif reduction == "batchmean":
        loss = rows.sum() / s.shape[0]
    else:
        loss = rows.sum() / w.sum()
    return (loss.detach(), *torch.autograd.grad(loss.sum(), (s, t)))


def strided(x, layout):
    """The values of `x` with other strides; a leading dim is never the fastest."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "padded":  # rows further apart than they are long
        wide = torch.full(
            (*x.shape[:-1], x.shape[-1] + 3), math.nan, dtype=x.dtype, device=x.device
        )
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if layout == "transposed":  # the leading dims swapped in memory
        return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 2 else x.contiguous()
    if layout == "sliced":  # every second row of a larger tensor
        twice = torch.full((2 * x.shape[0], *x.shape[1:]), math.nan, dtype=x.dtype, device=x.device)
        twice[::2] = x
        return twice[::2]
    assert layout == "classes_first"  # the last stride is not 1
    return x.transpose(-1, 0).contiguous().transpose(-1, 0)


LAYOUTS = ("contiguous", "padded", "transposed", "sliced", "classes_first")
