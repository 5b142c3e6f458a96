"""Puts the results of the benchmarks into the README, between its two `speed` markers.

python -m kdkernels.bench.report FILE.json [--readme README.md]
"""

import argparse
import json
import re
from pathlib import Path

BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"


def number(x: float) -> str:
    return f"{x:.0f}" if x >= 10 else f"{x:.1f}"


def table(result: dict) -> str:
    m, v = result["machine"], result["versions"]
    lines = [
        f"{m['cpu']}, {result['threads']} threads, torch {v['torch']}, {result['dtype']}, from raw "
        "logits to gradient (forward and backward), median times. Made by "
        "`python -m kdkernels.bench`.",
        "",
        "| op | shape | this package | eager torch | torch.compile | peak memory | eager's peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        times = {n: f"{t['median'] * 1e3:.3g} ms" for n, t in row["seconds"].items()}
        for n in ("eager", "compile"):
            if n in times:
                times[n] += f" ({number(row['ratios'][n]['value'])}x)"
        peaks = {n: f"{v:.1f} V" for n, v in row.get("peak_memory", {}).items()}
        cells = [f"`{row['op']}`", row["shape"]]
        cells += [times.get(n, "") for n in ("ours", "eager", "compile")]
        cells += [peaks.get(n, "") for n in ("ours", "eager")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Shapes are (rows, C) for `kd_loss` and (T, N, C, S) for the others. V is the size of one "
        "logit tensor; peak memory counts the gradient, which is 1 V, and not the inputs.",
    ]
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("json", type=Path)
    p.add_argument("--readme", type=Path, default=Path("README.md"))
    args = p.parse_args()
    text = args.readme.read_text()
    body = f"{BEGIN}\n{table(json.loads(args.json.read_text()))}\n{END}"
    text, n = re.subn(f"{BEGIN}.*?{END}", lambda _: body, text, flags=re.DOTALL)
    if n != 1:
        raise SystemExit(f"{args.readme}: expected one pair of {BEGIN} and {END}, found {n}")
    args.readme.write_text(text)


if __name__ == "__main__":
    main()
