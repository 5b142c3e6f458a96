"""Every operator in plain torch: the definition the other backends are tested against, on any
device.

Arithmetic is float64 inside, whatever the dtype of the logits, and nothing is left to autograd:
gradients are written out (softmax minus occupancy), so that infeasible targets and masked classes
come out as documented. The only loop is over frames. Sums run in a fixed order, so that no result
depends on threads or on the batch.
"""

import math

import torch
import torch.nn.functional as F

INF = math.inf
NAN = math.nan


def supports(op, device_type):
    return True


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
        loss = _sum(loss)
        if reduction == "mean":
            scale = _inverse(_sum(weight))
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
    return _sum(torch.where(d.abs() < 1, p * near, far))


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
        grads.append(share * p * (u - _sum(p * u).unsqueeze(-1)))
        total = total + share * _kl_value(p, m, a)
    return total, *grads


# ----------------------------------------------------------------------------------------- ctc_loss


@torch.no_grad()
def ctc_loss_forward(
    logits, targets, input_lengths, target_lengths, blank, reduction, zero_infinity, grad
):
    lattice = _Lattice(logits, targets, input_lengths, target_lengths, blank)
    loss, gradient = lattice.loss(zero_infinity, grad)
    scale = torch.ones_like(loss)
    if reduction == "mean":
        scale = scale / (lattice.target_lengths.clamp(min=1) * max(len(loss), 1))
    if reduction != "none":
        loss = _sum(loss * scale)
    return (
        loss.to(_loss_dtype(logits)),
        _like(gradient * scale.unsqueeze(-1), logits) if grad else None,
    )


@torch.no_grad()
def ctc_posteriors(logits, targets, input_lengths, target_lengths, blank):
    lattice = _Lattice(logits, targets, input_lengths, target_lengths, blank)
    log_z, occupancy = lattice.forward_backward()
    occupancy = torch.where(lattice.valid & log_z.isnan().unsqueeze(-1), NAN, occupancy)
    return occupancy.to(_loss_dtype(logits))


@torch.no_grad()
def ctc_align(logits, targets, input_lengths, target_lengths, blank):
    lattice = _Lattice(logits, targets, input_lengths, target_lengths, blank)
    scores, paths = lattice.viterbi()
    return paths, scores.to(_loss_dtype(logits))


class _Lattice:
    """Labels with blanks between them: states l in [0, 2S+1), emissions [T, N, 2S+1] in float64
    log space."""

    def __init__(self, logits, targets, input_lengths, target_lengths, blank, labelled=None):
        self.T, self.N, self.C = T, N, C = logits.shape
        device = logits.device
        frames_given, labels_given = input_lengths.long(), target_lengths.long()
        S = targets.shape[1] if targets.dim() == 2 else (int(labels_given.max()) if N else 0)
        S = max(S, 0)
        self.input_lengths = frames = frames_given.clamp(0, T)
        self.target_lengths = counts = labels_given.clamp(0, S)
        # Only on a device whose values the public function does not read can these differ.
        self.bad = (frames != frames_given) | (counts != labels_given)
        if labelled is not None:
            counts = torch.where(labelled, counts, 0)

        k = torch.arange(S, device=device)
        inside = k < counts.unsqueeze(-1)  # [N, S]
        if targets.dim() == 2:
            labels = targets.long()
        elif len(targets):
            first = self.target_lengths.cumsum(0) - self.target_lengths
            self.bad = self.bad | (first + self.target_lengths > len(targets))
            labels = targets.long()[(first.unsqueeze(-1) + k).clamp(max=len(targets) - 1)]
        else:
            labels = torch.zeros((N, S), dtype=torch.long, device=device)
        wrong = inside & ((labels < 0) | (labels >= C) | (labels == blank))
        self.bad = self.bad | wrong.any(-1)
        labels = torch.where(inside & ~wrong, labels, blank)

        self.counts, self.S, self.blank = counts, S, blank
        self.states = torch.full((N, 2 * S + 1), blank, dtype=torch.long, device=device)
        self.states[:, 1::2] = labels
        self.skip = torch.zeros((N, 2 * S + 1), dtype=torch.bool, device=device)
        self.skip[:, 3::2] = labels[:, 1:] != labels[:, :-1]
        state = torch.arange(2 * S + 1, device=device)
        end = 2 * counts.unsqueeze(-1)
        self.start_mask = (state < 2).expand(N, -1)
        self.end_mask = (state == end) | (state == end - 1)  # [N, L]

        self.valid = (torch.arange(T, device=device).unsqueeze(-1) < frames).unsqueeze(
            -1
        )  # [T, N, 1]
        self.log_probs = torch.log_softmax(torch.where(self.valid, logits.double(), 0.0), -1)
        self.emissions = self.log_probs.gather(2, self.states.expand(T, -1, -1))

    def loss(self, zero_infinity, grad):
        """-log p of each utterance [N] and its own gradient [T, N, C], unscaled."""
        log_z, occupancy = self.forward_backward() if grad else (self.forward()[0], None)
        loss = torch.where(log_z == -INF, 0.0 if zero_infinity else INF, -log_z)
        if not grad:
            return loss, None
        gradient = torch.where(
            self.valid & (log_z != -INF).unsqueeze(-1), self.log_probs.exp() - occupancy, 0.0
        )
        return loss, torch.where(self.valid & loss.isnan().unsqueeze(-1), NAN, gradient)

    def forward(self):
        """log p [N] and log alpha [T, N, 2S+1], the emission of frame t included."""
        log_z = torch.where(self.counts == 0, 0.0, -INF).double()  # of an utterance without frames
        alpha = torch.where(self.start_mask, 0.0, -INF).double()
        alphas = []
        for t in range(self.T):
            if t:
                skip = torch.where(self.skip, _shift(alpha, 2), -INF)
                alpha = _log_sum_exp(alpha, _shift(alpha, 1), skip)
            alpha = alpha + self.emissions[t]
            alphas.append(alpha)
            final = torch.where(self.end_mask, alpha, -INF)
            log_z = torch.where(
                self.input_lengths == t + 1, _log_sum_exp(*_last_two(final, self.counts)), log_z
            )
        return torch.where(self.bad, NAN, log_z), alphas

    def forward_backward(self):
        """log p [N] and occupancies [T, N, C]; 0 where the target cannot be aligned."""
        log_z, alphas = self.forward()
        occupancy = torch.zeros_like(self.log_probs)
        if not self.T or not self.N:
            return log_z, occupancy
        possible = (log_z != -INF).unsqueeze(-1)
        end = torch.where(self.end_mask, 0.0, -INF).double()
        beta = torch.full_like(end, -INF)
        gammas = [None] * self.T
        skip_from_here = F.pad(self.skip, (0, 2))[:, 2:]
        for t in reversed(range(self.T)):
            if t + 1 < self.T:
                ahead = beta + self.emissions[t + 1]
                skip = torch.where(skip_from_here, _shift(ahead, -2), -INF)
                beta = _log_sum_exp(ahead, _shift(ahead, -1), skip)
            beta = torch.where((self.input_lengths == t + 1).unsqueeze(-1), end, beta)
            log_gamma = alphas[t] + beta - torch.where(possible, log_z.unsqueeze(-1), 0.0)
            gammas[t] = torch.where(possible & self.valid[t], log_gamma.exp(), 0.0)
        gamma = torch.stack(gammas)
        occupancy[:, :, self.blank] = _sum(gamma[:, :, 0::2])
        labels = self.states[:, 1::2]
        for k in range(self.S):  # one label at a time: equal labels add up in a fixed order
            index = labels[:, k : k + 1].expand(self.T, -1, -1)
            occupancy.scatter_add_(2, index, gamma[:, :, 2 * k + 1 : 2 * k + 2])
        return log_z, occupancy

    def viterbi(self):
        """Log-probability of the best path [N] and the path itself [N, T], -1 where there is none.

        Ties: stay in the state, then come from the one before, then skip; at the end, the last
        blank.
        """
        score = torch.where(self.counts == 0, 0.0, -INF).double()
        state = 2 * self.counts
        delta = torch.where(self.start_mask, 0.0, -INF).double()
        moves, best_state = [], state
        for t in range(self.T):
            if t:
                skip = torch.where(self.skip, _shift(delta, 2), -INF)
                candidates = torch.stack([delta, _shift(delta, 1), skip])
                delta = candidates.amax(0)
                moves.append(
                    torch.where(
                        candidates[0] == delta, 0, torch.where(candidates[1] == delta, 1, 2)
                    )
                )
            delta = delta + self.emissions[t]
            blank, label = _last_two(torch.where(self.end_mask, delta, -INF), self.counts)
            here = self.input_lengths == t + 1
            score = torch.where(here, torch.maximum(blank, label), score)
            best_state = torch.where(
                here, torch.where(blank >= label, state, state - 1), best_state
            )
        score = torch.where(self.bad, NAN, score)
        paths = torch.full((self.N, self.T), -1, dtype=torch.long, device=score.device)
        possible = score > -INF  # False for nan
        state = torch.where(possible, best_state, 0)
        for t in reversed(range(self.T)):
            label = self.states.gather(1, state.unsqueeze(-1)).squeeze(-1)
            inside = possible & (t < self.input_lengths)
            paths[:, t] = torch.where(inside, label, -1)
            if t:
                move = moves[t - 1].gather(1, state.unsqueeze(-1)).squeeze(-1)
                state = torch.where(inside, state - move, state)
        return score, paths


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
    lattice = _Lattice(student_logits, targets, input_lengths, target_lengths, blank, labelled)
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
    kd = torch.where(lattice.bad, NAN, _sum(kd.reshape(T, N).t()))
    kd_scale = torch.ones((), dtype=torch.float64, device=kd.device)
    if reduction == "mean":
        ctc_scale = (
            ctc_scale * _inverse(_sum(labelled.double())) / lattice.target_lengths.clamp(min=1)
        )
        kd_scale = _inverse(_sum(weight.reshape(-1)))
    if reduction != "none":
        ctc, kd = _sum(torch.where(labelled, ctc * ctc_scale, 0.0)), _sum(kd) * kd_scale
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
    if teacher_grad:
        grad_teacher = _like(grad_teacher * (kd_weight * kd_scale), teacher_logits)
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


def _sum(x):
    """Sum over the last dim, by halves: a fixed order, whatever the threads and the other dims."""
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x.squeeze(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])


def _shift(x, k):
    """x[..., l - k], -inf from outside."""
    size = x.shape[-1]
    return (
        F.pad(x, (k, 0), value=-INF)[..., :size]
        if k > 0
        else F.pad(x, (0, -k), value=-INF)[..., -k:]
    )


def _last_two(x, counts):
    """x [N, 2S+1] at each utterance's last blank and at its last label (-inf where there is
    none)."""
    last = 2 * counts.unsqueeze(-1)
    label = x.gather(1, (last - 1).clamp(min=0)).squeeze(-1)
    return x.gather(1, last).squeeze(-1), torch.where(counts == 0, -INF, label)


def _log_sum_exp(*terms):
    top = terms[0]
    for x in terms[1:]:
        top = torch.maximum(top, x)
    top = torch.where(top == -INF, 0.0, top)
    return top + sum((x - top).exp() for x in terms).log()
