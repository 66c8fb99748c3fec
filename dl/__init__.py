"""Diffusion-Link, replicated: a small diffusion model that carries audio embeddings into the text distribution.

The package in reading order, each module importing only what stands above it:

* ``config``           profiles smoke, mini and paper: sizes, paths, hyper-parameters, each with its source
* ``store``            files of results/<profile>/: atomic writing, keys, checkpoints, metrics.csv
* ``data``             clips and captions, AudioCaps' folders, the scenes of data/mini, sound files, distrusted
* ``mini_clap``        our small encoder; ``clap`` is the encoder with its three doors and the cache of vectors
* ``scheduler``        noise schedule and DDIM; ``bridge`` has network and losses, ``train`` the loop
* ``peers``            the other systems of Table 1
* ``captioner``        a frozen language model that puts one vector into words; ``captioner_train`` is its loop
* ``gap``              the modality gap, measured; ``bootstrap`` gives intervals, ``caption_metrics`` scores captions
* ``report``           tables, claims and their verdict rules, the checkpoints' cards
* ``experiments``      what Tables 1 and 2 run: tuning on val, fits, decoders, captions, scores on test
* ``plots``            colours, style, ``save_figure``, the sound player
* ``caption_files``    ``python -m dl caption`` and ``python -m dl demo``: captions of your own files
* ``check``            ``python -m dl check``; ``run`` has stages, stamps and the long jobs in several processes

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
    "BridgeConfig": "config", "Profile": "config", "get_profile": "config", "MetricsFile": "store",
    "Split": "data", "load_split": "data", "ClapEncoder": "clap", "Embeddings": "clap", "load_embeddings": "clap",
    "DDIMScheduler": "scheduler", "DiffusionLink": "bridge", "train_bridge": "train",
    "LLMCaptioner": "captioner", "train_captioner": "captioner_train",
}
__all__ = list(EXPORTS)


def __getattr__(name: str) -> object:
    """Load the module behind a public name (PEP 562); AttributeError where there is none."""
    if name not in EXPORTS:
        raise AttributeError(f"module 'dl' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"dl.{EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    """The public names, for completion in a notebook."""
    return __all__
