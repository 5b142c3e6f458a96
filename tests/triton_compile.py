"""Compiles the Triton kernels for a GPU that need not be there, and prints what the machine code
says: one JSON object a kernel. Run without TRITON_INTERPRET: `python tests/triton_compile.py 90`.

The backend is called on CPU tensors; launches are caught and compiled for the target instead.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

CAPABILITY = int(sys.argv[1])
keys = {}  # what a launch is compiled for -> what was read off it


def launch(function, *args, grid, warmup, num_warps=4, **_):
    signature, constexprs, attributes = {}, {}, {}
    for param, value in zip(function.params, args, strict=True):
        if param.is_constexpr or value is None:
            signature[param.name], constexprs[param.name] = "constexpr", value
        else:
            signature[param.name] = param.annotation_type or mangle_type(value)
            if isinstance(value, torch.Tensor) and value.data_ptr() % 16 == 0:
                attributes[(param.num,)] = [["tt.divisibility", 16]]
    key = (function.__name__, str(signature), str(constexprs), str(attributes), num_warps)
    if key not in keys:
        source = ASTSource(function, signature, constexprs, attributes)
        kernel = triton.compile(
            source,
            target=GPUTarget("cuda", CAPABILITY, 32),
            options={"num_warps": num_warps},
        )
        keys[key] = {"kernel": function.__name__, "case": CASE, **read(kernel)}


def read(kernel):
    """Counts of the machine code."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(kernel.asm["ptx"])
        ptx.flush()
        path = get_ptxas(CAPABILITY)
        path = getattr(path, "path", path)
        path = path[0] if isinstance(path, tuple) else path
        arch = f"sm_{CAPABILITY}" + ("a" if CAPABILITY == 90 else "")
        log = subprocess.run(
            [path, "-v", f"--gpu-name={arch}", ptx.name, "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    text = kernel.asm["ptx"]
    number = lambda pattern: int(re.search(pattern, log).group(1))  # noqa: E731
    return {
        "registers": number(r"Used (\d+) registers"),
        "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "stack": number(r"(\d+) bytes stack frame"),
        "exponentials": len(re.findall(r"ex2\.approx", text)),
        "wide_loads": len(
            re.findall(r"ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64", text)
        ),
        "loads": len(re.findall(r"ld\.global", text)),
        "shuffles": len(re.findall(r"shfl\.sync", text)),
        "barriers": len(re.findall(r"bar\.sync|barrier\.sync", text)),
    }


CASE = ""


def case(name, function, *args):
    global CASE
    CASE = name
    function(*args)


def main():
    JITFunction.run = launch
    from kdkernels.backends import triton as backend

    def logits(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype)

    half = torch.bfloat16
    kl = (None, 1.0, 1.0, "forward_kl", 0.5, "mean", True, True, False)
    full = torch.float32
    rows = ((32, full), (5000, full), (5000, half), (16384, full), (32000, full), (128256, half))
    for C, dtype in rows:
        x = logits(64, C, dtype=dtype)
        case(f"kd_loss {C} {dtype}", backend.kd_loss_forward, x, x, *kl)
    both = (torch.ones(64), 1.0, 1.0, "forward_kl", 0.5, "none", True, True, True)
    for C, dtype in ((100, full), (5000, torch.float16), (16384, full)):
        x = logits(64, C, dtype=dtype)
        case(f"kd_loss {C} float64 for the teacher", backend.kd_loss_forward, x, x, *both)
    case("scale_grad", backend.scale_grad_, logits(64, 5000), torch.ones(()))
    jsd = (torch.ones(64), 2.0, 1.0, "jsd", 0.5, "mean", True, True, True)
    case("kd_loss jsd", backend.kd_loss_forward, logits(64, 500), logits(64, 500), *jsd)
    wide = logits(64, 500, dtype=torch.float64)
    case("kd_loss float64", backend.kd_loss_forward, wide, wide, *kl)

    def ctc(T, N, C, S, dtype=torch.float32):
        lengths = torch.full((N,), T), torch.full((N,), S)
        return logits(T, N, C, dtype=dtype), torch.ones(N, S, dtype=torch.int64), *lengths

    for shape in ((500, 2, 32, 20), (500, 2, 32, 100), (3000, 1, 32, 1200)):
        case(f"ctc_loss {shape}", backend.ctc_loss_forward, *ctc(*shape), 0, "mean", False, True)
    shape = (400, 2, 5000, 60)
    case("ctc_loss bf16", backend.ctc_loss_forward, *ctc(*shape, half), 0, "mean", False, True)
    wide = ctc(50, 2, 20, 15, torch.float64)
    case("ctc_loss float64", backend.ctc_loss_forward, *wide, 0, "sum", True, True)
    x, *rest = ctc(*shape)
    tail = (None, None, 0, "mean", False, 0.5, 0.5, 1.0, 1.0, "forward_kl", 0.5, True, True, False)
    case("ctc_kd_loss", backend.ctc_kd_loss_forward, x, x, *rest, *tail)
    lengths, labels = rest[1:], torch.ones(120, dtype=torch.int64)
    for dtype in (full, torch.float16):
        y, flags = x.to(dtype), (torch.ones(2, dtype=torch.bool), torch.ones(400, 2))
        tail_two = (0, "none", True, 0.5, 0.5, 2.0, 2.0, "forward_kl", 0.5, True, True, False)
        case("concatenated, labelled", backend.ctc_kd_loss_forward, y, x, labels, *lengths, *flags,
             *tail_two)  # fmt: skip
        case("posteriors", backend.ctc_posteriors, y, *rest, 0)
    case("ctc_loss S = 400", backend.ctc_loss_forward, *ctc(2000, 2, 32, 400), 0, "mean", False,
         True)  # fmt: skip
    case("ctc_align", backend.ctc_align, *ctc(500, 2, 32, 100), 0)
    for result in keys.values():
        print(json.dumps(result))

    # Other batches, of which nothing may be compiled again.
    before = set(keys)
    for rows in (1, 77, 4096):
        case(f"{rows} rows", backend.kd_loss_forward, logits(rows, 5000), logits(rows, 5000), *kl)
    for T, N in ((20, 3), (60, 2), (61, 1), (77, 1), (100, 5), (128, 64)):  # T <= S too
        x, *rest = ctc(T, N, 32, 20)
        case(f"{T} frames, {N}", backend.ctc_loss_forward, x, *rest, 0, "mean", False, True)
        x, *rest = ctc(T, N, 5000, 60)
        case(f"{T} frames, {N}", backend.ctc_kd_loss_forward, x, x, *rest, *tail)
    new = [keys[key] for key in keys if key not in before]
    print(json.dumps({"again": {"before": len(before), "compiled": new}}))


if __name__ == "__main__":
    main()
