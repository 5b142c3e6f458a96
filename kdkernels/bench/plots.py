"""Plots of a result (matplotlib): time against each size, accuracy, share of a training step."""

from pathlib import Path

from .cells import NAMES, measured_names
from .markdown import pages_for_all, title

COLOURS = {"ours": "#0b6e4f", "eager": "#b5651d", "trl": "#4b4e8a"}


def draw(results: list[dict], folder: Path) -> dict[str, str]:
    """Write PNG files into `folder`, for the results that hold such data; name -> caption."""
    captions = {}
    shown = [r for r in results if not pages_for_all(r)]  # the same lines once more
    for i, result in enumerate(shown):
        for kind, (plot, caption) in PLOTS.items():
            if result.get(kind):
                name = f"benchmark-{kind.replace('_', '-')}{f'-{i + 1}' if i else ''}.png"
                figure = plot(result)
                figure.savefig(folder / name, dpi=110, metadata={"Software": None})
                captions[name] = f"{caption}, {title(result)}"
    return captions


def figure(columns: int, rows: int = 1):
    from matplotlib.figure import Figure

    fig = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False).flatten()


def lines(axes, points, x, names, xlabel, ylabel):
    for name in names:
        shown = [(p[x], p[name]) for p in points if p[name] > 0]  # an error may be exactly 0
        axes.loglog(*zip(*shown, strict=True), "o-", color=COLOURS[name], label=NAMES[name])
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()


def scaling(result: dict):
    """Log-log, with a line of slope 1 and the sizes at which three logit tensors fill a cache."""
    sweeps = result["scaling"]
    fig, all_axes = figure(3, -(-len(sweeps) // 3))
    for axes, sweep in zip(all_axes, sweeps, strict=False):
        points = [p | {n: p[n] * 1e3 for n in ("ours", "eager")} for p in sweep["points"]]
        lines(axes, points, "x", ("ours", "eager"), sweep["axis"], "ms")
        last = points[-1]
        xs = [p["x"] for p in points]
        axes.loglog(xs, [last["ours"] * x / last["x"] for x in xs], ":", color="grey")
        if sweep["axis"] != "S":  # which leaves the logits as they are
            per_x = 3 * last["logit_bytes"] / last["x"]
            for level, size in result["machine"].get("caches", {}).items():
                if xs[0] <= size / per_x <= xs[-1]:
                    axes.axvline(size / per_x, color="grey", lw=0.8, ls="--")
                    axes.text(size / per_x, axes.get_ylim()[0], f" {level}", va="bottom")
        others = ", ".join(f"{n}={v}" for n, v in sweep["others"].items())
        axes.set_title(f"{sweep['op']}, {others}", fontsize=10)
    fig.suptitle("Forward and backward; dotted: linear; dashed: three logit tensors fill a cache")
    return fig


def accuracy(result: dict):
    fig, (left, right) = figure(2)
    data = result["accuracy"]
    lines(left, data["ctc_against_T"], "T", ("ours", "eager"), "T", "gradient, absolute error")
    left.set_title("ctc_loss against float64", fontsize=10)
    points = data["kd_against_kl"]
    names = measured_names(points)
    lines(right, points, "kl", names, "true KL, nats", "loss, relative error")
    right.set_title("kd_loss against float64", fontsize=10)
    return fig


def training_step(result: dict):
    steps = result["training_step"]
    fig, all_axes = figure(len(steps))
    for axes, step in zip(all_axes, steps, strict=True):
        names = ("ours", "eager")
        labels = [NAMES[n] for n in names]
        rest = step["seconds"]["idle"] * 1e3
        loss = [step["seconds"][n] * 1e3 - rest for n in names]
        axes.bar(labels, [rest] * 2, color="lightgrey", label="model, optimizer")
        axes.bar(labels, loss, bottom=rest, color=[COLOURS[n] for n in names], label="loss")
        axes.set(title=step["shape"], ylabel="ms a step")
        axes.legend(loc="lower right")
    return fig


PLOTS = {
    "scaling": (scaling, "Time against each size"),
    "accuracy": (accuracy, "Errors in float32"),
    "training_step": (training_step, "Share of the loss in a training step"),
}
