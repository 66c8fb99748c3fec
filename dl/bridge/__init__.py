"""Diffusion-Link itself: ``scheduler`` noises and denoises, ``network`` is the bridge, ``losses`` and ``training`` teach it."""
