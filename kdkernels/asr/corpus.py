"""The synthesised corpus: what is said, by whom and in which room, as a pure function of the seed.

Test and dev have voices and sentences that occur in no training set: the checksum of a sentence
assigns it to one split, and the lists below assign each voice.
"""

import random
import zlib
from typing import NamedTuple

import numpy as np

from . import audio
from .espeak import Espeak

SLOTS = {
    "who": "anna, peter, maria, james, sofia, oliver, emma, henry, clara, victor, my brother, "
    "my mother, your father, our teacher, the old man, the young woman, the doctor, the driver, "
    "her friend, the farmer, the captain",
    "verb": "found, bought, carried, forgot, painted, needed, wanted, watched, cleaned, opened, "
    "lost, sold, brought, followed, remembered, ordered",
    "adjective": "small, large, red, green, heavy, broken, empty, quiet, cold, warm, new, old, "
    "yellow, beautiful, strange, silver",
    "thing": "table, bottle, window, letter, boat, garden, clock, basket, picture, lamp, bridge, "
    "ticket, camera, blanket, kitchen, guitar, horse, mirror, engine, jacket",
    "place": "in the city, near the river, at the station, behind the church, under the bridge, "
    "on the island, at the market, beside the road, in the forest, at school, in the library, "
    "across the street",
    "time": "yesterday, today, tomorrow, this morning, last night, last week, every evening, "
    "on monday, on friday, on sunday, before dinner, after lunch, in the summer, in december",
    "number": "two, three, four, five, six, seven, eight, nine, ten, twelve, twenty, thirty",
    "unit": "minutes, hours, days, weeks, months, miles",
    "ask": "please, will you, could you, would you, can you",
    "do": "call, send, bring, show, help, visit, answer, thank",
    "feel": "happy, tired, hungry, afraid, angry, ready, late, surprised",
    "go": "walked, drove, travelled, returned, moved",
    "weather": "rain, snow, wind, sun, fog, storm",
}
WORDS = {slot: words.split(", ") for slot, words in SLOTS.items()}
TEMPLATES = (
    "{who} {verb} the {adjective} {thing} {place}",
    "{time} {who} {verb} a {adjective} {thing}",
    "{who} {verb} {number} {adjective} {thing}s {time}",
    "{ask} {do} {who} {time}",
    "{ask} {do} {who} about the {adjective} {thing}",
    "{who} was {feel} because of the {weather} {time}",
    "{who} {go} {number} {unit} {place}",
    "the {thing} {place} is {adjective} and {adjective}",
    "there were {number} {thing}s {place} {time}",
    "{who} and {who} were {feel} {place}",
    "it took {number} {unit} until {who} {verb} the {thing}",
    "{who} said that the {thing} was {adjective}",
    "the {weather} came {number} {unit} after {who} {go} {place}",
    "why is the {thing} so {adjective} {time}",
    "{who} will {do} {who} in {number} {unit}",
)

# espeak-ng's variants, without the robots and the nine whose breath noise differs on every call
# (Alicia, Demonic, f2, f3, f5, sandro, victor, whisper, whisperf).
ACCENTS = ("en", "en-us", "en-gb-scotland")
TEST_VOICES = "Annie david Gene2 Henrique Lee Mario belinda f4 iven3 klatt2 m3 m7 max steph3"
DEV_VOICES = "Andrea Hugo grandma m5 miguel norbert"
TRAIN_VOICES = (
    "Alex Andy Denis Diogo Gene Jacky Marco Michael Mike Nguyen Storm adam anika antonio aunty "
    "benjamin boris caleb ed edward edward2 f1 gustave ian iven iven2 iven4 john kaukovalta klatt "
    "klatt3 klatt4 klatt5 klatt6 linda m1 m2 m4 m6 m8 marcelo michel mike2 pablo paul pedro quincy "
    "rob robert shelby steph steph2 travis zac grandpa announcer RicishayMax RicishayMax2 "
    "RicishayMax3 Reed"
)
VOICES = {
    split: voices.split()
    for split, voices in (
        ("transcribed", TRAIN_VOICES),
        ("untranscribed", TRAIN_VOICES),
        ("dev", DEV_VOICES),
        ("test", TEST_VOICES),
    )
}


class Utterance(NamedTuple):
    """What is said, how, and where."""

    text: str
    voice: str  # espeak-ng's "accent+variant"
    rate: int  # words a minute
    pitch: int  # 0 to 100
    pitch_range: int  # 0 to 100
    snr: float  # speech above noise, dB
    colour: float  # noise power falls as 1 / frequency**colour
    reverberation: float  # seconds to fall 60 dB; 0: none
    seed: int  # of the noise


def split_of(text: str) -> str:
    """The split that has this sentence: one of 16 is for test, one for dev."""
    return {0: "test", 1: "dev"}.get(zlib.crc32(text.encode()) % 16, "train")


def sentence(rng: random.Random) -> str:
    """One sentence of the grammar."""
    parts = rng.choice(TEMPLATES).replace("{", "|{").replace("}", "}|").split("|")
    return "".join(rng.choice(WORDS[p[1:-1]]) if p.startswith("{") else p for p in parts)


def utterance(seed: int, split: str, index: int) -> Utterance:
    """Utterance `index` of a split: transcribed, untranscribed, dev or test."""
    rng = random.Random(f"{seed}/{split}/{index}")
    own = split if split in ("dev", "test") else "train"
    text = sentence(rng)
    while split_of(text) != own:
        text = sentence(rng)
    return Utterance(
        text=text,
        voice=f"{rng.choice(ACCENTS)}+{rng.choice(VOICES[split])}",
        rate=rng.randint(140, 180),
        pitch=rng.randint(30, 70),
        pitch_range=rng.randint(30, 70),
        snr=rng.uniform(8, 30),
        colour=rng.uniform(0, 2),
        reverberation=rng.uniform(0.1, 0.4) if rng.random() < 0.2 else 0.0,
        seed=rng.getrandbits(32),
    )


def speak(espeak: Espeak, spoken: Utterance) -> np.ndarray:
    """int16 [samples] at 16 kHz, with its noise and its room."""
    voice = espeak.speak(spoken.text, spoken.voice, spoken.rate, spoken.pitch, spoken.pitch_range)
    samples = audio.resample(voice.astype(np.float32) / 32768, espeak.sample_rate)
    rng = np.random.default_rng(spoken.seed)
    if spoken.reverberation:
        samples = audio.reverberate(samples, spoken.reverberation, rng)
    samples = audio.add_noise(samples, spoken.snr, spoken.colour, rng)
    return audio.to_int16(samples * min(1.0, 0.9 / np.abs(samples).max()))
