"""What the CUDA kernels became, read off the machine code of the installed extension: no GPU is
needed, only a build with nvcc.

Those that training spends its time in spill nothing, rows are read 16 bytes at a time, and the
recursion has no special function and no local memory in its frames.
"""

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch  # noqa: F401  # before the extension
from helpers import randn

import kdkernels as kd

_C = pytest.importorskip("kdkernels._C")
if not hasattr(_C, "cuda"):
    pytest.skip("kdkernels is installed without nvcc", allow_module_level=True)

# By name. Those that make a float64 gradient beside (ELb1) read rows in any way for it.
ROWS = r"(kl_kernelI(f|N.*BFloat16E)|kl_gradient_kernelIf).*ELb0EEE"
KL = r"(kl_kernel|kl_gradient_kernel)I"
STATISTICS = r"statistics_kernelI(f|N.*Float16E|S\d_)fLb"
RECURSION = r"recursion_kernelIf"
GRADIENT = r"\d\dgradient_kernelI"  # of CTC alone
A_FEW = {"sm_80": 16, "sm_90": 0}  # bytes, of its variants with blocks of 1024 threads


def _tool(name):
    """CUDA's own, or that of Triton's package."""
    path = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if path is None:
        triton = importlib.util.find_spec("triton")
        if triton is not None:
            path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
    if path is None or not Path(path).exists():
        pytest.skip(f"{name} is installed neither with nvcc nor with triton")
    return str(path)


def _cuobjdump(*options):
    command = [_tool("cuobjdump"), *options, _C.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def _resources(arch):
    """{kernel: bytes of stack, which is where spilled registers go}"""
    parts = re.split(r"^arch = ", _cuobjdump("-res-usage"), flags=re.MULTILINE)
    text = "\n".join(part for part in parts if part.startswith(arch))
    found = dict(re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+)", text))
    assert found, f"no machine code for {arch}"
    return {name: int(stack) for name, stack in found.items()}


@functools.cache
def _machine_code(arch, kernels):
    """{kernel: [(address, instruction)]} of the kernels whose names match."""
    names = [name for name in _resources(arch) if re.search(kernels, name)]
    assert names
    parts = re.split(
        r"Function : (\w+)", _cuobjdump("-sass", "-arch", arch, "-fun", ",".join(names))
    )[1:]
    lines = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
    result = {
        name: [(int(a, 16), code) for a, code in lines.findall(text)]
        for name, text in zip(parts[::2], parts[1::2], strict=True)
        if name in names
    }
    assert set(result) == set(names)
    return result


ARCHS = pytest.mark.parametrize("arch", ["sm_80", "sm_90"])


@ARCHS
@pytest.mark.parametrize("kernels", [RECURSION, STATISTICS, KL])
def test_nothing_spills(arch, kernels):
    chosen = {k: v for k, v in _resources(arch).items() if re.search(kernels, k)}
    assert chosen
    assert {k: v for k, v in chosen.items() if v} == {}


@ARCHS
def test_the_gradient_of_ctc_spills_next_to_nothing(arch):
    stacks = [v for k, v in _resources(arch).items() if re.search(GRADIENT, k)]
    assert stacks
    assert max(stacks) <= A_FEW[arch]


@ARCHS
def test_rows_are_read_16_bytes_at_a_time(arch):
    for name, code in _machine_code(arch, f"{ROWS}|{STATISTICS}").items():
        assert any(re.search(r"LDG\.E[.\w]*\.128", x) for _, x in code), name
        if re.search(ROWS, name):
            assert any(re.search(r"STG\.E[.\w]*\.128", x) for _, x in code), name


def _pieces(code):
    """Straight code: from a branch, or where a loop begins, to the next. Jumps to and from where
    lanes that diverged are dealt with, past the end (BRA.DIV), are none."""
    end = max(a for a, x in code if re.search(r"\bEXIT\b", x))
    starts = {
        int(m[1], 16)
        for a, x in code
        if (m := re.search(r"\bBRA\b(?!\.DIV).*?0x([0-9a-f]+)", x)) and int(m[1], 16) < a < end
    }
    pieces = [[]]
    for address, x in code:
        if address in starts:
            pieces.append([])
        pieces[-1].append(x)
        if re.search(r"\b(BRA(?!\.DIV)|BSYNC|BAR|EXIT|WARPSYNC)\b", x):
            pieces.append([])
    return pieces


# Instructions of a frame for each pair of (blank, label). Ampere has no addition with a maximum.
MOST = {"sm_80": 36, "sm_90": 32}


@ARCHS
def test_frames_of_the_recursion(arch):
    """A chunk of frames is straight code: no barrier, two shuffles a frame. All of it counts: the
    loads, stores, shuffles, addresses, normalisation. No special function, no local memory."""
    for name, code in _machine_code(arch, RECURSION).items():
        pairs, frames = map(int, re.search(r"recursion_kernelIfLi(\d)ELi(\d)E", name).groups())
        chunks = [x for x in _pieces(code) if sum("SHFL.UP" in i for i in x) == 2 * frames]
        assert len(chunks) >= 4, name  # of both directions, of the first half and of the second
        for chunk in chunks:
            assert len(chunk) / frames <= MOST[arch] * pairs, (name, len(chunk) / frames / pairs)
            assert not any(re.search(r"\b(MUFU|LDL|STL)\b", x) for x in chunk), name


@pytest.mark.parametrize(("C", "each"), [(8, 2), (512, 2), (8192, 2), (16384, 4)])
def test_exponentials_of_a_class(C, each):
    """Two where the row stays on chip, four in two visits: counted while the kernel runs."""
    emulated = pytest.importorskip("kdkernels_emulated")
    s, t = randn(3, C, seed=1).float().requires_grad_(), randn(3, C, seed=2, scale=2).float()
    before = emulated.exponentials()
    kd.kd_loss(s, t, temperature=2.0, backend="cuda_emulated").backward()
    count = emulated.exponentials() - before
    rows = 3
    if C <= 256:  # a block takes all the rows it can hold, classes past the end included
        rows, C = 64 * (rows // 64 + 1), 4 * 8
    # A maximum that grows scales down what was summed before.
    assert each * rows * C <= count <= each * rows * C * (1.0 if each == 2 else 1.1)
