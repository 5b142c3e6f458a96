"""report.md, which anyone reads in a minute, from what report.json holds."""

from .arms import ARMS, TEACHERS, TITLES

CAPTIONS = ("captions.wav", "captions.vtt", "captions.srt")


def markdown(r: dict) -> str:
    """The report as a page."""
    counts = r["corpus"]["utterances"]
    synthesised = r["corpus"]["speech"] != "recorded"
    unseen = "unseen voices and sentences, " if synthesised else ""
    seeds = r.get("seeds")
    drawn = f"seeds {', '.join(map(str, seeds))}" if seeds else f"seed {r['settings']['seed']}"
    first = f"seed-{seeds[0]}/" if seeds else ""
    links = ", ".join(f"[{name}]({first}{name})" for name in CAPTIONS)
    return "\n".join(
        [
            "# Distillation report",
            "",
            f"Word error rate on {counts['test']} utterances ({unseen}95 % bootstrap interval), "
            "in percent; lower is better.",
            "",
            *error_rates(r),
            "",
            "Transcripts: human ones that the model learned from. CER: character error rate. Steps "
            "and seconds: of the model's own training. Dev: the utterances that the curves are "
            "measured on.",
            "",
            *findings(r),
            "",
            "![dev WER against steps and seconds](wer.png) ![cost of the loss](loss.png)",
            "",
            f"The first test utterances, one after the other, with the distilled student's "
            f"captions: {links}.",
            "",
            *examples(r),
            "",
            "Dev WER against steps:",
            "",
            *curves(r),
            "",
            f"Corpus sha256 {r['corpus']['sha256'][:16]}, {drawn}, "
            f"torch {r['versions']['torch']}, {r['machine']['threads']} threads, "
            f"{r['machine']['precision']}; the command that measured this took "
            f"{r['seconds']['total']:.0f} s.",
            "",
        ]
    )


def error_rates(r: dict) -> list[str]:
    rows = []
    for name, wer in r["wer"].items():
        low, high = r["wer_interval"][name]
        curve = r["curves"].get(name)
        last = curve[-1] if curve else {"step": 0, "seconds": 0.0}
        rows.append(
            f"| {TITLES[name]} | {r['parameters'][name] / 1e6:.2f} M "
            f"| {transcripts(name, r['corpus']['utterances'])} "
            f"| **{wer:.1f}** [{low:.1f}, {high:.1f}] "
            f"| {r['cer'][name]:.1f} | {last['step']:.0f} | {last['seconds']:.0f} |"
        )
    return [
        "| | parameters | transcripts | WER | CER | steps | seconds |",
        "|---|--:|--:|--:|--:|--:|--:|",
        *rows,
    ]


def findings(r: dict) -> list[str]:
    """What the figures say, and what they do not."""
    low, high = r["relative_reduction_interval"]
    hours, best, loss = r["corpus"]["hours"], r["alone_best"], r["loss_ms"]
    found = [
        f"**Distillation changes the student's WER by {signed(r['relative_reduction'])} %** "
        f"(relative; interval {signed(high)} to {signed(low)}): same seed, same steps, same "
        f"seconds of audio in a step, {hours['untranscribed']:.2f} h of untranscribed audio "
        f"beside {hours['student']:.2f} h of transcribed audio."
    ]
    if r["behind_transcribed"] is not None:
        ends = " to ".join(map(points, r["behind_transcribed_interval"]))
        found.append(
            "WER of the student distilled without a transcript minus that of the one with "
            f"everything transcribed: {points(r['behind_transcribed'])} points (interval {ends})."
        )
    if r["steps_to_alone_wer"] is None:
        found.append("The distilled student did not reach the student alone on the dev set.")
    else:
        found.append(
            f"The best dev WER of the student alone ({best['wer']:.1f} %, step {best['step']:.0f}, "
            f"{best['seconds']:.0f} s) was reached by the distilled one at step "
            f"{r['steps_to_alone_wer']:.0f}, after {r['seconds_to_alone_wer']:.0f} s."
        )
    found += [
        f"The loss of one step takes {loss['fused']:.2f} ms with kdkernels, "
        f"{loss['torch']:.2f} ms with torch's own ops (relative difference of the two losses: "
        f"{loss['difference']:.0e}), the step {r['step_ms']['student_distilled']:.0f} ms.",
        f"That loss uses {loss['fused_bytes'] / 1e6:.2f} MB at its peak, torch's "
        f"{loss['torch_bytes'] / 1e6:.2f} MB.",
    ]
    found += [
        f"{TITLES[name]}: {some} of {all_} {heard} utterances; of the others the teacher was not "
        "sure enough, or it heard nothing in them."
        for name, sets in r["corpus"]["kept"].items()
        for heard, (some, all_) in sets.items()
    ]
    found += [
        f"Lines that could not be used and were left out: {count} of the {name} set."
        for name, count in r["corpus"]["skipped"].items()
        if count
    ]
    found += [
        f"On the test set with noise added: {TITLES[name]} {wer:.1f} % "
        f"[{', '.join(f'{x:.1f}' for x in r['noisy_wer_interval'][name])}]."
        for name, wer in r["noisy_wer"].items()
    ]
    if seeds := r.get("seeds"):
        found.append(
            f"Means over seeds {', '.join(map(str, seeds))}; the intervals cover the choice of "
            "test utterances and the chance of training."
        )
    else:
        found.append(
            "The intervals cover the choice of test utterances, not the chance of training: for "
            "that, give --seeds 3."
        )
    if r["corpus"]["speech"] == "recorded":
        found.append("The speech is that of the manifests given.")
    else:
        found.append(
            "The speech is synthesised (espeak-ng, a small grammar, added noise): these figures "
            "compare the rows with each other, and never with LibriSpeech or any other recorded "
            "speech."
        )
    return [f"- {said}" for said in found]


def examples(r: dict) -> list[str]:
    keys = ("said", "alone", "distilled")
    return [
        "| what was said | the student alone wrote | the distilled one wrote |",
        "|---|---|---|",
        *(f"| {' | '.join(e[k].replace('|', '/') or '-' for k in keys)} |" for e in r["examples"]),
    ]


def curves(r: dict) -> list[str]:
    steps = [point["step"] for point in r["curves"]["student_alone"]]
    students = [name for name in r["curves"] if name.startswith("student")]
    return [
        "| step | " + " | ".join(TITLES[n] for n in students) + " |",
        "|--:|" + "--:|" * len(students),
        *(
            f"| {step:.0f} | "
            + " | ".join(f"{r['curves'][n][i]['wer']:.1f}" for n in students)
            + " |"
            for i, step in enumerate(steps)
        ),
    ]


def transcripts(name: str, counts: dict[str, int]) -> int:
    """How many a model learned from; those that a teacher wrote do not count."""
    role, _, arm = name.partition("_")
    if role == "teacher":
        few = TEACHERS[arm].transcripts if arm else None
        return min(few or counts["transcribed"], counts["transcribed"])
    return sum(counts[heard] for heard, whose in ARMS[arm].hears.items() if whose == "human")


def signed(reduction: float) -> str:
    """A reduction in percent as a change: "-35"; "0" where it rounds to that."""
    change = round(-reduction)
    return f"{change:+}" if change else "0"


def points(difference: float) -> str:
    """A difference of two rates: "-1.8"; "+0.0" where it rounds to that."""
    return f"{round(difference, 1) + 0.0:+.1f}"
