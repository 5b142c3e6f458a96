"""Speech recognition around the losses: what `python -m kdkernels.train` is made of.

    settings.py   every setting, its default and its help
    files.py      files written whole or not at all, reused only when they are what was asked for
    corpus.py     a grammar, voices, noise: what is said, by whom, where; a function of the seed
    espeak.py     espeak-ng in process: text to samples
    audio.py      reading, resampling, noise and reverberation
    features.py   log-mel features; SpecAugment
    data.py       manifests; feature shards on disk
    batches.py    which utterances make a step
    model.py      the convolutional CTC encoder
    training.py   one loop for teacher and students
    measure.py    the cost of the loss: these ops, torch's own
    decode.py     greedy decoding, WER, CER, bootstrap intervals
    report.py     report.json and report.md

Nothing here is imported by `import kdkernels`; it needs `pip install "kdkernels[train]"`.
"""
