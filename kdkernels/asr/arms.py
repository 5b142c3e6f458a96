"""The arms of the experiment, as data: what each student hears, and what it learns from it."""

from typing import NamedTuple


class Arm(NamedTuple):
    """One student. Everything else is the same for all: seed, steps, audio in a step."""

    title: str  # its row in the report
    hears: dict[str, str]  # set of `data.Corpora` -> transcripts: "human", "teacher" or "" (none)
    teacher: str = ""  # whose logits it is distilled from: "teacher" or an arm; "": CTC alone
    start: str = ""  # the arm whose weights it starts from
    streaming: bool = False  # sees no more of the future than its chunk

    @property
    def only_distilled(self) -> bool:
        """No utterance has a transcript: there is no CTC term."""
        return not any(self.hears.values())


MIXED = {"student": "human", "untranscribed": ""}

ARMS = {
    "alone": Arm("student alone", {"student": "human"}),
    "distilled": Arm("student distilled", MIXED, "teacher"),
    "distilled_without_transcripts": Arm(
        "student distilled, no transcript", {"student": "", "untranscribed": ""}, "teacher"
    ),
    "transcribed": Arm("student, everything transcribed", {"transcribed": "human"}),
    "pseudo_labels": Arm(
        "student on the teacher's transcripts", {"student": "human", "untranscribed": "teacher"}
    ),
    "second_generation": Arm("student distilled from that student", MIXED, "distilled"),
    "streaming_alone": Arm("streaming student alone", {"student": "human"}, streaming=True),
    "streaming": Arm("streaming student distilled", MIXED, "teacher", streaming=True),
    "noisy": Arm("student adapted to noise", {"noisy": ""}, "teacher", start="distilled"),
}


class Teacher(NamedTuple):
    """One teacher of our own."""

    title: str
    transcripts: int | None  # the first ones of the transcribed set; None: all
    ssl: bool  # starts from the self-supervised stage, when there is one


FEW = 50
OWN = Teacher("teacher", None, True)
TEACHERS = {
    "scratch": Teacher("teacher, not self-supervised", None, False),
    "few": Teacher(f"teacher on {FEW} transcripts", FEW, True),
    "few_scratch": Teacher(f"teacher on {FEW} transcripts, not self-supervised", FEW, False),
}

# Every model that a run may train: the name of its file -> its row in the report.
TITLES = {
    "teacher": OWN.title,
    **{f"teacher_{name}": teacher.title for name, teacher in TEACHERS.items()},
    **{f"student_{name}": arm.title for name, arm in ARMS.items()},
}
