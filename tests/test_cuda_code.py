"""What the CUDA kernels became, read off their machine code: no GPU is needed, only nvcc.

Those that training spends its time in spill nothing, rows are read 16 bytes at a time, and the
recursion has no special function and no local memory in its frames.
"""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent.parent / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")

# By name, without those that make float64 gradients beside.
ROWS = r"(kl_kernel|kl_gradient_kernel)I.*ELb0EEE"
STATISTICS = r"statistics_kernelI(f|N.*Float16E|S\d_)fLb"
RECURSION = r"recursion_kernelIf"


def _tool(name):
    """nvcc's own, or that of Triton's package."""
    path = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if path is None:
        triton = importlib.util.find_spec("triton")
        if triton is not None:
            path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
    if path is None or not Path(path).exists():
        pytest.skip(f"{name} is installed neither with nvcc nor with triton")
    return str(path)


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def built(request, tmp_path_factory):
    """{name of a source: (cubin, what ptxas said)}"""
    folder = tmp_path_factory.mktemp(request.param)
    jobs = {}
    for name in ("kd_loss", "ctc_loss", "scale_grad"):
        cubin = folder / f"{name}.cubin"
        command = [NVCC, "-std=c++17", "-O3", f"-arch={request.param}", "-cubin", "-Xptxas", "-v"]
        command += [f"-I{SOURCES}", SOURCES / "cuda" / f"{name}.cu", "-o", cubin]
        pipe = subprocess.PIPE
        jobs[name] = cubin, subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    result = {}
    for name, (cubin, process) in jobs.items():
        _, said = process.communicate()
        assert process.returncode == 0, said
        assert "warning" not in said, said
        result[name] = cubin, said
    return result


def _resources(built):
    """{kernel: (bytes of stack, bytes of spills)}"""
    text = "\n".join(said for _, said in built.values())
    pattern = (
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads"
    )
    found = re.findall(pattern, text, re.DOTALL)
    assert found
    return {name: (int(stack), int(a) + int(b)) for name, stack, a, b in found}


@pytest.mark.parametrize("kernels", [RECURSION, STATISTICS])
def test_nothing_spills(built, kernels):
    chosen = {k: v for k, v in _resources(built).items() if re.search(kernels, k)}
    assert chosen
    assert {k: v for k, v in chosen.items() if v[1]} == {}


def _machine_code(built, name):
    """{kernel: its instructions}"""
    text = subprocess.run(
        [_tool("nvdisasm"), "-c", built[name][0]], capture_output=True, text=True, check=True
    ).stdout
    parts = re.split(r"^\.text\.(\w+):", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_rows_are_read_16_bytes_at_a_time(built):
    kernels = {k: v for k, v in _machine_code(built, "kd_loss").items() if re.search(ROWS, k)}
    assert kernels
    for name, code in kernels.items():
        assert re.search(r"LDG\.E[.\w]*\.128", code), name
        assert re.search(r"STG\.E[.\w]*\.128", code), name


def test_recursion_has_no_special_function_in_its_frames(built):
    """Frames are where lanes shuffle; exponentials and logarithms come before and after."""
    kernels = {k: v for k, v in _machine_code(built, "ctc_loss").items() if re.search(RECURSION, k)}
    assert kernels
    for name, code in kernels.items():
        for loop in _loops(code):
            if len(re.findall(r"SHFL\.UP", loop)) >= 4:
                assert "MUFU" not in loop, name
                assert "LDL" not in loop, name
                assert "STL" not in loop, name


def _loops(code):
    """The innermost loops: from a label to a branch back to it, without another in between."""
    lines = code.splitlines()
    labels = {m[1]: i for i, x in enumerate(lines) if (m := re.match(r"\s*\.?(L_x_\d+):", x))}
    spans = []
    for i, line in enumerate(lines):
        if (m := re.search(r"BRA.*`\(\.?(L_x_\d+)\)", line)) and labels.get(m[1], i) < i:
            spans.append((labels[m[1]], i))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return ["\n".join(lines[a : b + 1]) for a, b in inner]
