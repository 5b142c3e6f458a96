"""Names of the contenders, which ratio is theirs, and how figures and tables are written."""

from statistics import median

# Logit tensors that a step must read or write, and what they are.
MOVES = {
    "kd_loss": (3, "student and teacher are read, the gradient is written"),
    "ctc_loss": (3, "the logits are read for the softmax and for the gradient, which is written"),
    "ctc_kd_loss": (5, "student and teacher are read twice, the gradient is written"),
    "ctc_align": (1, "the logits are read"),
}
# What a contender is called in a table.
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
# Their ratio is our time over theirs; that of the others is a speed-up, their time over ours.
OF_THEIRS = ("separate", "copy")


def of_theirs(name: str) -> bool:
    return name in OF_THEIRS


def compared(name: str, contenders) -> tuple[str, str]:
    """Whose time over whose is a contender's ratio. A copy goes into new memory, so it is compared
    with `new` where that was measured."""
    if not of_theirs(name):
        return name, "ours"
    return "new" if name == "copy" and "new" in contenders else "ours", name


def time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def microseconds(seconds: float) -> str:
    return f"{float(f'{seconds * 1e6:.3g}'):g} us"  # "1020", never "1.02e+03"


def times_as_fast(x: float) -> str:
    return f"{x:.0f}x" if x >= 10 else f"{x:.1f}x"


def extent(ranked: list[float]) -> str:
    """Least to greatest, and the median."""
    if not ranked:
        return ""
    ends = f"{times_as_fast(ranked[0])} to {times_as_fast(ranked[-1])}"
    return f"{ends}, median {times_as_fast(median(ranked))}"


def with_quartiles(t: dict) -> str:
    return f"{time(t['median'])} [{t['p25'] * 1e3:.3g}, {t['p75'] * 1e3:.3g}]"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def named_table(result: dict, field: str, show) -> str:
    """A column for each contender that has `field` in any row."""
    rows = [r for r in result["rows"] if r.get(field)]
    names = [n for n in NAMES if any(n in r[field] for r in rows)]
    body = [
        [f"`{r['op']}`", r["shape"], *(show(r[field][n]) if n in r[field] else "" for n in names)]
        for r in rows
    ]
    return table(["op", "shape", *(NAMES[n] for n in names)], body) if rows else ""


def measured_names(points: list[dict]) -> list[str]:
    """The contenders of a list of points, in the order of NAMES."""
    return [n for n in NAMES if n in points[0]]
