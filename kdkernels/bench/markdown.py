"""A result as text: pure functions from what `python -m kdkernels.bench --json` writes."""

from statistics import median

from .cells import MOVES, extent, of_theirs, table, time, times_as_fast
from .peers import PEERS
from .sections import SECTIONS

HUGE_PAGES = "glibc.malloc.hugetlb=1"  # huge pages for torch's and everybody's tensors
LEGEND = (
    "- Shapes are (rows, C) for `kd_loss` and (T, N, C, S) for the other operators.",
    "- V is the size of one logit tensor.",
    "- Peak memory includes the gradient (1 V) and excludes the inputs. It counts resident pages "
    "of 4 KB, and so also what the allocator wastes, which grows with the number of tensors.",
    "- A speed-up is the median of the ratios within the rounds that both contenders ran in; it "
    "need not be the quotient of the two medians.",
)
NO_GPU = "No GPU was measured: these tables contain no GPU figures."


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
    for name in ("Where another is faster", "Floors"):
        if text := SECTIONS[name](result):
            parts += [f"{name}:", text]
    return "\n\n".join(parts)


def headline(results: list[dict]) -> str:
    """What stands at the head of the README: the gains of each operator on each machine."""
    rows = []
    for op in dict.fromkeys(row["op"] for result in results for row in result["rows"]):
        for result in results:
            of_op = [row for row in result["rows"] if row["op"] == op and "eager" in row["ratios"]]
            faster = sorted(row["ratios"]["eager"]["value"] for row in of_op)
            peaks = [row.get("peak_memory") or {} for row in of_op]
            less = sorted(p["eager"] / p["ours"] for p in peaks if {"eager", "ours"} <= p.keys())
            if faster:
                where = f"{title(result)}, {result['threads']} threads"
                rows.append([f"`{op}`", where, extent(faster), extent(less)])
    return (
        "Against eager torch, forward and backward, over shapes from a single utterance to large "
        "batches:\n\n" + table(["op", "machine", "times as fast", "times less memory"], rows)
    )


def title(result: dict) -> str:
    """The machine, and whether every contender had huge pages."""
    machine = result["machine"].get("gpu") or result["machine"]["cpu"]
    return f"{machine}, huge pages for all" if pages_for_all(result) else machine


def readme_section(results: list[dict]) -> str:
    """What stands in the README under "Speed and memory": the first result of a CPU and the first
    of a GPU. The head has summaries of the others, docs/ has everything."""
    parts, shown = [], {}
    for result in results:
        shown.setdefault(bool(result["machine"].get("gpu")), result)
    for result in shown.values():
        parts += [
            f"{conditions(result)} From raw logits to gradient (forward and backward), medians.",
            times_table(result),
        ]
    of_copy = (
        "- `of copy` is the rate of the bytes that must move, as a share of what a copy reaches "
        "before and after the row; it may exceed 100 % where the data fits the caches."
    )
    compiled = (
        "- torch.compile leaves torch's CTC as it is, so `ctc_loss` is compiled only from 1000 "
        "classes on, where it has a log_softmax to fuse."
    )
    parts.append("\n".join([*LEGEND, of_copy, compiled]))
    if not has_gpu(results):
        parts.append(NO_GPU)
    return "\n\n".join(parts)


def report(results: list[dict], plots: dict[str, str] | None = None) -> str:
    """Everything that was measured."""
    notes = (
        "- Contenders take turns, round after round, in one process. Figures are medians with "
        "quartiles. A slow contender sits rounds out, but runs in at least five.",
        "- On Linux this package asks for huge pages for its outputs. The others get the pages "
        "that their allocator takes: 4 KB ones, unless it is told otherwise "
        f"(`GLIBC_TUNABLES={HUGE_PAGES}`).",
        "- This package keeps the memory of a gradient of 1 MB or more for the next one, while the "
        "others wait for new pages to be zeroed. The contender `this package, new memory` is this "
        "package without that. A result without that contender is of a commit that kept nothing.",
        "- Student and teacher logits are independent normal numbers: no row is near convergence, "
        "where `kd_loss` takes longer.",
    )
    parts = [
        "# Benchmarks",
        "Made by `python -m kdkernels.bench.report` from JSON files; do not edit.",
        "\n".join([*notes, *LEGEND]),
    ]
    for result in results:
        parts += [f"## {title(result)}", conditions(result), peers_list(result)]
        for name, section in SECTIONS.items():
            if text := section(result):
                parts += [f"### {name}", text]
    if not has_gpu(results):
        parts.append(NO_GPU)
    if plots:
        parts.append("## Figures")
        parts += [f"{said}:\n\n![{said}]({name})" for name, said in plots.items()]
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
