"""`python -m kdkernels.asr.export RUN model.onnx`: a student for ONNX Runtime, checked by torch.

Inputs `features` float32 [N, frames, MELS] and `lengths` int64 [N], as the encoder's; outputs
`logits` float32 [N, frames // STACK, C] and `logit_lengths` int64 [N]. N and frames are free. The
model's metadata, "kdkernels", is JSON: the alphabet (class 0 is blank, class i its character
i - 1), by how many frames labels come late, and the parameters of the features.

The graph is the encoder alone. `kdkernels.transcribe` also keeps pauses from it (frontend.py): of a
recording with pauses, its logits differ from the graph's.
"""

import argparse
import io
import json
import sys
import warnings
from pathlib import Path

import torch

import kdkernels as kd

from .extras import missing, needed

with needed():
    from . import audio, features
    from .files import TrainError, write_bytes
    from .model import STACK
    from .recognise import Recogniser, load

TOLERANCE = 1e-4  # between the logits of ONNX Runtime and torch
SHAPES = ((2, 90), (1, STACK), (3, 301))  # checked: no size may be baked into the graph


def packages():
    """(onnx, onnxruntime), or what to do about it."""
    try:
        import onnx
        import onnxruntime
    except ModuleNotFoundError as error:
        raise TrainError(missing(error.name, "export")) from error
    return onnx, onnxruntime


def export(recogniser: Recogniser, path: Path) -> float:
    """Write `path`; returns the largest difference of a logit between ONNX Runtime and torch.

    Raises:
        TrainError: a package is missing, the two disagree, or `path` cannot be written.
    """
    if not path.parent.exists():
        raise TrainError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    onnx, _ = packages()
    graph = onnx.load_from_string(_graph(recogniser))
    facts = {
        "alphabet": recogniser.alphabet.characters,
        "frames_per_second": recogniser.encoder.frames_per_second,
        "frame_shift": recogniser.encoder.shift,
        "sample_rate": audio.SAMPLE_RATE,
        "mels": features.MELS,
        "hop": features.HOP,
        "window": features.WINDOW,
        "fft": features.FFT,
        "kdkernels": kd.__version__,
    }
    onnx.helper.set_model_props(graph, {"kdkernels": json.dumps(facts)})
    onnx.checker.check_model(graph, full_check=True)
    content = graph.SerializeToString()
    difference = compare(recogniser, content)
    if not difference < TOLERANCE:
        raise TrainError(f"ONNX Runtime's logits differ from torch's by {difference:.0e}")
    write_bytes(path, content)
    return difference


def _graph(recogniser: Recogniser) -> bytes:
    """Exported through TorchScript: the newer exporter needs two more packages for the same
    graph."""
    N, frames = SHAPES[0]
    example = torch.zeros(N, frames, features.MELS), torch.tensor([frames, frames // 2])
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "Constant folding", UserWarning)  # of the padding
        torch.onnx.export(
            recogniser.encoder,
            example,
            buffer,
            dynamo=False,
            input_names=["features", "lengths"],
            output_names=["logits", "logit_lengths"],
            dynamic_axes={
                "features": {0: "N", 1: "frames"},
                "lengths": {0: "N"},
                "logits": {0: "N", 1: "T"},
                "logit_lengths": {0: "N"},
            },
        )
    return buffer.getvalue()


def compare(recogniser: Recogniser, content: bytes) -> float:
    """The largest difference of a logit over batches of several sizes, lengths varying."""
    _, onnxruntime = packages()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for N, frames in SHAPES:
        x = torch.randn(N, frames, features.MELS, generator=generator)
        lengths = torch.randint(STACK, frames + 1, (N,), generator=generator)
        with torch.no_grad():
            expected, expected_lengths = recogniser.encoder(x, lengths)
        logits, logit_lengths = session.run(
            ["logits", "logit_lengths"], {"features": x.numpy(), "lengths": lengths.numpy()}
        )
        if logits.shape != expected.shape or logit_lengths.tolist() != expected_lengths.tolist():
            return float("inf")
        worst = max(worst, (torch.from_numpy(logits) - expected).abs().max().item())
    return worst


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kdkernels.asr.export",
        description="Write a trained model as ONNX and check it with ONNX Runtime.",
    )
    parser.add_argument("model", metavar="RUN", help="as --model of python -m kdkernels.transcribe")
    parser.add_argument("onnx", metavar="FILE", help="what to write, e.g. student.onnx")
    chosen = parser.parse_args(arguments)
    try:
        difference = export(load(Path(chosen.model)), Path(chosen.onnx))
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{chosen.onnx}: its logits are those of torch to {difference:.0e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
