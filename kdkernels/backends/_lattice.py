"""The CTC lattice of the reference backend: forward, backward and Viterbi recursions, in log space.

Vectorised over utterances and states, a loop over frames; float64 whatever the dtype of the logits.
"""

import math

import torch
import torch.nn.functional as F

INF = math.inf
NAN = math.nan


class Lattice:
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
        repeats = (inside[:, 1:] & (labels[:, 1:] == labels[:, :-1])).sum(-1)
        self.fits = frames >= counts + repeats  # else no path, whatever the frames hold

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
        log_z = torch.where(self.fits, log_z, -INF)
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
        occupancy[:, :, self.blank] = fixed_sum(gamma[:, :, 0::2])
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
        score = torch.where(self.bad, NAN, torch.where(self.fits, score, -INF))
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


def fixed_sum(x):
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
