"""Captions: what always holds, over random words; files as parsers that are not ours read them."""

import datetime
import io
import itertools
import math
import unicodedata

import hypothesis.strategies as st
import pytest
import srt
import webvtt
from hypothesis import example, given

from kdkernels.asr import captions
from kdkernels.asr.captions import Caption, Word

LETTERS = "abcde\u00e9'&<>-"
FAST = [Word("yes", i / 100, i / 100, 0.9) for i in range(100)]


@st.composite
def spoken(draw, longest=100):
    """Words of any speed, with pauses and doubts."""
    words, at = [], draw(st.sampled_from([0.0, 1.234, 3600.0]))
    letters = st.text(LETTERS, min_size=1, max_size=draw(st.sampled_from([4, 12, longest])))
    length = st.floats(0, draw(st.sampled_from([0.05, 0.5, 9.0])))
    for text in draw(st.lists(letters, max_size=40)):
        start = at + draw(st.sampled_from([0.0, 0.0, 0.03, 0.3, 2.0]))
        at = start + draw(length)
        words.append(Word(text, start, at, draw(st.floats(0, 1))))
    return words


def pieces(shown):
    return [piece for caption in shown for line in caption.lines for piece in line.split(" ")]


@given(spoken())
@example([])
@example([Word("a", 0.0, 0.0, 0.9)])
@example([Word("x" * 43, 0.0, 20.0, 0.1)])
@example(FAST)
def test_two_lines_of_42_for_1_to_7_seconds_none_over_another(words):
    shown = captions.captions(words)
    for caption in shown:
        assert 1 <= len(caption.lines) <= 2
        assert all(0 < len(line) <= 42 for line in caption.lines)
        assert 1000 <= caption.end - caption.start <= 7000
    assert all(a.end <= b.start for a, b in itertools.pairwise(shown))


@given(spoken())
@example(FAST)
def test_every_word_is_shown_once_in_order_and_marked_when_doubtful(words):
    parts = iter(pieces(captions.captions(words, 0.5)))
    for word in words:
        expected = word.text + "(?)" * (word.confidence < 0.5)
        if len(expected) <= 42:
            assert next(parts) == expected
            continue
        whole = next(parts)
        while len(whole) < len(expected):  # cut, with a hyphen
            assert whole[-1] == "-"
            whole = whole[:-1] + next(parts)
        assert whole == expected
    assert next(parts, None) is None


def first_words(words, shown):
    """With the first word of each caption, of words that none had to be cut of."""
    counts = itertools.accumulate(len(pieces([caption])) for caption in shown)
    return [words[i] for i in [0, *counts][: len(shown)]] if shown else []


def time_to_read(caption):
    return 50 * len(" ".join(caption.lines))


@given(spoken(), st.floats(0, 9))
@example(FAST, 0.0)
def test_no_caption_is_faster_than_20_characters_a_second(words, silence):
    seconds = words[-1].end + silence if words else silence
    for caption in captions.captions(words, seconds=seconds):
        assert caption.end - caption.start >= time_to_read(caption)
        assert not captions.too_fast(caption)


@given(spoken(longest=30), st.sampled_from([math.inf, 3.0, 0.0]))
@example(FAST, math.inf)
def test_a_caption_begins_with_its_first_word_or_after_the_one_before(words, late):
    shown = captions.captions(words, late=late)
    before = 0
    for caption, word in zip(shown, first_words(words, shown), strict=True):
        said = round(1000 * word.start)
        assert caption.start == max(said, before)
        assert caption.late == caption.start - said
        before = caption.end


@given(spoken(longest=30), st.sampled_from([0.0, 1.5, 4.0]))
@example(FAST, 1.5)
def test_reading_speed_gives_way_to_a_limit_of_lateness(words, late):
    shown = captions.captions(words, late=late)
    for caption, following in itertools.zip_longest(shown, shown[1:]):
        shortest = caption.end - caption.start == 1000
        if time_to_read(caption) > caption.end - caption.start:
            assert captions.too_fast(caption)  # not of the last one, which nothing follows
            assert following.start == caption.end
            assert shortest or following.late == 1000 * late
        elif following and not shortest:
            assert following.late <= 1000 * late


@given(spoken(), st.floats(0, 9))
@example([Word("yes", 1.0, 1.2, 1.0)], 0.0)
def test_the_last_caption_ends_with_the_recording(words, silence):
    seconds = words[-1].end + silence if words else silence
    free, shown = captions.captions(words), captions.captions(words, seconds=seconds)
    assert shown[:-1] == free[:-1]
    for last, unbounded in zip(shown[-1:], free[-1:], strict=True):
        assert (last.start, last.lines) == (unbounded.start, unbounded.lines)
        assert last.end <= max(1000 * seconds, last.start + max(1000, time_to_read(last)))
        assert last.end == unbounded.end or last.end >= int(1000 * seconds)


@given(spoken(), st.floats(0, 9))
@example([Word("a", 0.0, 0.5, 1.0), Word("b" * 80, 1.999, 3.0, 1.0)], 0.0)
def test_no_caption_is_gone_for_less_than_a_second(words, silence):
    seconds = words[-1].end + silence if words else silence
    for caption, following in itertools.pairwise(captions.captions(words, seconds=seconds)):
        gap = following.start - caption.end
        assert gap == 0 or gap >= 1000 or following.start - caption.start > 7000


CHINESE, HINDI = "\u6c49\u5b57", "\u0915\u0941\u0924\u094d"
THAI = "\u0e01\u0e34\u0e19\u0e19\u0e49\u0e33"


@pytest.mark.parametrize(
    ("word", "columns", "hyphen"), [(CHINESE, 4, ""), (THAI, 4, ""), (HINDI, 2, "-")]
)
def test_words_of_other_scripts_are_cut_between_their_letters(word, columns, hyphen):
    said = 30 * word
    shown = captions.captions([Word(said, 0.0, 10.0, 1.0)])
    lines = [line for caption in shown for line in caption.lines]
    assert "".join(line.removesuffix(hyphen) for line in lines) == said
    for line in lines[:-1]:
        assert line.endswith(hyphen or line[-1])
        assert 38 <= columns * len(line.removesuffix(hyphen)) / len(word) + len(hyphen) <= 42
    assert not any(unicodedata.category(line[0]).startswith("M") for line in lines)
    assert captions.captions([Word(word, 0.0, 1.0, 1.0)] * 5)[0].lines == (" ".join(5 * [word]),)
    time = sum(caption.end - caption.start for caption in shown)
    assert time >= 50 * columns * 30  # to read them


def test_a_heap_of_marks_is_cut_too():
    marks = 200 * "\u093f"  # which take room, unlike others
    shown = captions.captions([Word("a" + marks, 0.0, 1.0, 1.0)])
    assert all(len(line) <= 42 for caption in shown for line in caption.lines)


def test_calm_speech_is_on_time_and_can_be_read():
    text = "the captain brought the warm camera behind the church and the engine was broken " * 20
    words, at = [], 0.0
    for i, word in enumerate(text.split()):
        start = at + (1.5 if i % 14 == 13 else 0.0)
        at = start + (len(word) + 1) / 15
        words.append(Word(word, start, at, 1.0))
    starts = {round(1000 * word.start) for word in words}
    shown = captions.captions(words)
    assert not any(caption.late for caption in shown)
    assert all(caption.start in starts for caption in shown)


def test_lines_are_balanced_and_end_at_sensible_places():
    text = "my brother will bring the doctor a beautiful picture of the old bridge near the river"
    words = [Word(word, i / 3, (i + 1) / 3, 1.0) for i, word in enumerate(text.split())]
    (shown,) = captions.captions(words[:13])
    assert shown.lines == (
        "my brother will bring the doctor",
        "a beautiful picture of the old bridge",
    )
    assert captions.captions(words[:6])[0].lines == ("my brother will bring the doctor",)


def test_a_caption_ends_where_the_speaker_pauses():
    said = ["anna", "was", "happy", "peter", "was", "tired"]
    words = [
        Word(w, i / 3 + 2 * (i > 2), (i + 1) / 3 + 2 * (i > 2), 1.0) for i, w in enumerate(said)
    ]
    assert [c.lines for c in captions.captions(words)] == [
        ("anna was happy",),
        ("peter was tired",),
    ]


@given(spoken())
@example([Word("<i>", 3.0, 4.0, 1.0), Word("-->", 4.0, 5.0, 1.0), Word("&amp;", 5.0, 6.0, 1.0)])
def test_webvtt_and_srt_as_others_read_them(words):
    shown = captions.captions(words)
    cues = webvtt.from_string(captions.webvtt(shown)) if shown else []
    assert len(cues) == len(shown)
    for cue, caption in zip(cues, shown, strict=True):
        times = (cue.start_in_seconds, cue.end_in_seconds)
        assert times == (caption.start // 1000, caption.end // 1000)
        assert cue.start.endswith(f".{caption.start % 1000:03}")
        escaped = [line.replace("&", "&amp;") for line in caption.lines]
        escaped = [line.replace("<", "&lt;").replace(">", "&gt;") for line in escaped]
        assert cue.raw_text.split("\n") == escaped
    milliseconds = datetime.timedelta(milliseconds=1)
    read = list(srt.parse(captions.srt(shown)))
    assert [
        Caption(s.start // milliseconds, s.end // milliseconds, tuple(s.content.split("\n")))
        for s in read
    ] == [caption._replace(late=0) for caption in shown]
    assert [s.index for s in read] == list(range(1, len(shown) + 1))


def test_no_words_make_valid_files():
    assert captions.webvtt([]) == "WEBVTT\n"
    assert captions.srt([]) == ""
    assert len(webvtt.from_buffer(io.StringIO("WEBVTT\n"))) == 0


def test_hours_have_two_digits_or_more():
    shown = [Caption(360_000_001, 360_001_001, ("a",))]
    assert "100:00:00.001 --> 100:00:01.001" in captions.webvtt(shown)
    assert "100:00:00,001 --> 100:00:01,001" in captions.srt(shown)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (Word("", 0.0, 1.0, 1.0), "captions: expected a word without white space, got ''"),
        (Word("a b", 0.0, 1.0, 1.0), "without white space, got 'a b'"),
        (Word("a\n", 0.0, 1.0, 1.0), "without white space"),
        (Word("a", -1.0, 1.0, 1.0), "captions: expected 0.0 <= start <= end < inf for word 0"),
        (Word("a", 2.0, 1.0, 1.0), "start <= end"),
        (Word("a", 0.0, math.inf, 1.0), "< inf"),
        (Word("a", math.nan, 1.0, 1.0), "start <= end"),
    ],
)
def test_words_that_make_no_sense(word, message):
    with pytest.raises(ValueError, match=message):
        captions.captions([word])
    with pytest.raises(ValueError, match=r"expected 2.0 <= start .* for word 1"):
        captions.captions([Word("a", 2.0, 3.0, 1.0), Word("b", 1.0, 4.0, 1.0)])
