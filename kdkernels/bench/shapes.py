"""The one table of shapes. Every benchmark runs these rows and no others.

A floor is what is accepted at the least on two CPU cores in float32, from raw logits to gradient.
`eager`, `compile`: that many times as fast as torch. `copy`, `separate`: at most that many times
the time of copying the logits into new memory (COPIES of them), or of this package's two losses in
turn.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    op: str
    T: int  # frames; 1 for kd_loss, which sees rows only
    N: int  # utterances; rows for kd_loss
    C: int  # classes
    S: int = 0  # labels of the longest target
    note: str = ""
    varying: bool = False  # lengths differ from utterance to utterance
    floors: dict[str, float] | None = None
    divergence: str = "forward_kl"

    @property
    def label(self) -> str:
        sizes = (self.N, self.C) if self.op == "kd_loss" else (self.T, self.N, self.C, self.S)
        label = f"({', '.join(map(str, sizes))})"
        if self.divergence != "forward_kl":
            label += f" {self.divergence}"
        return label + (" varying" if self.varying else "")

    @property
    def numel(self) -> int:
        """Elements of one logit tensor."""
        return self.T * self.N * self.C


def _kd(rows, C, note, divergence="forward_kl", **floors):
    return Shape("kd_loss", 1, rows, C, 0, note, False, floors, divergence)


def _ctc(op, T, N, C, S, note, varying=False, **floors):
    return Shape(op, T, N, C, S, note, varying, floors)


SHAPES = [
    _kd(6400, 32, "characters, 16 utterances of 400 frames", eager=8, compile=4, copy=2),
    _kd(8192, 1000, "subwords", eager=12, compile=4, copy=2),
    _kd(4096, 5000, "large subword vocabulary", eager=15, compile=4, copy=2),
    _kd(1024, 32000, "language model", eager=20, compile=4, copy=2),
    _kd(512, 51865, "Whisper"),
    _kd(128, 128256, "language model, large vocabulary"),
    _kd(4096, 5000, "large subword vocabulary, reverse KL", "reverse_kl"),
    _kd(4096, 5000, "large subword vocabulary, Jensen-Shannon", "jsd"),
    _kd(64, 32, "smallest call"),
    _ctc("ctc_loss", 500, 32, 32, 100, "characters", eager=20),
    _ctc("ctc_loss", 500, 32, 32, 100, "characters, real batch", varying=True),
    _ctc("ctc_loss", 1000, 16, 128, 100, "phones", eager=20),
    _ctc("ctc_loss", 2000, 4, 32, 400, "long utterances", eager=20),
    _ctc("ctc_loss", 150, 64, 28, 40, "short utterances", eager=15),
    _ctc("ctc_loss", 400, 16, 1000, 60, "subwords", eager=12),
    _ctc("ctc_loss", 150, 16, 5000, 20, "large subword vocabulary", eager=12, copy=1.5),
    _ctc("ctc_loss", 100, 128, 32, 20, "short utterances, large batch"),
    _ctc("ctc_loss", 3000, 1, 32, 500, "one long utterance"),
    _ctc("ctc_loss", 50, 16, 20, 15, "smallest call"),
    _ctc("ctc_kd_loss", 500, 32, 32, 100, "characters", eager=20, separate=0.75),
    _ctc("ctc_kd_loss", 500, 32, 32, 100, "characters, real batch", varying=True),
    _ctc("ctc_kd_loss", 400, 16, 1000, 60, "subwords", eager=15, separate=0.75),
    _ctc("ctc_kd_loss", 150, 16, 5000, 20, "large subword vocabulary"),
    _ctc("ctc_kd_loss", 200, 1, 51865, 40, "Whisper's vocabulary, one utterance"),
    _ctc("ctc_kd_loss", 50, 16, 20, 15, "smallest call"),
    _ctc("ctc_align", 500, 32, 32, 100, "characters"),
    _ctc("ctc_align", 400, 16, 1000, 60, "subwords"),
    _ctc("ctc_align", 3000, 1, 32, 500, "one long utterance"),
    _ctc("ctc_align", 50, 16, 20, 15, "smallest call"),
]

# Sizes that run in a blink: for trying the scripts, not for measuring.
TINY = [
    _kd(32, 16, "tiny", eager=1, compile=1, copy=100),
    _kd(32, 16, "tiny", "reverse_kl"),
    _kd(32, 16, "tiny", "jsd"),
    _ctc("ctc_loss", 20, 3, 8, 4, "tiny", eager=1, copy=100),
    _ctc("ctc_loss", 20, 3, 8, 4, "tiny", varying=True),
    _ctc("ctc_kd_loss", 20, 3, 8, 4, "tiny", eager=1, separate=100),
    _ctc("ctc_align", 20, 3, 8, 4, "tiny"),
]

# Logit tensors that a copy must move to equal the least traffic of the operator: 3 V read or
# written are 1.5 copies. CTC is held to 3 copies.
COPIES = {"kd_loss": 1.5, "ctc_loss": 3.0, "ctc_kd_loss": 3.0, "ctc_align": 0.5}

OPS = ("kd_loss", "ctc_loss", "ctc_kd_loss", "ctc_align")


def select(op: str | None = None, tiny: bool = False, sizes: str | None = None) -> list[Shape]:
    """The rows of one operator, or of all; only those whose label contains `sizes`."""
    rows = TINY if tiny else SHAPES
    return [s for s in rows if op in (None, s.op) and (sizes or "") in s.label]
