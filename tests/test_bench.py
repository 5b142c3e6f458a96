"""The README's table of speed is the one that the committed results make."""

import json
from pathlib import Path

from kdkernels.bench.report import BEGIN, END, table

ROOT = Path(__file__).parents[1]


def test_readme_agrees_with_the_results():
    result = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    shown = (ROOT / "README.md").read_text().split(BEGIN)[1].split(END)[0]
    assert shown.strip() == table(result)
