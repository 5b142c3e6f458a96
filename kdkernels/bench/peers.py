"""Other libraries' losses, and why one that is not compared is not.

A peer gets its inputs in its own layout and arrays, made outside the time that is measured.
"""

import functools
import importlib
import importlib.metadata

import torch
import torch.nn.functional as F

# Name -> package, the modules that must be importable, and what is compared.
PEERS = {
    "optax": ("optax", ("optax", "jax"), "ctc_loss under jit, value and gradient"),
    "liger": (
        "liger-kernel",
        ("liger_kernel.transformers.functional",),
        "KL and JSD on log-probabilities, with the log_softmax they need",
    ),
    "torchaudio": ("torchaudio", ("torchaudio",), "forced_align, one utterance after another"),
}

# Peers that have no row in this table, whatever is installed.
NOT_COMPARED = {
    "fla": "its fused KL starts from hidden states and takes no temperature: another problem",
    "k2": "no wheel on PyPI for this Python",
}


@functools.cache
def status() -> dict[str, dict[str, str | None]]:
    """Name of a peer -> its version, or None and the reason why there is no row of it."""
    result = {"trl": {"version": "1.16.0", "why_not": None}}  # written down below
    for name, (package, modules, _) in PEERS.items():
        try:
            version = importlib.metadata.version(package)
            for module in modules:
                importlib.import_module(module)
        except importlib.metadata.PackageNotFoundError:
            result[name] = {"version": None, "why_not": "not installed"}
        except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: an ABI check
            why = f"{type(error).__name__} when it is imported"
            result[name] = {"version": None, "why_not": why}
        else:
            result[name] = {"version": version, "why_not": None}
    if result["liger"]["version"] and not torch.cuda.is_available():
        result["liger"]["why_not"] = "imports, but its Triton kernels need a GPU"
    result |= {n: {"version": None, "why_not": why} for n, why in NOT_COMPARED.items()}
    return result


# ---- kd_loss: (inputs, student logits, reduction) -> loss


def trl_divergence(i, x, reduction="batchmean", *, temperature, beta):
    """The torch lines of TRL's distillation loss, times temperature squared as here.

    Source: trl 1.16.0, GKDTrainer.generalized_jsd_loss (trl/experimental/gkd/gkd_trainer.py);
    written down because the package asks for transformers, datasets and accelerate.
    """
    log_q = F.log_softmax(x / temperature, dim=-1)
    log_p = F.log_softmax(i.teacher / temperature, dim=-1)
    if i.divergence == "forward_kl":  # TRL's beta = 0
        loss = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    else:
        weight = torch.tensor(beta, dtype=x.dtype, device=x.device)
        log_m = torch.logsumexp(
            torch.stack([log_q + torch.log1p(-weight), log_p + torch.log(weight)]), dim=0
        )
        of_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
        of_student = F.kl_div(log_m, log_q, reduction="none", log_target=True)
        loss = weight * of_teacher + (1 - weight) * of_student
    divisor = len(x) if reduction == "batchmean" else 1
    return loss.sum() / divisor * temperature**2


def liger_runs(device: str) -> bool:
    return device == "cuda" and status()["liger"]["why_not"] is None


def liger_divergence(i, x, reduction="batchmean", *, temperature, beta):
    from liger_kernel.transformers import functional as liger

    log_q = F.log_softmax(x / temperature, -1)
    if i.divergence == "forward_kl":
        p = F.softmax(i.teacher / temperature, -1)
        loss = liger.liger_kl_div(log_q, p, reduction=reduction)
    else:
        loss = liger.liger_jsd(log_q, F.log_softmax(i.teacher / temperature, -1), beta=beta)
        loss = loss * (len(x) if reduction == "sum" else 1)  # a mean over the rows
    return loss * temperature**2


# ---- ctc_loss


def optax_ctc(inputs, reduction: str):
    """optax.ctc_loss under jit, value and gradient: () -> (loss, gradient [N, T, C]).

    XLA has threads of its own, as many as there are cores, whatever torch's number is.
    """
    import jax
    import jax.numpy as jnp
    import optax

    logits = jnp.asarray(inputs.student.detach().transpose(0, 1).contiguous().numpy())
    labels = jnp.asarray(inputs.targets.numpy())
    lengths = jnp.asarray(inputs.target_lengths.numpy())
    frame_padding = 1.0 - jnp.asarray(inputs.frames.T.float().numpy())
    label_padding = (jnp.arange(labels.shape[1]) >= lengths[:, None]).astype(jnp.float32)

    def loss(x):
        losses = optax.ctc_loss(x, frame_padding, labels, label_padding)
        if reduction == "mean":
            return (losses / jnp.maximum(lengths, 1)).mean()
        return losses.sum()

    compiled = jax.jit(jax.value_and_grad(loss))
    return lambda: jax.block_until_ready(compiled(logits))


def optax_result(inputs, reduction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient [T, N, C] of optax, in float64."""
    import numpy as np

    loss, grad = (torch.from_numpy(np.array(x)).double() for x in optax_ctc(inputs, reduction)())
    return loss, grad.transpose(0, 1)


# ---- ctc_align


def torchaudio_align(inputs):
    """(paths [N, T], scores [N]); forced_align takes one utterance of log-probabilities."""
    from torchaudio.functional import forced_align

    log_probs = inputs.student.detach().log_softmax(-1).transpose(0, 1)
    N, T, _ = log_probs.shape
    paths, scores = torch.full((N, T), -1), log_probs.new_empty(N)
    for n in range(N):
        t, s = inputs.input_lengths[n], inputs.target_lengths[n]
        path, score = forced_align(log_probs[n : n + 1, :t], inputs.targets[n : n + 1, :s])
        paths[n, :t], scores[n] = path[0], score.sum()
    return paths, scores
