"""Other libraries' CTC losses, where they are installed: name -> (inputs, reduction) -> step.

A peer gets its inputs in its own layout and arrays, made outside the time that is measured.
"""

import importlib.metadata
import importlib.util

import torch

# What the table can compare with beside torch, and the module that must be importable.
PEERS = {"optax": ("optax", "jax")}


def installed() -> dict[str, str | None]:
    """Name of a peer -> its version, None where it is not installed."""
    return {
        name: importlib.metadata.version(name)
        if all(importlib.util.find_spec(m) for m in modules)
        else None
        for name, modules in PEERS.items()
    }


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
