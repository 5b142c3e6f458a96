"""A result as text: pure functions from what `python -m kdkernels.bench --json` writes."""

from statistics import median

from .peers import PEERS
from .reasons import missed_because, slower_because
from .shapes import COPIES

# Logit tensors that a step must read or write, and what they are.
MOVES = {
    "kd_loss": (3, "student and teacher are read, the gradient is written"),
    "ctc_loss": (3, "the logits are read for the softmax and again for the gradient, written"),
    "ctc_kd_loss": (5, "student and teacher are read twice, the gradient is written"),
    "ctc_align": (1, "the logits are read"),
}
# One word a contender: what it is called in a table.
NAMES = {
    "ours": "this package",
    "new": "this package, new memory",
    "eager": "eager torch",
    "compile": "torch.compile",
    "trl": "TRL",
    "liger": "Liger",
    "fla": "FLA, with products",
    "optax": "optax, jit",
    "k2": "k2",
    "separate": "ctc_loss + kd_loss",
    "reference": "plain torch",
    "torchaudio": "torchaudio",
    "copy": "copy",
}
# Of these ours takes a share of the time; of the others it is so many times as fast.
OF_THEIRS = ("separate", "copy")
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # huge pages for torch's and everybody's tensors
LEGEND = (
    "Shapes are (rows, C) for `kd_loss` and (T, N, C, S) for the others. V is the size of one "
    "logit tensor; peak memory counts the gradient, which is 1 V, and not the inputs; it is of "
    "resident pages of 4 KB, what the allocator wastes among them, which is more the more tensors "
    "there are."
)
UNSAID = "Nobody has said why, on this machine."
NO_GPU = "Not measured: a GPU. There is no number of one in these tables."


def of_theirs(name: str) -> bool:
    return name in OF_THEIRS


def compared(name: str, contenders) -> tuple[str, str]:
    """Whose time over whose is the ratio of a contender. A copy goes into new memory, and is
    compared with what does so too."""
    if not of_theirs(name):
        return name, "ours"
    return "new" if name == "copy" and "new" in contenders else "ours", name


def time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def times_as_fast(x: float) -> str:
    return f"{x:.0f}x" if x >= 10 else f"{x:.1f}x"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def conditions(result: dict) -> str:
    """Machine, versions and commit of a result, in one sentence."""
    m, v = result["machine"], result["versions"]
    commit, _, dirty = result["commit"].partition("-")
    commit = commit[:12] + (" with changes" if dirty else "")
    text = (
        f"{m.get('gpu') or m['cpu']}, {result['threads']} threads, torch {v['torch']}, kdkernels "
        f"{v['kdkernels']} at {commit}, {result['dtype']}"
    )
    if result.get("backend"):
        text += f", backend {result['backend']}"
    if m.get("huge_pages"):
        whose = "for all contenders" if pages_for_all(result) else f"by {m['huge_pages']}"
        text += f", huge pages {whose}"
    if copies := copy_speeds(result):
        low, mid, high = (f"{x / 1e9:.3g}" for x in (copies[0], median(copies), copies[-1]))
        text += f"; copies {mid} GB/s ({low} to {high} over the run)"
    if result.get("tiny"):
        text += "; TINY SHAPES, which measure nothing"
    return text + "."


def copy_speeds(result: dict) -> list[float]:
    """Bytes read and written per second, beside each row, least to greatest."""
    return sorted(
        r["copy_bytes_per_second"] for r in result.get("rows", []) if "copy_bytes_per_second" in r
    )


def pages_for_all(result: dict) -> bool:
    """Whether the allocator gives every contender huge pages, as this package gives itself."""
    system_has = result["machine"].get("huge_pages") != "never"
    return system_has and HUGE_PAGES in result.get("allocator", "")


def times_table(result: dict) -> str:
    """The short table: what each row gains against torch."""
    names = ("eager", "compile")
    rows = []
    for row in result["rows"]:
        cells = [f"`{row['op']}`", row["shape"], time(row["seconds"]["ours"]["median"])]
        for name in names:
            cells.append("")
            if name in row["seconds"]:
                ratio = times_as_fast(row["ratios"][name]["value"])
                cells[-1] = f"{time(row['seconds'][name]['median'])} ({ratio})"
        share = row.get("share_of_copy_bandwidth")
        cells.append("" if share is None else f"{share:.0%}")
        peaks = row.get("peak_memory", {})
        cells += [f"{peaks[n]:.1f} V" if n in peaks else "" for n in ("ours", "eager")]
        rows.append(cells)
    head = ["op", "shape", "this package", "eager torch", "torch.compile"]
    return table([*head, "of copy", "peak memory", "eager's peak"], rows)


def summary(result: dict) -> str:
    """What the benchmark prints at its end."""
    parts = [conditions(result), times_table(result)]
    for title in ("Where another is faster", "Floors"):
        if text := SECTIONS[title](result):
            parts += [f"{title}:", text]
    return "\n\n".join(parts)


def headline(results: list[dict]) -> str:
    """What stands at the head of the README: what each operator gains, least to most."""
    parts = []
    for result in results:
        rows = []
        for op in dict.fromkeys(row["op"] for row in result["rows"]):
            of_op = [row for row in result["rows"] if row["op"] == op and "eager" in row["ratios"]]
            faster = sorted(row["ratios"]["eager"]["value"] for row in of_op)
            peaks = [row.get("peak_memory") or {} for row in of_op]
            less = sorted(p["eager"] / p["ours"] for p in peaks if {"eager", "ours"} <= p.keys())
            if faster:
                rows.append([f"`{op}`", extent(faster), extent(less)])
        m = result["machine"]
        parts += [
            f"Against eager torch, forward and backward, on {m.get('gpu') or m['cpu']}, "
            f"{result['threads']} threads, "
            + ("every contender with huge pages, " if pages_for_all(result) else "")
            + "over shapes from a single utterance to large batches:",
            table(["op", "times as fast", "times less memory"], rows),
        ]
    return "\n\n".join(parts)


def extent(ranked: list[float]) -> str:
    """Least to greatest, and the median."""
    if not ranked:
        return ""
    ends = f"{times_as_fast(ranked[0])} to {times_as_fast(ranked[-1])}"
    return f"{ends}, median {times_as_fast(median(ranked))}"


def readme_section(results: list[dict]) -> str:
    """What stands in the README under "Speed and memory": the first result of a CPU, the first of
    a GPU. The head has the others' summaries, docs/ the whole."""
    parts, shown = [], {}
    for result in results:
        shown.setdefault(bool(result["machine"].get("gpu")), result)
    for result in shown.values():
        parts += [
            f"{conditions(result)} From raw logits to gradient (forward and backward), medians.",
            times_table(result),
        ]
    parts.append(
        f"{LEGEND} `of copy`: bytes that must move, per second, as a share of what a copy "
        "reaches before and after the row (more where the caches hold the data). A number of times "
        "is a median of rounds that both ran in, and need not be the quotient of the medians. "
        "torch.compile leaves torch's CTC as it is: `ctc_loss` is compiled from 1000 classes on, "
        "where it has a log_softmax to fuse."
    )
    if not has_gpu(results):
        parts.append(NO_GPU)
    return "\n\n".join(parts)


def report(results: list[dict], plots: tuple[str, ...] = ()) -> str:
    """Everything that was measured."""
    parts = [
        "# Benchmarks",
        "Made by `python -m kdkernels.bench.report` from JSON files; do not edit. Contenders take "
        "turns, round after round, in one process; figures are medians with quartiles. A ratio is "
        "the median, with quartiles, of the ratios within the rounds that both ran in: a slow one "
        "sits rounds out, but runs in five at the least. So it need not be the quotient of the two "
        "medians. On Linux this package asks for huge pages for its outputs; the others, copies "
        "too, have the pages that their allocator takes, 4 KB ones unless it is told otherwise "
        f"(`GLIBC_TUNABLES={HUGE_PAGES}`). Logits of student and teacher are independent normal "
        "numbers: no row is near convergence, where `kd_loss` takes longer. " + LEGEND,
    ]
    for result in results:
        where = result["machine"].get("gpu") or result["machine"]["cpu"]
        parts += [f"## {where}{', huge pages for all' if pages_for_all(result) else ''}"]
        parts += [conditions(result), peers_list(result)]
        for title, section in SECTIONS.items():
            if text := section(result):
                parts += [f"### {title}", text]
    if not has_gpu(results):
        parts.append(NO_GPU)
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in plots]
    return "\n\n".join(parts) + "\n"


def has_gpu(results: list[dict]) -> bool:
    return any(r["machine"].get("gpu") for r in results)


def peers_list(result: dict) -> str:
    lines = []
    for name, peer in result.get("peers", {}).items():
        said = [peer["version"], PEERS[name].compared] if peer["version"] else ["no row"]
        said += [peer["why_not"]] if peer["why_not"] else []
        lines.append(f"- {name}: {'; '.join(said)}")
    lines += [
        f"- {name} failed at `{row['op']}` {row['shape']}: {why}"
        for row in result.get("rows", [])
        for name, why in row.get("failed", {}).items()
    ]
    return "Peers:\n\n" + "\n".join(lines or ["- not recorded"])


# ---- sections of the report: result -> Markdown, empty where it was not measured


def every_time(result: dict) -> str:
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
        "The ratio is a contender's time over ours: so many times as fast is ours. For `copy` and "
        "`ctc_loss + kd_loss` it is our time over theirs; for `copy`, which writes to new memory, "
        "our time in new memory.\n\n"
        + table(["op", "shape", "", "contender", "median", "quartiles", "ratio", "rounds"], rows)
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
    missed = f"{len(lines)} of the {len(every)} that this project set itself are missed in this run"
    return every and "\n\n".join([missed + ".", *(["\n".join(lines)] if lines else [])])


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
        "GB/s are these bytes over the median time; `of copy` is their share of what a copy of "
        "128 MB reads and writes per second, measured before and after the row. `eager on "
        "one`: eager torch's time over ours, both on one thread (plain torch's for `ctc_align`), "
        "over five rounds. The contender `copy` clones into fresh memory "
        + ", ".join(f"{n:g} V for `{op}`" for op, n in COPIES.items())
        + ", each read once and written once.\n\n"
        + table(head, rows)
    )


def with_quartiles(t: dict) -> str:
    return f"{time(t['median'])} [{t['p25'] * 1e3:.3g}, {t['p75'] * 1e3:.3g}]"


def named_table(result: dict, field: str, show) -> str:
    """A column for each contender that has `field` in any row."""
    rows = [r for r in result["rows"] if r.get(field)]
    names = [n for n in NAMES if any(n in r[field] for r in rows)]
    body = [
        [f"`{r['op']}`", r["shape"], *(show(r[field][n]) if n in r[field] else "" for n in names)]
        for r in rows
    ]
    return table(["op", "shape", *(NAMES[n] for n in names)], body) if rows else ""


def peak_memory(result: dict) -> str:
    shown = named_table(result, "peak_memory", lambda v: f"{v:.2f} V")
    if not shown:
        return ""
    return (
        "What a step has in use at its peak beyond the inputs: resident pages, as the system "
        "counts them; of optax what XLA plans, since it keeps its memory between steps.\n\n" + shown
    )


def errors(result: dict) -> str:
    def show(e):
        text = " / ".join(f"{e[k]:.1e}" for k in ("loss_relative", "grad_relative") if k in e)
        return text + (" **differs**" if e.get("differs") else "")

    text = named_table(result, "errors", show)
    return text and (
        "Of the summed loss, relative, and of the gradient, over its largest element. One "
        f"that differs from float64 is marked.\n\n{text}"
    )


def in_a_loop(result: dict) -> str:
    rows = [
        [f"`{r['op']}`", r["shape"], *(time(r["loop"][n]) for n in ("ours", "eager", "idle"))]
        for r in result["rows"]
        if r.get("loop")
    ]
    head = ["op", "shape", NAMES["ours"], NAMES["eager"], "no loss"]
    return rows and (
        "Between a linear layer and its update: a second pool of threads would show here. Logits "
        "of more than 8 million numbers are left out: there the layer hides the loss.\n\n"
        + table(head, rows)
    )


def smallest_call(result: dict) -> str:
    rows = [
        f"- `{r['op']}` {r['shape']}: "
        + ", ".join(f"{NAMES[n]} {t['median'] * 1e6:.3g} us" for n, t in r["seconds"].items())
        for r in result["rows"]
        if r["note"] == "smallest call"
    ]
    return "\n".join(rows)


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


def measured_names(points: list[dict]) -> list[str]:
    """The contenders of a list of points, in the order of NAMES."""
    return [n for n in NAMES if n in points[0]]


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
        "A step of the training program's student with `ctc_kd_loss`, and the share of it that the "
        "loss takes (the rest is the same step with a gradient that is there already).\n\n"
        + table(["(T, N, C, S)", "parameters", NAMES["ours"], NAMES["eager"]], rows)
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


# ---- what the benchmark prints while it runs


def row_text(row: dict) -> str:
    lines = [f"\n{row['op']} {row['shape']}  {row['note']}"]
    lines.append("  " + "  ".join(f"{n} {time(t['median'])}" for n, t in row["seconds"].items()))
    for name, r in row["ratios"].items():
        ours_over = of_theirs(name)
        said = "x the time of" if ours_over else "x as fast as"
        line = f"  {r['value']:.3g} {said} {name} [{r['p25']:.3g}, {r['p75']:.3g}]"
        if floor := row["floors"].get(name):
            sign = "<=" if ours_over else ">="
            met = "met" if floor["met"] else "MISSED"
            line += f"   floor {sign} {floor['floor']:g}: {met}"
        lines.append(line)
    lines.append(
        f"  {row['gigabytes_per_second']:.3g} GB/s of {MOVES[row['op']][0]} logit tensors, "
        f"{row['share_of_copy_bandwidth']:.0%} of this machine's copy"
    )
    lines += [f"  {name} failed: {why}" for name, why in row.get("failed", {}).items()]
    if "loop" in row:
        lines.append("  in a loop: " + "  ".join(f"{n} {time(t)}" for n, t in row["loop"].items()))
    if "peak_memory" in row:
        peaks = (f"{n} {v:.2f} V" for n, v in row["peak_memory"].items())
        lines.append("  peak memory: " + "  ".join(peaks))
    if "one_thread" in row:
        alone = (f"{n} {time(t['median'])}" for n, t in row["one_thread"].items())
        lines.append("  on one thread: " + "  ".join(alone))
    for name, e in row.get("errors", {}).items():
        said = ", ".join(f"{k} {v:.1e}" for k, v in e.items() if k != "differs")
        lines.append(f"  {name}: {said}" + ("   DIFFERS from float64" if e["differs"] else ""))
    return "\n".join(lines)
