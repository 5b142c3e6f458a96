"""Speech recognition around the losses: what `python -m kdkernels.train` is made of.

  The program
    settings.py   every setting, its default and its help; presets; what is wrong with them
    options.py    the command line made from them
    arms.py       the table of students and teachers: what each hears and learns from
    prepare.py    the first stage: speech to features
    stages.py     the stages that train, and cache the teachers' logits
    evaluation.py error rates on the test set, and the cost of the loss
    report.py     report.json, over several seeds too
    markdown.py   report.md from it
    plots.py      the report's pictures
    example.py    captions.wav, .vtt, .srt: the distilled student at work
  Its files and processes
    files.py      files written whole or not at all, reused only when they are what was asked for
    folder.py     OUT is one run's: what another left is set aside, and taken back where it fits
    processes.py  several processes under torchrun
    console.py    progress bars and messages
    extras.py     the message about a missing package
  Speech
    corpus.py     a grammar, voices, noise: what is said, by whom, where; a function of the seed
    espeak.py     espeak-ng in process: text to samples
    sources.py    recorded speech: manifests, Kaldi, tables; bad lines named
    tables.py     data sets of Hugging Face on disk, and of torchaudio
    audio.py      reading, resampling, noise and reverberation
    features.py   log-mel features; SpecAugment
    data.py       feature shards on disk; utterances in memory; alphabets
  Training
    batches.py    which utterances make a step, and which process computes which
    model.py      the convolutional CTC encoder, for whole utterances or streaming
    bestrq.py     the self-supervised task
    teachers.py   our own, Hugging Face, torchaudio; mapping, mixing and caching of their logits
    losses.py     what is minimised, over which frames and utterances
    training.py   one loop for all; checkpoints and metrics
    measure.py    the cost of the loss: these ops, torch's own
    decode.py     greedy decoding, WER, CER, bootstrap intervals
  Use of a trained student
    frontend.py   a stream of samples to normalised features; voice activity
    recognise.py  audio of any length, or a stream, to words with times and confidences
    captions.py   words to WebVTT, SRT and text
    recordings.py recordings to files of text, words and captions
    stream.py     standard input to words, as they become final
    export.py     the student as ONNX

Nothing here is imported by `import kdkernels`; it needs `pip install "kdkernels[train]"`.
"""
