"""Why a row is slow, on the machines of the committed results alone. A test demands a reason for
each such row; results from other machines are given none."""


def slower_because(cpu: str, op: str, shape: str) -> str | None:
    """Why another contender is faster at a row."""
    return SLOWER_BECAUSE.get(cpu, {}).get((op, shape))


def missed_because(cpu: str, op: str, shape: str, contender: str) -> str | None:
    """Why a floor is missed."""
    return MISSED_BECAUSE.get(cpu, {}).get((op, shape, contender))


SLOWER_BECAUSE: dict[str, dict[tuple[str, str], str]] = {}
ON_EPYC: dict[tuple[str, str, str], str] = {
    ("kd_loss", "(6400, 32)", "eager"): "A call costs 0.04 ms at the smallest size (see Cost of "
    "a call), which is half of what the floor allows, an eighth of eager's time.",
    ("kd_loss", "(6400, 32)", "copy"): "The copy of 1 MB takes less than a call costs.",
    ("kd_loss", "(8192, 1000)", "eager"): "This package takes 1.3 to 2 times as long as a copy; "
    "eager's time varies more than that from run to run, with the pages it gets.",
    ("kd_loss", "(1024, 32000)", "eager"): "Half of the copy bandwidth is used. "
    "Eager's time varies from run to run with the pages it gets.",
    ("ctc_loss", "(400, 16, 1000, 60)", "eager"): "Missed by less than the spread of the ratio.",
    ("ctc_loss", "(150, 16, 5000, 20)", "eager"): "Not profiled on this machine. This package "
    "uses three tenths of the copy bandwidth.",
    ("ctc_kd_loss", "(500, 32, 32, 100)", "separate"): "Fusing saves passes over the logits, "
    "which are small here, and leaves the recursion as it is. ctc_loss alone took from a half to "
    "four fifths of the time of the two; why this varies so much from run to run is not known.",
    ("ctc_kd_loss", "(400, 16, 1000, 60)", "eager"): "It takes three times as long as a copy of "
    "3 V. Missed by up to a tenth, about as much as eager's time varies.",
}
BOUND = "of the copy bandwidth is used; the rest depends on eager's time."
ON_XEON: dict[tuple[str, str, str], str] = {
    ("kd_loss", "(6400, 32)", "eager"): "A call costs 0.05 ms at the smallest size (see Cost of a "
    "call), and more where the logits push Python out of the caches; the backend's function alone, "
    "in a loop, takes 0.09 ms.",
    ("kd_loss", "(6400, 32)", "compile"): "As for eager torch: a call in Python, with the logits "
    "beside it in the caches, takes as long as the arithmetic.",
    ("kd_loss", "(6400, 32)", "copy"): "The copy of 1 MB takes less than a call costs.",
    ("kd_loss", "(4096, 5000)", "eager"): f"With huge pages for all: seven tenths {BOUND}",
    ("kd_loss", "(1024, 32000)", "eager"): f"Three quarters or more {BOUND}",
    ("ctc_loss", "(1000, 16, 128, 100)", "eager"): "Fetching the gradient's lines and taking the "
    "occupancies off them are a quarter of the time. An utterance's rows lie apart, those of the "
    "others between them; with its rows side by side in memory the same call is faster.",
    ("ctc_loss", "(400, 16, 1000, 60)", "eager"): f"Seven tenths {BOUND}",
    ("ctc_loss", "(150, 16, 5000, 20)", "eager"): f"All {BOUND}",
    ("ctc_kd_loss", "(500, 32, 32, 100)", "separate"): "Fusing saves passes over the logits, "
    "which are small here, and leaves the recursion as it is.",
    ("ctc_kd_loss", "(400, 16, 1000, 60)", "eager"): f"Two thirds or more {BOUND}",
}
MISSED_BECAUSE = {"AMD EPYC": ON_EPYC, "Intel(R) Xeon(R) Processor": ON_XEON}
