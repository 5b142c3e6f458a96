"""How time grows with each size, and what share of a training step the loss takes."""

from functools import partial

import torch

from .contenders import EAGER, OURS, contenders, make_inputs
from .shapes import Shape
from .timing import medians

# Which size grows, its values, and the shape whose other sizes stay.
SWEEPS = [
    ("T", (100, 200, 400, 800, 1600, 3200), Shape("ctc_loss", 0, 8, 32, 40)),
    ("N", (1, 2, 4, 8, 16, 32, 64, 128), Shape("ctc_loss", 200, 0, 32, 40)),
    ("C", (32, 128, 512, 2048, 8192), Shape("ctc_loss", 100, 8, 0, 20)),
    ("S", (10, 20, 40, 80, 160, 320), Shape("ctc_loss", 800, 4, 32, 0)),
    ("N", (16, 64, 256, 1024, 4096, 16384), Shape("kd_loss", 1, 0, 1000)),
    ("C", (32, 256, 2048, 16384, 131072), Shape("kd_loss", 1, 64, 0)),
]
ROUNDS = 7


def scaling(args) -> list[dict]:
    """One entry a sweep: seconds of ours and of eager torch at each value."""
    sweeps = []
    for axis, values, base in SWEEPS:
        points = []
        for value in values[:2] if args.tiny else values:
            shape = base._replace(**{axis: value})
            two = contenders(shape, make_inputs(shape), args.backend, only=("ours", "eager"))
            times = medians({n: c.step for n, c in two.items()}, ROUNDS)
            points.append({"x": value, "logit_bytes": 4 * shape.numel} | times)
        name = "rows" if (base.op, axis) == ("kd_loss", "N") else axis
        others = {f: getattr(base, f) for f in "TNCS" if f != axis and getattr(base, f)}
        if base.op == "kd_loss":
            others = {"C": base.C} if axis == "N" else {"rows": base.N}
        sweeps.append({"op": base.op, "axis": name, "others": others, "points": points})
    return sweeps


def training_step(args) -> list[dict]:
    """Seconds of a training step of the training program's student with the fused loss, with
    torch's, and with none (the gradient is ready-made)."""
    try:
        from kdkernels.asr.features import MELS
        from kdkernels.asr.model import STACK, Encoder
    except ModuleNotFoundError as error:
        print(f"training step: not measured without {error.name}; install kdkernels[train]")
        return []

    backwards = {
        "ours": lambda i, x: OURS["ctc_kd_loss"](i, x, backend=args.backend).backward(),
        "eager": lambda i, x: EAGER["ctc_kd_loss"](i, x).backward(),
        "idle": lambda i, x: x.backward(i.student.detach()),
    }
    results = []
    for C in (32,) if args.tiny else (32, 1000, 5000):
        T, N, S = (20, 2, 4) if args.tiny else (200, 8, 40)
        torch.manual_seed(0)
        inputs = make_inputs(Shape("ctc_kd_loss", T, N, C, S))
        model = Encoder(width=128, layers=5, classes=C)
        features, lengths = torch.randn(N, T * STACK, MELS), torch.full((N,), T * STACK)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step(backward, inputs=inputs, model=model, optimizer=optimizer, x=(features, lengths)):
            optimizer.zero_grad(set_to_none=True)
            logits, _ = model(*x)
            backward(inputs, logits.transpose(0, 1))
            optimizer.step()

        steps = {name: partial(step, backward) for name, backward in backwards.items()}
        times = medians(steps, args.rounds)
        results.append(
            {
                "shape": f"({T}, {N}, {C}, {S})",
                "parameters": model.parameter_count(),
                "seconds": times,
                "share": {n: 1 - times["idle"] / times[n] for n in ("ours", "eager")},
            }
        )
    return results
