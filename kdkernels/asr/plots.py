"""The report's pictures, as PNG bytes."""

import io
import logging

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its font cache on stderr

from matplotlib.figure import Figure  # noqa: E402


def curves(named: dict[str, list[dict]]) -> bytes:
    """Dev WER against steps and against seconds of training; a line for each student."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, x in zip(axes, ("step", "seconds"), strict=True):
        for name, curve in named.items():
            axis.plot([p[x] for p in curve], [p["wer"] for p in curve], label=name)
        axis.set_xlabel({"step": "steps", "seconds": "seconds of training"}[x])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("dev WER, %")
    axes[0].set_ylim(0, 105)
    axes[0].legend()
    return _png(figure)


def loss(loss_ms: dict[str, float]) -> bytes:
    """Time and peak memory of one step's loss and gradient, fused against torch's ops."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    names = ("fused", "torch")
    tables = (
        ("milliseconds", [loss_ms[name] for name in names]),
        ("MB at the peak", [loss_ms[f"{name}_bytes"] / 1e6 for name in names]),
    )
    for axis, (label, values) in zip(figure.subplots(1, 2), tables, strict=True):
        bars = axis.bar(["kdkernels", "torch"], values, color=["tab:green", "tab:gray"])
        axis.bar_label(bars, fmt="%.2f")
        axis.margins(y=0.1)
        axis.set_ylabel(label)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
