"""Every system that maps an audio vector towards text, by its name in Table 1.

``build("ridge", alpha=.1).fit(audio, text, text_clip)(audio_emb)`` gives (B, D) float32 unit norm. Closed forms stand in
``dl.peers.closed_form``, what takes gradient steps in ``dl.peers.trained``.
"""
from __future__ import annotations

from typing import Any

from dl.peers import closed_form, trained
from dl.peers.base import Peer, centre, uncentre

REGISTRY: dict[str, type[Peer]] = {
    "raw": closed_form.Raw,
    "mean_shift": closed_form.MeanShift,
    "c3": closed_form.C3,
    "capdec": closed_form.CapDec,
    "realign": closed_form.ReAlign,
    "whitening_colouring": closed_form.WhiteningColouring,
    "projection": closed_form.Projection,
    "nearest_text": closed_form.NearestText,
    "procrustes": closed_form.Procrustes,
    "ridge": closed_form.Ridge,
    "pls_head": closed_form.PLSHead,
    **trained.REGISTRY,
}


def build(name: str, **hyper_parameters: Any) -> Peer:
    """Make the system called ``name``, unfitted.

    Raises:
        ValueError: no system has that name; the known ones are listed.
    """
    if name not in REGISTRY:
        raise ValueError(f"unknown system {name!r}: choose one of {', '.join(REGISTRY)}")
    return REGISTRY[name](**hyper_parameters)


__all__ = ["REGISTRY", "Peer", "build", "centre", "uncentre"]
