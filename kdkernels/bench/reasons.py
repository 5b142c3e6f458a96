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
CALL = (
    "A call costs 0.07 ms at the smallest size (see Cost of a call); the backend's function takes "
    "0.08 ms in a loop of its own."
)
ZEROED = "of the time the system zeroes the new pages of the gradient (perf, in a loop of it alone)"
ON_XEON: dict[tuple[str, str, str], str] = {
    ("kd_loss", "(6400, 32)", "eager"): CALL,
    ("kd_loss", "(6400, 32)", "compile"): CALL,
    ("kd_loss", "(6400, 32)", "copy"): "The copy of 1 MB takes less than a call costs.",
    ("kd_loss", "(8192, 1000)", "eager"): "Ours takes 1.5 times a copy; eager's own time differs "
    "with the pages it is given.",
    ("kd_loss", "(4096, 5000)", "eager"): "With huge pages for all: ours takes 1.2 times a copy, "
    "and eager's time is less than with small ones.",
    ("kd_loss", "(1024, 32000)", "eager"): f"Ours takes 1 to 1.4 times a copy; 43 % {ZEROED}.",
    ("ctc_loss", "(1000, 16, 128, 100)", "eager"): "By a tenth or less. An utterance's rows lie "
    "8 KB apart: a row takes 128 ns here and 77 where there is one utterance, of 360 in all (time "
    "stamps in the kernel).",
    ("ctc_loss", "(400, 16, 1000, 60)", "eager"): "By about a tenth; 4 fifths of the copy "
    "bandwidth are used.",
    ("ctc_loss", "(150, 16, 5000, 20)", "eager"): f"41 % {ZEROED}.",
    ("ctc_kd_loss", "(500, 32, 32, 100)", "separate"): "Fusing saves passes over the logits, small "
    "here, and leaves the recursion as it is.",
    ("ctc_kd_loss", "(400, 16, 1000, 60)", "eager"): "By less than the spread of the ratio.",
}
MISSED_BECAUSE = {"AMD EPYC": ON_EPYC, "Intel(R) Xeon(R) Processor": ON_XEON}
