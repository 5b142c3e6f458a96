"""Pointers in the documents: files that are named exist, and every file has its line."""

import re
from pathlib import Path

import pytest

import kdkernels.asr

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(page):
    text = (ROOT / page).read_text()
    folders = "benchmarks|csrc|docs|kdkernels|python|tests|\\.ci"
    named = set(re.findall(rf"`((?:{folders})/[\w./-]*)`", text))
    named = {name for name in named if "my_op" not in name}  # which the reader is to write
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_within_a_page_have_a_heading(page):
    text = (ROOT / page).read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= anchors


def test_every_module_has_a_line_in_the_map_of_its_folder():
    modules = {path.name for path in (ROOT / "kdkernels/asr").glob("[!_]*.py")}
    assert set(re.findall(r"^ +(\w+\.py) ", kdkernels.asr.__doc__, re.M)) == modules
    table = (ROOT / "CONTRIBUTING.md").read_text().split("| file of `kdkernels/bench/` |")[1]
    table = table.split("\n\n")[0]
    modules = {path.name for path in (ROOT / "kdkernels/bench").glob("[!_]*.py")}
    assert set(re.findall(r"`(\w+\.py)`", table)) == modules
