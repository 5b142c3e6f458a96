"""Every operator in plain torch: the definition the other backends are tested against, on any
device.

Arithmetic is float64 inside, whatever the dtype of the logits, and nothing is left to autograd:
gradients are written out (softmax minus occupancy), so that infeasible targets and masked classes
come out as documented. The only loop is over frames. Sums run in a fixed order, so that no result
depends on threads or on the batch.
"""

import math

import torch

from ._lattice import Lattice, fixed_sum

INF = math.inf
NAN = math.nan


def supports(device_type):
    return True


def scale_grad_(grad, grad_loss):
    """`grad` [*, C] times `grad_loss`, in place: a scalar, or one for each row or utterance."""
    # With a dim of its own the factor keeps its float32: a scale of 65536 is infinite in float16.
    return grad.mul_(grad_loss.unsqueeze(-1))


# ------------------------------------------------------------------------------------------ kd_loss


@torch.no_grad()
def kd_loss_forward(
    student_logits,
    teacher_logits,
    weight,
    temperature,
    teacher_temperature,
    divergence,
    beta,
    reduction,
    rescale,
    student_grad,
    teacher_grad,
):
    rows = student_logits.shape[:-1]
    if weight is None:
        weight = torch.ones(rows, dtype=torch.float64, device=student_logits.device)
    weight = weight.double().reshape(-1)
    loss, grad_student, grad_teacher = _divergence(
        student_logits.reshape(-1, student_logits.shape[-1]),
        teacher_logits.reshape(-1, teacher_logits.shape[-1]),
        weight,
        temperature,
        teacher_temperature,
        divergence,
        beta,
        rescale,
    )
    scale = torch.ones((), dtype=torch.float64, device=weight.device)
    if reduction == "none":
        loss = loss.reshape(rows)
    else:
        loss = fixed_sum(loss)
        if reduction == "mean":
            scale = _inverse(fixed_sum(weight))
        elif reduction == "batchmean":
            scale = scale / max(rows[0], 1)
        loss = loss * scale
    return (
        loss.to(_loss_dtype(student_logits, teacher_logits)),
        _like(grad_student * scale, student_logits) if student_grad else None,
        _like(grad_teacher * scale, teacher_logits) if teacher_grad else None,
    )


def _divergence(student, teacher, weight, temperature, teacher_temperature, name, beta, rescale):
    """Weighted divergence of each row [R] and its gradients [R, C], all float64; rows of weight 0
    are not read."""
    used = (weight != 0).unsqueeze(-1)
    student = torch.where(used, student.double(), 0.0)
    teacher = torch.where(used, teacher.double(), 0.0)
    log_s = torch.log_softmax(student / temperature, -1)
    log_t = torch.log_softmax(teacher / teacher_temperature, -1)
    if name == "forward_kl":
        loss, grad_t, grad_s = _kl(log_t, log_s)
    elif name == "reverse_kl":
        loss, grad_s, grad_t = _kl(log_s, log_t)
    else:
        loss, grad_s, grad_t = _jsd(log_s, log_t, beta)

    factor = (weight * (temperature**2 if rescale else 1.0)).unsqueeze(-1)
    nan_row = loss.isnan().unsqueeze(-1)

    def finish(grad, logits, temperature):
        grad = torch.where(logits == -INF, 0.0, grad * (factor / temperature))
        return torch.where(used, torch.where(nan_row, NAN, grad), 0.0)

    loss = torch.where(used.squeeze(-1), loss * factor.squeeze(-1), 0.0)
    return loss, finish(grad_s, student, temperature), finish(grad_t, teacher, teacher_temperature)


def _kl(log_p, log_q):
    """KL(p || q) of each row and its gradients with respect to the logits of p and of q."""
    d = torch.where(log_p == log_q, 0.0, log_p - log_q)
    p, q = log_p.exp(), log_q.exp()
    loss = _kl_value(p, q, d)
    # Where the divergence is infinite (q masks a class that p uses) p gets no gradient, q its
    # finite one.
    u = torch.where((p == 0) | (loss == INF).unsqueeze(-1), 0.0, d - loss.unsqueeze(-1))
    return loss, p * u, torch.where(d.abs() < 1, p * torch.expm1(-d.clamp(-1, 1)), q - p)


def _kl_value(p, q, d):
    """sum p·d as sum p·(expm1(-d) + d), d = log p - log q: each term is >= 0, so no digit is lost
    where d is small."""
    e = d.clamp(-1, 1)
    series = 1 / 720 - e / 5040
    for k in (120, 24, 6, 2):
        series = 1 / k - e * series
    near = torch.where(e.abs() < 0.01, e * e * series, torch.expm1(-e) + e)
    far = torch.where(p == 0, q, q - p + p * d)
    return fixed_sum(torch.where(d.abs() < 1, p * near, far))


def _jsd(log_s, log_t, beta):
    """beta·KL(t || m) + (1 - beta)·KL(s || m), m = beta·t + (1 - beta)·s; gradients s·(u - E_s
    u)."""
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    d = torch.where(log_t == log_s, 0.0, log_t - log_s)
    near = d.abs() < 1
    e = d.clamp(-1, 1)
    m = log_m.exp()
    total, grads = 0.0, []
    for log_p, other, share in (
        (log_s, beta * torch.expm1(e), 1 - beta),
        (log_t, (1 - beta) * torch.expm1(-e), beta),
    ):
        p = log_p.exp()
        a = torch.where(near, -torch.log1p(other), log_p - log_m)  # log p - log m
        a = torch.where(log_p == -INF, -INF, a)
        a = torch.where(log_m == -INF, 0.0, a)
        u = torch.where(p == 0, 0.0, a)
        grads.append(share * p * (u - fixed_sum(p * u).unsqueeze(-1)))
        total = total + share * _kl_value(p, m, a)
    return total, *grads


# ----------------------------------------------------------------------------------------- ctc_loss


@torch.no_grad()
def ctc_loss_forward(
    logits, targets, input_lengths, target_lengths, blank, reduction, zero_infinity, grad
):
    lattice = Lattice(logits, targets, input_lengths, target_lengths, blank)
    loss, gradient = lattice.loss(zero_infinity, grad)
    scale = torch.ones_like(loss)
    if reduction == "mean":
        scale = scale / (lattice.target_lengths.clamp(min=1) * max(len(loss), 1))
    if reduction != "none":
        loss = fixed_sum(loss * scale)
    return (
        loss.to(_loss_dtype(logits)),
        _like(gradient * scale.unsqueeze(-1), logits) if grad else None,
    )


@torch.no_grad()
def ctc_posteriors(logits, targets, input_lengths, target_lengths, blank):
    lattice = Lattice(logits, targets, input_lengths, target_lengths, blank)
    log_z, occupancy = lattice.forward_backward()
    occupancy = torch.where(lattice.valid & log_z.isnan().unsqueeze(-1), NAN, occupancy)
    return occupancy.to(_loss_dtype(logits))


@torch.no_grad()
def ctc_align(logits, targets, input_lengths, target_lengths, blank):
    lattice = Lattice(logits, targets, input_lengths, target_lengths, blank)
    scores, paths = lattice.viterbi()
    return paths, scores.to(_loss_dtype(logits))


# -------------------------------------------------------------------------------------- ctc_kd_loss


@torch.no_grad()
def ctc_kd_loss_forward(
    student_logits,
    teacher_logits,
    targets,
    input_lengths,
    target_lengths,
    labelled,
    frame_weight,
    blank,
    reduction,
    zero_infinity,
    ctc_weight,
    kd_weight,
    temperature,
    teacher_temperature,
    divergence,
    beta,
    rescale,
    student_grad,
    teacher_grad,
):
    T, N, C = student_logits.shape
    lattice = Lattice(student_logits, targets, input_lengths, target_lengths, blank, labelled)
    ctc, grad_ctc = lattice.loss(zero_infinity, student_grad)
    if labelled is None:
        labelled = torch.ones_like(lattice.bad)
    ctc = torch.where(labelled, ctc, 0.0)
    ctc_scale = labelled.double()

    weight = lattice.valid.squeeze(-1).double()
    if frame_weight is not None:
        weight = torch.where(lattice.valid.squeeze(-1), frame_weight.double(), 0.0)
    kd, grad_kd, grad_teacher = _divergence(
        student_logits.reshape(-1, C),
        teacher_logits.reshape(-1, C),
        weight.reshape(-1),
        temperature,
        teacher_temperature,
        divergence,
        beta,
        rescale,
    )
    kd = torch.where(lattice.bad, NAN, fixed_sum(kd.reshape(T, N).t()))
    kd_scale = torch.ones((), dtype=torch.float64, device=kd.device)
    if reduction == "mean":
        ctc_scale = (
            ctc_scale * _inverse(fixed_sum(labelled.double())) / lattice.target_lengths.clamp(min=1)
        )
        kd_scale = _inverse(fixed_sum(weight.reshape(-1)))
    if reduction != "none":
        ctc, kd = fixed_sum(torch.where(labelled, ctc * ctc_scale, 0.0)), fixed_sum(kd) * kd_scale
    loss = torch.zeros_like(kd)
    if ctc_weight:  # a term of weight 0 is absent, even where it is infinite
        loss = loss + ctc_weight * ctc
    if kd_weight:
        loss = loss + kd_weight * kd

    grad_student = None
    if student_grad:
        grad_student = torch.zeros_like(grad_ctc)
        if ctc_weight:
            part = grad_ctc * (ctc_weight * ctc_scale).unsqueeze(-1)
            grad_student += torch.where(labelled.unsqueeze(-1), part, 0.0)
        if kd_weight:
            grad_student += grad_kd.reshape(T, N, C) * (kd_weight * kd_scale)
        grad_student = _like(grad_student, student_logits)
    if teacher_grad and kd_weight:
        grad_teacher = _like(grad_teacher * (kd_weight * kd_scale), teacher_logits)
    elif teacher_grad:
        grad_teacher = torch.zeros_like(teacher_logits)
    dtype = _loss_dtype(student_logits, teacher_logits)
    return (
        loss.to(dtype),
        ctc.to(dtype),
        kd.to(dtype),
        grad_student,
        grad_teacher if teacher_grad else None,
    )


# ------------------------------------------------------------------------------------------ helpers


def _loss_dtype(*logits):
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


def _like(grad, logits):
    """`grad` in the shape, dtype and memory layout of `logits`, rounded once."""
    return torch.empty_like(logits).copy_(grad.reshape(logits.shape))


def _inverse(x):
    return torch.where(x == 0, 0.0, 1 / x)
