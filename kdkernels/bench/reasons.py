"""Why a row is as it is, on the machines of the committed results alone: a test wants these
reasons, and no other machine is told them."""


def slower_because(cpu: str, op: str, shape: str) -> str | None:
    """Why another contender is faster at a row."""
    return SLOWER_BECAUSE.get(cpu, {}).get((op, shape))


def missed_because(cpu: str, op: str, shape: str, contender: str) -> str | None:
    """Why a floor is missed."""
    return MISSED_BECAUSE.get(cpu, {}).get((op, shape, contender))


SLOWER_BECAUSE: dict[str, dict[tuple[str, str], str]] = {}
ON_EPYC: dict[tuple[str, str, str], str] = {
    ("kd_loss", "(6400, 32)", "eager"): "A call costs 0.04 ms at the smallest size (see Cost of "
    "a call), half of an eighth of eager's time.",
    ("kd_loss", "(6400, 32)", "copy"): "The copy of 1 MB takes less than a call costs.",
    ("kd_loss", "(8192, 1000)", "eager"): "Ours takes between 1.3 and 2 times a copy; eager's "
    "own time differs more from run to run, with the pages it is given.",
    ("kd_loss", "(1024, 32000)", "eager"): "Half of the copy bandwidth is used. "
    "Eager differs from run to run with the pages it is given.",
    ("ctc_loss", "(400, 16, 1000, 60)", "eager"): "By less than the spread of the ratio.",
    ("ctc_loss", "(150, 16, 5000, 20)", "eager"): "Not profiled there. Ours uses 3 tenths of the "
    "copy bandwidth.",
    ("ctc_kd_loss", "(500, 32, 32, 100)", "separate"): "Fusing saves passes over the logits, small "
    "here, and leaves the recursion as it is. ctc_loss alone took from a half to four fifths of "
    "the time of the two, from run to run: why it differs so much is not known.",
    ("ctc_kd_loss", "(400, 16, 1000, 60)", "eager"): "It takes three times a copy of 3 V; up to a "
    "tenth is missing, about what eager's time differs by.",
}
BOUND = "of the copy bandwidth are used: the rest depends on eager's time."
ON_XEON: dict[tuple[str, str, str], str] = {
    ("kd_loss", "(6400, 32)", "eager"): "A call costs 0.05 ms at the smallest size (see Cost of a "
    "call), and more where the logits push Python out of the caches; the backend's function takes "
    "0.09 ms of it in a loop of its own.",
    ("kd_loss", "(6400, 32)", "copy"): "The copy of 1 MB takes less than a call costs.",
    ("kd_loss", "(4096, 5000)", "eager"): f"With huge pages for all: 7 tenths {BOUND}",
    ("kd_loss", "(1024, 32000)", "eager"): f"Three quarters and more {BOUND}",
    ("ctc_loss", "(400, 16, 1000, 60)", "eager"): f"Seven tenths {BOUND}",
    ("ctc_loss", "(150, 16, 5000, 20)", "eager"): f"All {BOUND}",
    ("ctc_kd_loss", "(500, 32, 32, 100)", "separate"): "Fusing saves passes over the logits, small "
    "here, and leaves the recursion as it is.",
    ("ctc_kd_loss", "(400, 16, 1000, 60)", "eager"): f"Two thirds and more {BOUND}",
}
MISSED_BECAUSE = {"AMD EPYC": ON_EPYC, "Intel(R) Xeon(R) Processor": ON_XEON}
