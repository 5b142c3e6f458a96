"""espeak-ng in process through ctypes: text to 16-bit samples.

The library keeps state from call to call (flutter, phase), so the samples are a function of the
whole sequence of calls since the process began: speak a fixed list, in order, in a fresh process.
"""

import ctypes

import numpy as np

from .extras import missing
from .files import TrainError

AUDIO_OUTPUT_SYNCHRONOUS = 2  # the callback runs inside espeak_Synth: some 1000 times real time
INITIALIZE_DONT_EXIT = 0x8000
RATE, PITCH, RANGE = 1, 3, 4
POS_CHARACTER, CHARS_UTF8 = 1, 1

_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def paths() -> tuple[str, str]:
    """(library, data folder) of the installed espeak-ng; a clear error when there is none."""
    try:
        import espeakng_loader
    except ModuleNotFoundError as error:
        raise TrainError(
            f"the synthesised corpus: {missing('espeakng-loader')}, "
            "or give --transcribed, --untranscribed and --test"
        ) from error
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


class Espeak:
    """One per process: espeak-ng has one global state."""

    def __init__(self):
        library, data = paths()
        try:
            self._lib = ctypes.CDLL(library)
        except OSError as error:
            raise TrainError(f"cannot load espeak-ng: {error}") from error
        self.sample_rate = self._lib.espeak_Initialize(
            AUDIO_OUTPUT_SYNCHRONOUS, 0, data.encode(), INITIALIZE_DONT_EXIT
        )
        if self.sample_rate <= 0:
            raise TrainError(f"espeak-ng does not start with its data in {data}")
        self._lib.espeak_Synth.argtypes = (
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int),
            *(ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p),
        )
        self._chunks: list[np.ndarray] = []
        self._callback = _Callback(self._receive)  # kept: the library holds only its address
        self._lib.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, count, events) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(self, text: str, voice: str, rate: int, pitch: int, pitch_range: int) -> np.ndarray:
        """`text` in `voice`, "accent+variant", at `rate` words a minute -> int16 [samples]."""
        if self._lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise TrainError(f"this espeak-ng has no voice {voice!r}")
        for parameter, value in ((RATE, rate), (PITCH, pitch), (RANGE, pitch_range)):
            self._lib.espeak_SetParameter(parameter, value, 0)
        self._chunks.clear()
        data = text.encode()
        self._lib.espeak_Synth(data, len(data) + 1, 0, POS_CHARACTER, 0, CHARS_UTF8, None, None)
        if not self._chunks:
            raise TrainError(f"espeak-ng said nothing for {text!r} in voice {voice!r}")
        return np.concatenate(self._chunks)
