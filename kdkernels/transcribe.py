"""`python -m kdkernels.transcribe`: recordings, or a stream, to text and captions.

AUDIO...    NAME.txt, NAME.json, NAME.vtt and NAME.srt beside each recording, or in --out; of
            a.mp3 and a.wav, a.mp3.txt and a.wav.txt
--stream    words of what comes in on standard input, printed as they become final
"""

import argparse
import math
import sys
from pathlib import Path

from kdkernels.asr.extras import needed

with needed():
    from kdkernels.asr import audio, captions, console, files, recognise, recordings, stream

EPILOG = """
Exit code: 0; 1 when a recording could not be done (the others are); 2 when nothing was begun.

A microphone:  arecord -q -f S16_LE -r 16000 -c 1 | python -m kdkernels.transcribe --stream --model RUN
A film:        ffmpeg -i film.mp4 film.wav && python -m kdkernels.transcribe film.wav --model RUN
"""  # noqa: E501


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kdkernels.transcribe",
        description="Write down what is said in recordings, as text, JSON with word times and "
        "confidences, WebVTT and SRT captions; or in a stream, word by word.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("audio", nargs="*", metavar="AUDIO", help="any format that libsndfile reads")
    add(
        "--model",
        required=True,
        metavar="RUN",
        help="output folder of python -m kdkernels.train (its student_distilled is taken), "
        "or a .safetensors file of one",
    )
    add("--out", metavar="DIR", help="folder for what is written [beside each recording]")
    add("--force", action="store_true", help="replace files that exist")
    add(
        "--doubt",
        type=float,
        default=captions.DOUBT,
        metavar="P",
        help=f"words of a confidence below P are marked {captions.DOUBTFUL}; 0 marks none "
        f"[{captions.DOUBT}]",
    )
    add(
        "--late",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="captions begin at most so long after their words, even where they are then faster "
        "than 20 characters a second [no limit: late, but never too fast to read]",
    )
    add(
        "--stream",
        action="store_true",
        help="read standard input (raw 16-bit little-endian samples, or wav) and print words",
    )
    add("--rate", type=int, default=16000, metavar="HZ", help="sample rate of raw samples [16000]")
    add("--channels", type=int, default=1, metavar="N", help="channels of raw samples [1]")
    add("--json", action="store_true", help="with --stream: a line of JSON for each word")
    chosen = parser.parse_args(arguments)
    if chosen.stream == bool(chosen.audio):
        parser.error("give recordings, or --stream and none")
    if not 0 <= chosen.doubt <= 1:
        parser.error(f"--doubt must be in [0, 1], got {chosen.doubt}")
    if not chosen.late >= 0:
        parser.error(f"--late must be at least 0, got {chosen.late}")
    if not audio.RATES[0] <= chosen.rate <= audio.RATES[1]:
        parser.error(f"--rate must be in [{audio.RATES[0]}, {audio.RATES[1]}], got {chosen.rate}")
    if chosen.channels < 1:
        parser.error(f"--channels must be at least 1, got {chosen.channels}")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    try:
        if chosen.stream and sys.stdin is None:
            raise files.TrainError("--stream: standard input is closed; pipe audio into it")
        model = recognise.load(Path(chosen.model))
        if chosen.stream:
            source = sys.stdin.buffer
            return stream.run(
                source, chosen.rate, chosen.channels, chosen.doubt, chosen.json, model
            )
        paths = [Path(name) for name in chosen.audio]
        return recordings.run(paths, chosen.out, chosen.force, chosen.doubt, chosen.late, model)
    except files.TrainError as error:
        console.write(f"error: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has gone
        console.mute(sys.stdout)
        return 0
    except OSError as error:
        console.mute(sys.stdout)
        console.write(f"error: {error}", sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
