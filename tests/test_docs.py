"""The documents: files that are named exist, every file has its line, README's Python runs."""

import fnmatch
import inspect
import re
from pathlib import Path

import pytest

import kdkernels.asr

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/numerics.md"])
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


@pytest.mark.parametrize(
    ("title", "files"),
    [
        ("file of `kdkernels/bench/`", "kdkernels/bench/[!_]*.py"),
        ("module of `kdkernels/backends/triton/`", "kdkernels/backends/triton/[!_]*.py"),
        ("header of `csrc/cpu/`", "csrc/cpu/*.h"),
        ("header of `csrc/cuda/`", "csrc/cuda/*.cuh"),
    ],
)
def test_every_file_has_a_line_in_its_table(title, files):
    table = (ROOT / "CONTRIBUTING.md").read_text().split(f"| {title} |")[1].split("\n\n")[0]
    ending = Path(files).suffix
    in_first_column = " ".join(row.split("|")[1] for row in table.splitlines()[2:])
    named = {name for name in re.findall(r"`([\w.]+)`", in_first_column) if name.endswith(ending)}
    assert named == {path.name for path in ROOT.glob(files)}


def test_every_test_has_a_line_in_its_table():
    table = (ROOT / "CONTRIBUTING.md").read_text().split("| file of `tests/` |")[1].split("\n\n")[0]
    patterns = re.findall(r"`([\w*]+\.py)`", table)
    files = {path.name for path in ROOT.glob("tests/*.py")}
    assert files == {name for pattern in patterns for name in fnmatch.filter(files, pattern)}
    assert all(fnmatch.filter(files, pattern) for pattern in patterns)


def test_python_in_readme_runs_from_top_to_bottom():
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    for block in blocks:
        exec(block, names)
    assert names["terms"].loss.isfinite()
    assert names["logits"].grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(kdkernels.__all__) - {"CTCKDTerms"}))
def test_what_is_public_is_typed(name):
    public = getattr(kdkernels, name)
    assert (ROOT / "kdkernels/py.typed").exists()  # else type checkers do not look
    for function in (public.__init__, public.forward) if inspect.isclass(public) else (public,):
        signature = inspect.signature(function)
        types = [p.annotation for n, p in signature.parameters.items() if n != "self"]
        assert inspect.Signature.empty not in [*types, signature.return_annotation]
