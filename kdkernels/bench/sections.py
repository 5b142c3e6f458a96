"""Sections of the report: pure functions from a result to Markdown, empty where it was not
measured."""

from .cells import (
    MOVES,
    NAMES,
    measured_names,
    microseconds,
    named_table,
    of_theirs,
    table,
    time,
    with_quartiles,
)
from .errors import DIFFERS
from .reasons import missed_because, slower_because
from .shapes import COPIES

UNSAID = "No reason is recorded for this machine."


def every_time(result: dict) -> str:
    head = ["op", "shape", "kind", "contender", "median", "quartiles", "ratio", "rounds"]
    rows = []
    for row in result["rows"]:
        for name, t in row["seconds"].items():
            r = row["ratios"].get(name)
            cells = [f"`{row['op']}`", row["shape"], row["note"]] if name == "ours" else [""] * 3
            cells += [NAMES[name], time(t["median"]), f"{time(t['p25'])} to {time(t['p75'])}"]
            cells.append("" if r is None else f"{r['value']:.3g} [{r['p25']:.3g}, {r['p75']:.3g}]")
            cells.append(str(t.get("rounds", "")))
            rows.append(cells)
    return (
        "The ratio is a contender's time over ours: how many times as fast this package is. For "
        "`copy` and `ctc_loss + kd_loss` it is our time over theirs; `copy` writes to new memory, "
        "and is compared with our time in new memory.\n\n" + table(head, rows)
    )


def beaten(result: dict) -> list[tuple[str, str, str, float]]:
    """Op, shape, contender, its speed over ours: wherever another loss is faster."""
    found = []
    for row in result["rows"]:
        for name, r in row["ratios"].items():
            speed = r["value"] if of_theirs(name) else 1 / r["value"]
            if name not in ("copy", "new") and speed > 1:
                found.append((row["op"], row["shape"], name, speed))
    return found


def not_the_fastest(result: dict) -> str:
    cpu = result["machine"]["cpu"]
    lines = [
        f"- `{op}` {shape}: {NAMES[name]} is {speed:.2f} times as fast. "
        + (slower_because(cpu, op, shape) or UNSAID)
        for op, shape, name, speed in beaten(result)
    ]
    return "\n".join(lines) or "Nowhere: at every row this package has the least median."


def floors(result: dict) -> str:
    cpu = result["machine"]["cpu"]
    every = [
        (row, name, floor)
        for row in result["rows"]
        for name, floor in row.get("floors", {}).items()
    ]
    lines = [
        f"- `{row['op']}` {row['shape']}: {row['ratios'][name]['value']:.3g} "
        f"{'times the time of' if of_theirs(name) else 'times as fast as'} {NAMES[name]}, "
        f"at {'most' if of_theirs(name) else 'least'} {floor['floor']:g} wanted. "
        + (missed_because(cpu, row["op"], row["shape"], name) or UNSAID)
        for row, name, floor in every
        if not floor["met"]
    ]
    missed = f"Of the {len(every)} floors that this project sets itself, this run misses"
    return every and "\n\n".join(
        [f"{missed} {len(lines)}.", *(["\n".join(lines)] if lines else [])]
    )


def traffic(result: dict) -> str:
    rows = []
    for row in result["rows"]:
        share = row.get("share_of_copy_bandwidth")
        one = row.get("one_thread", {})
        their_one = one.get("eager") or one.get("reference")
        rows.append(
            [
                f"`{row['op']}`",
                row["shape"],
                f"{row['logit_bytes'] / 1e6:.3g} MB",
                f"{row['gigabytes_per_second']:.3g}",
                "" if share is None else f"{share:.0%}",
                time(row["seconds"]["ours"]["median"]),
                with_quartiles(one["ours"]) if one else "",
                f"{their_one['median'] / one['ours']['median']:.3g}x" if their_one else "",
            ]
        )
    words = "\n".join(f"- `{op}`: {n} V: {said}." for op, (n, said) in MOVES.items())
    threads = f"{result['threads']} threads"
    head = ["op", "shape", "V", "GB/s", "of copy", threads, "one thread", "eager on one"]
    return (
        f"Bytes that must move:\n\n{words}\n\n"
        "GB/s is these bytes divided by the median time; `of copy` is its share of what a copy of "
        "128 MB reads and writes per second, measured before and after the row. `eager on "
        "one` is eager torch's time over ours (plain torch's for `ctc_align`), both on one thread, "
        "over five rounds. The contender `copy` reads and writes once, into new memory, "
        + ", ".join(f"{n:g} V for `{op}`" for op, n in COPIES.items())
        + ".\n\n"
        + table(head, rows)
    )


def smallest_call(result: dict) -> str:
    rows = [
        f"- `{r['op']}` {r['shape']}: "
        + ", ".join(f"{NAMES[n]} {microseconds(t['median'])}" for n, t in r["seconds"].items())
        for r in result["rows"]
        if r["note"] == "smallest call"
    ]
    return "\n".join(rows)


def peak_memory(result: dict) -> str:
    shown = named_table(result, "peak_memory", lambda v: f"{v:.2f} V")
    if not shown:
        return ""
    return (
        "What a step has in use at its peak beyond the inputs: resident pages, as the system "
        "counts them; for optax what XLA plans, since it keeps its memory between steps.\n\n"
        + shown
    )


def errors(result: dict) -> str:
    def show(e):
        text = " / ".join(f"{e[k]:.1e}" for k in ("loss_relative", "grad_relative") if k in e)
        return text + (" **differs**" if e.get("differs") else "")

    text = named_table(result, "errors", show)
    return text and (
        "Relative error of the summed loss / greatest error of the gradient over its largest "
        f"element. Marked: a loss off by more than {DIFFERS['loss_relative']:.0e}, or a gradient "
        f"by more than {DIFFERS['grad_relative']:.0e}.\n\n{text}"
    )


def accuracy(result: dict) -> str:
    data = result.get("accuracy")
    if not data:
        return ""
    ctc = [[str(p["T"]), f"{p['ours']:.1e}", f"{p['eager']:.1e}"] for p in data["ctc_against_T"]]
    names = measured_names(data["kd_against_kl"])
    kl = [[f"{p['kl']:.1e}", *(f"{p[n]:.1e}" for n in names)] for p in data["kd_against_kl"]]
    return (
        "Greatest error of the gradient of `ctc_loss` against float64, N = 4, C = 32, S = T / 5, "
        "summed loss:\n\n"
        + table(["T", NAMES["ours"], NAMES["eager"]], ctc)
        + "\n\nRelative error of `kd_loss` against the true KL of a row in nats, C = 5000:\n\n"
        + table(["true KL", *(NAMES[n] for n in names)], kl)
    )


def scaling(result: dict) -> str:
    rows = [
        [
            f"`{sweep['op']}`",
            f"{sweep['axis']} = {p['x']}",
            ", ".join(f"{n} = {v}" for n, v in sweep["others"].items()),
            time(p["ours"]),
            time(p["eager"]),
        ]
        for sweep in result.get("scaling", [])
        for p in sweep["points"]
    ]
    return rows and table(["op", "size", "at", NAMES["ours"], NAMES["eager"]], rows)


def training_step(result: dict) -> str:
    def of(r, name):
        share = r["share"][name]
        loss = f"loss {share:.0%}" if share > 0 else "loss less than the noise"
        return f"{time(r['seconds'][name])}, {loss}"

    rows = [
        [r["shape"], f"{r['parameters'] / 1e6:.2f} M", of(r, "ours"), of(r, "eager")]
        for r in result.get("training_step", [])
    ]
    if not rows and "training_step" in result:
        return "Not measured: it needs what the extra `train` installs."
    return rows and (
        "A step of the training program's student with `ctc_kd_loss`, and the loss's share of it "
        "(the rest is the time of the same step with a ready-made gradient).\n\n"
        + table(["(T, N, C, S)", "parameters", NAMES["ours"], NAMES["eager"]], rows)
    )


def in_a_loop(result: dict) -> str:
    rows = [
        [f"`{r['op']}`", r["shape"], *(time(r["loop"][n]) for n in ("ours", "eager", "idle"))]
        for r in result["rows"]
        if r.get("loop")
    ]
    head = ["op", "shape", NAMES["ours"], NAMES["eager"], "no loss"]
    return rows and (
        "The loss between a linear layer and its update, where a second pool of threads would "
        "show. Logits of more than 8 million elements are left out: the layer hides the loss.\n\n"
        + table(head, rows)
    )


SECTIONS = {
    "Times": every_time,
    "Where another is faster": not_the_fastest,
    "Floors": floors,
    "Traffic and threads": traffic,
    "Cost of a call": smallest_call,
    "Peak memory": peak_memory,
    "Errors against float64": errors,
    "Accuracy": accuracy,
    "Scaling": scaling,
    "Share of a training step": training_step,
    "In a loop": in_a_loop,
}
