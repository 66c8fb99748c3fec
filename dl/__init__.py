"""Diffusion-Link, replicated: a small diffusion model that carries audio embeddings into the text distribution.

The package in reading order, each module importing only what stands above it:

* ``config``       profiles smoke, mini and paper: sizes, paths, hyper-parameters, each with its source
* ``results``      files of results/<profile>/: atomic writing, metrics.csv, provenance
* ``audio``        sound files, opened with distrust
* ``data``         clips and captions; ``scenes`` mixes those of data/mini from real recordings, ``audiocaps`` knows its layouts and counts
* ``precision``    float32 or bfloat16, whichever the machine computes faster
* ``workers``      independent fits and scores side by side, several processes on a CPU
* ``encoder/``     the frozen CLAP encoder and its embedding cache
* ``bridge/``      Diffusion-Link: noise schedule, network, losses, training loop
* ``captioner/``   a frozen language model that puts one vector into words; captions of your own files
* ``peers/``       the other systems of Table 1, closed forms and trained ones
* ``metrics/``     the modality gap and captions, measured, with intervals
* ``report/``      tables, claims and their verdict rules, the replication report, the README's numbers, the checkpoints' cards
* ``experiments``  what Table 1 runs: tuning on val, fits, scores on test
* ``captioning``   what Table 2 runs: decoders, captions of every system, scores on test
* ``plots/``       one function per figure
* ``demo``         ``python -m dl demo``: notebook 11 as a page on 127.0.0.1
* ``pipeline/``    stages, stamps, ``python -m dl check``, and the long jobs in several processes

The public names below load their module when first used, so that ``import dl`` costs nothing.

    >>> from dl import ClapEncoder, DiffusionLink, LLMCaptioner
    >>> encoder = ClapEncoder.from_pretrained("mini")
    >>> bridge = DiffusionLink.from_pretrained("results/mini/checkpoints/bridge")
    >>> captioner = LLMCaptioner.from_pretrained("results/mini/checkpoints/captioner")
    >>> bridged_emb = bridge(encoder.embed_audio(waveforms, sampling_rate))      # (B, D) float32, unit norm
    >>> captions = captioner.generate(bridged_emb)                               # list of B strings
"""
from __future__ import annotations

from importlib import import_module

EXPORTS = {                      # public name: the module that defines it
    "BridgeConfig": "config",
    "Profile": "config",
    "get_profile": "config",
    "MetricsFile": "store",
    "Split": "data",
    "load_split": "data",
    "ClapEncoder": "clap",
    "Embeddings": "clap",
    "load_embeddings": "clap",
    "DDIMScheduler": "scheduler",
    "DiffusionLink": "bridge",
    "train_bridge": "train",
    "LLMCaptioner": "captioner",
    "train_captioner": "captioner_train",
}
__all__ = list(EXPORTS)


def __getattr__(name: str) -> object:
    """Load the module behind a public name (PEP 562).

    Raises:
        AttributeError: the package has no such name.
    """
    if name not in EXPORTS:
        raise AttributeError(f"module 'dl' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"dl.{EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    """The public names, for completion in a notebook."""
    return __all__
