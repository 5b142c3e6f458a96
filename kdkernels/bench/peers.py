"""The losses of other libraries, and why some are not compared.

A peer gets its inputs in its own layout and arrays, made outside the time that is measured.
"""

import functools
import importlib
import importlib.metadata
import os
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


class Peer(NamedTuple):
    package: str
    module: str  # which must be importable
    device: str  # where it runs
    compared: str
    alone: str = ""  # what is known of it beside a CPU build of torch 2.13, where it is missing


PEERS = {
    "trl": Peer(
        "trl", "trl.experimental.gkd.gkd_trainer", "any",
        "GKDTrainer.generalized_jsd_loss, on raw logits",
    ),
    "optax": Peer("optax", "optax", "cpu", "ctc_loss under jit, value and gradient; XLA "
        "has a thread for every core, whatever the number of torch's"),
    "liger": Peer(
        "liger-kernel", "liger_kernel.transformers.functional", "cuda",
        "KL and JSD on log-probabilities, with the log_softmax they need",
        "0.8.5 imports, but its Triton kernels raise without a GPU",
    ),
    "fla": Peer(
        "flash-linear-attention", "fla.modules.fused_kl_div", "cuda",
        "its fused KL starts from hidden states: here these are the logits and the weights an "
        "identity, whose products are in its time; up to 8192 classes",
        "0.6.0 imports, but its Triton kernels raise without a GPU",
    ),
    "k2": Peer(
        "k2", "k2", "any",
        "ctc_loss on log-probabilities with the log_softmax it needs, beam 10",
        "the last wheel on PyPI, 1.23.4, is for Python 3.9 and torch 1.13 with CUDA",
    ),
    "torchaudio": Peer(
        "torchaudio", "torchaudio", "any", "forced_align, one utterance after another",
        "the wheel on PyPI, 2.11.0, is linked with libtorch_cuda and raises OSError when imported",
    ),
}  # fmt: skip


def status(device: str = "cpu") -> dict[str, dict[str, str | None]]:
    """Name of a peer -> its version or None, and the reason why there is no row of it."""
    found = {}
    for name, peer in PEERS.items():
        found[name] = peer_status(name)
        if not found[name]["why_not"] and peer.device not in ("any", device):
            where = {"cuda": "a GPU", "cpu": "the CPU"}
            why = f"no row; it runs on {where[peer.device]}, and {where[device]} is measured here"
            found[name] = found[name] | {"why_not": why}
    return found


@functools.cache
def peer_status(name: str) -> dict[str, str | None]:
    peer = PEERS[name]
    try:
        version = importlib.metadata.version(peer.package)
        with warnings.catch_warnings():  # about the other library itself
            warnings.simplefilter("ignore")
            importlib.import_module(peer.module)
    except importlib.metadata.PackageNotFoundError:
        why = "; ".join(filter(None, ("not installed", peer.alone)))
        return {"version": None, "why_not": why}
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: an ABI check
        return {"version": None, "why_not": f"{type(error).__name__} when it is imported"}
    if peer.device == "cuda" and not torch.cuda.is_available():
        return {"version": version, "why_not": "no row; its kernels need a GPU"}
    return {"version": version, "why_not": None}


def runs(name: str, device: str) -> bool:
    return PEERS[name].device in ("any", device) and peer_status(name)["why_not"] is None


# ---- kd_loss: (inputs, student logits, reduction) -> loss

# What both libraries call the KL divergences: the ends of their generalised Jensen-Shannon.
KL_BETA = {"forward_kl": 0, "reverse_kl": 1}


def trl_divergence(i, x, reduction="batchmean", *, temperature, beta):
    """TRL's distillation loss, which has no temperature squared."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    beta = KL_BETA.get(i.divergence, beta)
    loss = GKDTrainer.generalized_jsd_loss(
        x, i.teacher, beta=beta, temperature=temperature, reduction=reduction
    )
    return loss * temperature**2


def liger_divergence(i, x, reduction="batchmean", *, temperature, beta):
    from liger_kernel.transformers import functional as liger

    log_q = F.log_softmax(x / temperature, -1)
    if i.divergence == "forward_kl":
        p = F.softmax(i.teacher / temperature, -1)
        loss = liger.liger_kl_div(log_q, p, reduction=reduction)
    else:
        beta = KL_BETA.get(i.divergence, beta)
        loss = liger.liger_jsd(log_q, F.log_softmax(i.teacher / temperature, -1), beta=beta)
        loss = loss * (len(x) if reduction == "sum" else 1)  # a mean over the rows
    return loss * temperature**2


MOST_FLA_CLASSES = 8192  # of an identity, [C, C]


def fla_kl(inputs, temperature):
    """FLA's fused linear layers, an identity, and forward KL: (inputs, logits, reduction) -> loss.

    It knows no temperature, and means over the rows alone.
    """
    from fla.modules.fused_kl_div import fused_kl_div_loss

    rows, C = inputs.student.shape
    identity = torch.eye(C, dtype=inputs.student.dtype, device=inputs.student.device)

    def loss(i, x, reduction="batchmean"):
        mean = fused_kl_div_loss(x / temperature, i.teacher / temperature, identity, identity)
        return mean * (rows if reduction == "sum" else 1) * temperature**2

    return loss


# ---- ctc_loss


def optax_ctc(inputs):
    """optax.ctc_loss under jit, summed: () -> (loss, gradient [N, T, C]), and the bytes it needs.

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
        return optax.ctc_loss(x, frame_padding, labels, label_padding).sum()

    compiled = jax.jit(jax.value_and_grad(loss)).lower(logits).compile()
    need = compiled.memory_analysis()
    return (
        lambda: jax.block_until_ready(compiled(logits)),
        need.temp_size_in_bytes + need.output_size_in_bytes,
    )


def optax_result(result) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient [T, N, C], in float64."""
    import numpy as np

    loss, grad = (torch.from_numpy(np.array(x)).double() for x in result)
    return loss, grad.transpose(0, 1)


def k2_ctc(inputs):
    """k2's loss over graphs of the targets: (inputs, logits, reduction) -> loss.

    It wants utterances in order of falling length.
    """
    import k2

    order = inputs.input_lengths.cpu().argsort(descending=True)
    lengths, labels = inputs.target_lengths.cpu()[order], inputs.targets.cpu()[order]
    graphs = k2.ctc_graph(
        [row[:n].tolist() for row, n in zip(labels, lengths, strict=True)],
        device=inputs.student.device,
    )
    frames = inputs.input_lengths.cpu()[order]
    segments = torch.stack([order, torch.zeros_like(order), frames], 1).int()

    def loss(i, x, reduction="mean"):
        log_probs = F.log_softmax(x, -1).transpose(0, 1).contiguous()
        dense = k2.DenseFsaVec(log_probs, segments)
        return k2.ctc_loss(graphs, dense, reduction=reduction, target_lengths=lengths.to(x.device))

    return loss


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
