"""Words with times -> captions, as WebVTT and SRT; and text. Plain Python.

What holds, the first before the others:

1. Every word is shown, once and in order. One longer than a line is cut, between letters and with a
   hyphen, but for scripts that have none.
2. A caption has one or two lines of at most 42 characters, a wide one (Chinese, Japanese, Korean)
   counted twice and a combining mark not at all; it stays 1 to 7 seconds, and overlaps none.
3. It stays long enough to be read at 20 characters a second: past its last word where it must.
4. It begins with its first word, or as soon as the one before may go.
5. It stays until the next one where that begins less than a second later and 2 lets it: shorter
   gaps flicker.
6. The last one ends when the recording does at the latest, where 2 and 3 let it.

Where people talk faster than 20 characters a second captions come late, and catch up in pauses. A
limit to that, `late`, goes before 3: captions in time with the picture, which not everybody reads.
"""

import math
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import pairwise, zip_longest
from typing import NamedTuple

LINE = 42  # characters
SHORTEST, LONGEST = 1000, 7000  # milliseconds a caption is shown
READING = 50  # milliseconds a character: 20 characters a second
GAP = 1000  # milliseconds between two captions: 0, or at least that many (BBC subtitle guidelines)
LATE = 1.5  # seconds: captions that begin later after their first word are told of
DOUBT = 0.8  # confidence below which a word is marked: of these two in three are wrong
PARAGRAPH = 1.0  # seconds of pause that begin a new line of text
DOUBTFUL = "(?)"  # in characters, so that it is there in every player, and in Braille

# A line, and a caption, should not end with these. English.
WEAK = """
a an the my your his her its our their this that these those and or but nor so if than as of in on
at by to for from with into about near under over behind beside before after until across because i
you he she it we they is are was were be been am has have had will would can could shall should may
might must do does did not no very please who which whose
"""
WEAK_WORDS = frozenset(WEAK.split())

# Scripts that have no hyphen where a word goes on in the next line.
UNHYPHENATED = (
    *("CJK", "HIRAGANA", "KATAKANA", "HANGUL"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
)


class Word(NamedTuple):
    text: str  # no white space
    start: float  # seconds
    end: float
    confidence: float  # 0 to 1


class Caption(NamedTuple):
    start: int  # milliseconds
    end: int
    lines: tuple[str, ...]
    late: int = 0  # milliseconds from when its first word begins to its own start


class _Token(NamedTuple):
    """What a line is made of: a word, or a piece of one that is longer than a line."""

    text: str
    width: int
    start: int  # milliseconds
    end: int
    weak: bool


def captions(
    words: Sequence[Word],
    doubt: float = DOUBT,
    seconds: float = math.inf,
    late: float = math.inf,
) -> list[Caption]:
    """Captions of `words`, in a recording of `seconds`; a confidence below `doubt` is marked.

    None begins more than `late` seconds after its first word, but for rule 2.

    Raises:
        ValueError: for a word that is empty or has white space, times that are negative, not
            finite or backwards, words that are not in order of their starts.
    """
    _check(words)
    tokens = [token for word in words for token in _tokens(word, doubt)]
    groups = _groups(tokens)
    shown: list[Caption] = []
    for group, following in zip_longest(groups, groups[1:]):
        lines = _lines(group)[1]
        said = group[0].start
        start = max(said, shown[-1].end if shown else 0)
        needed = start + max(SHORTEST, READING * _characters(lines))
        end = max(group[-1].end, needed)
        if following:
            after = following[0].start
            if end < after < end + GAP and after <= start + LONGEST:
                end = after
            end = min(end, max(start + SHORTEST, after + 1000 * late))
        else:
            end = min(end, max(needed, 1000 * seconds))
        shown.append(Caption(start, int(min(end, start + LONGEST)), lines, start - said))
    return shown


def too_fast(caption: Caption) -> bool:
    """Whether there is less time than reading it takes: rule 3 gave way to `late`."""
    return READING * _characters(caption.lines) > caption.end - caption.start


def marked(word: Word, doubt: float) -> str:
    return word.text + DOUBTFUL * (word.confidence < doubt)


def text(words: Sequence[Word], doubt: float) -> str:
    """A line for each passage without a pause."""
    lines: list[str] = []
    before = -math.inf
    for word in words:
        if word.start - before >= PARAGRAPH:
            lines.append(marked(word, doubt))
        else:
            lines[-1] += " " + marked(word, doubt)
        before = word.end
    return "".join(line + "\n" for line in lines)


def facts(word: Word) -> dict:
    """For JSON: seconds to the millisecond."""
    times = {"start": round(word.start, 3), "end": round(word.end, 3)}
    return {"word": word.text, **times, "confidence": round(word.confidence, 4)}


def webvtt(shown: Iterable[Caption]) -> str:
    """https://www.w3.org/TR/webvtt1/"""
    escapes = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
    cues = [
        f"{_clock(c.start, '.')} --> {_clock(c.end, '.')}\n" + "\n".join(c.lines).translate(escapes)
        for c in shown
    ]
    return "\n\n".join(["WEBVTT", *cues]) + "\n"


def srt(shown: Iterable[Caption]) -> str:
    """SubRip: numbered from 1, a comma before the milliseconds; it knows no escapes."""
    return "\n".join(
        f"{number}\n{_clock(c.start, ',')} --> {_clock(c.end, ',')}\n" + "\n".join(c.lines) + "\n"
        for number, c in enumerate(shown, 1)
    )


def _clock(milliseconds: int, point: str) -> str:
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}{point}{milliseconds:03}"


def _check(words: Sequence[Word]) -> None:
    before = 0.0
    for i, word in enumerate(words):
        if word.text.split() != [word.text]:
            raise ValueError(f"captions: expected a word without white space, got {word.text!r}")
        if not before <= word.start <= word.end < math.inf:
            raise ValueError(
                f"captions: expected {before} <= start <= end < inf for word {i}, got {word}"
            )
        before = word.start


def _tokens(word: Word, doubt: float) -> list[_Token]:
    mark = DOUBTFUL * (word.confidence < doubt)
    width = LINE - len(mark)
    pieces = [word.text] if _width(word.text) <= width else _pieces(word.text, width - 1)
    pieces[-1] += mark
    start, length = 1000 * word.start, 1000 * (word.end - word.start)
    times = [round(start + length * i / len(pieces)) for i in range(len(pieces) + 1)]
    weak = word.text.lower() in WEAK_WORDS
    return [
        _Token(piece, _width(piece), *time, weak)
        for piece, time in zip(pieces, pairwise(times), strict=True)
    ]


def _width(text: str) -> int:
    """How many characters of a line it takes."""
    return len(text) if text.isascii() else sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 1 + (unicodedata.east_asian_width(character) in "WF")


def _pieces(word: str, width: int) -> list[str]:
    """A word cut into pieces of that width at most, and their hyphens."""
    letters: list[str] = []  # with their marks
    for character in word:
        if letters and unicodedata.category(character)[0] == "M" and _width(letters[-1]) < 8:
            letters[-1] += character
        else:
            letters.append(character)
    pieces = [""]
    for letter in letters:
        if _width(pieces[-1] + letter) > width:
            if not unicodedata.name(pieces[-1][-1], "").startswith(UNHYPHENATED):
                pieces[-1] += "-"
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _characters(lines: tuple[str, ...]) -> int:
    """Letters and spaces of a caption; the end of a line is a space."""
    return sum(map(_width, lines)) + len(lines) - 1


def _lines(tokens: Sequence[_Token]) -> tuple[float, tuple[str, ...]] | None:
    """(cost, lines): one line where there is room, else two of a like length; None: no room."""
    texts, whole = [token.text for token in tokens], sum(token.width + 1 for token in tokens) - 1
    if whole <= LINE:
        return 0.0, (" ".join(texts),)
    best, cut, first = None, 0, -1
    for i in range(1, len(texts)):
        first += tokens[i - 1].width + 1
        second = whole - first - 1
        if max(first, second) <= LINE:
            cost = abs(first - second) / LINE + 0.4 * tokens[i - 1].weak
            if best is None or cost < best:
                best, cut = cost, i
    return None if best is None else (best, (" ".join(texts[:cut]), " ".join(texts[cut:])))


def _groups(tokens: list[_Token]) -> list[list[_Token]]:
    """Cut into captions: the cheapest way of all, by dynamic programming over the ends."""
    costs, cuts = [0.0], [0]
    for stop in range(1, len(tokens) + 1):
        best = None
        for start in range(stop - 1, -1, -1):
            lines = _lines(tokens[start:stop])
            lasts = tokens[stop - 1].end - tokens[start].start
            if lines is None or (lasts > LONGEST and start < stop - 1):
                break
            cost = costs[start] + lines[0] + _cost(tokens, start, stop, lines[1])
            if best is None or cost < best[0]:
                best = cost, start
        costs.append(best[0])
        cuts.append(best[1])
    groups, stop = [], len(tokens)
    while stop:
        groups.append(tokens[cuts[stop] : stop])
        stop = cuts[stop]
    return groups[::-1]


def _cost(tokens: list[_Token], start: int, stop: int, lines: tuple[str, ...]) -> float:
    """Few captions, evenly filled, cut where the speaker pauses and where grammar allows it."""
    group = tokens[start:stop]
    length = _characters(lines)
    pauses = sum(max(0, b.start - a.end) for a, b in pairwise(group))
    cost = 1 + (1 - length / (2 * LINE + 1)) ** 2 + 3e-3 * pauses
    if stop < len(tokens):
        following = tokens[stop].start
        cost += 0.8 * (group[-1].weak and following - group[-1].end < 300)
        needed = max(SHORTEST, READING * length)
        cost += 1e-3 * max(0, needed - (following - group[0].start))
    return cost
