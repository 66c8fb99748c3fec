"""The same small run under several numbers of threads: ``python same.py FOLDER THREADS [THREADS ...]``.

A child for each writes ``<place>.safetensors`` (vectors, weights, answers, metrics) and ``<place>.json``, captions.
"""
from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_captioning import tiny_language_model

from dl.bootstrap import make_draws, make_reference, score_system
from dl.captioner import LLMCaptioner
from dl.captioner_train import train_captioner
from dl.clap import ClapEncoder, Embeddings
from dl.config import BridgeConfig, CaptionerConfig, get_profile
from dl.data import load_split
from dl.train import train_bridge

CLIPS = 3


def run(folder: Path, place: int) -> None:
    split = load_split(get_profile("smoke"), "test")
    encoder = ClapEncoder.from_pretrained("mini", device="cpu")
    sounds = [split.waveform(i) for i in range(CLIPS)]
    captions = [text for texts in split.captions[:CLIPS] for text in texts]
    audio, text = encoder.embed_audio(sounds), encoder.embed_text(captions)
    clip = torch.arange(CLIPS).repeat_interleave(5)
    link, _ = train_bridge(BridgeConfig(train_steps=10, batch_size=16), audio, text, clip, seed=0, progress=False)
    mapped = link(audio, add_noise=False)

    config = CaptionerConfig(language_model=str(folder / "llama"), train_steps=4, batch_size=8, warmup_steps=1,
                             projector_width=64, max_new_tokens=8, dtype="float32")
    captioner = LLMCaptioner(audio.shape[1], config)
    train_captioner(captioner, text, captions, seed=0)

    reference = make_reference(Embeddings("test", split.clip_ids[:CLIPS], audio, text, clip, captions, []))
    scores = score_system("diffusion_link", [(0, 0, mapped)], reference, make_draws(split.clusters[:CLIPS], 20))
    found = {
        "audio, all at once": audio, "audio, one by one": encoder.embed_audio(sounds, batch_size=1),
        "text, all at once": text, "text, one by one": encoder.embed_text(captions, batch_size=1),
        "bridge, all at once": mapped,
        "bridge, one by one": torch.cat([link(row[None], add_noise=False) for row in audio]),
        "bridge, weights": torch.cat([value.flatten() for value in link.state_dict().values()]),
        "captioner, weights": torch.cat([value.flatten() for value in captioner.trainable_state().values()]),
        "metrics": torch.tensor([row["value"] for row in scores.rows()], dtype=torch.float64).nan_to_num(0.0),
    }
    save_file({name: value.contiguous() for name, value in found.items()}, folder / f"{place}.safetensors")
    said = {"at once": captioner.generate(audio), "one by one": captioner.generate(audio, batch_size=1)}
    (folder / f"{place}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    tiny_language_model(Path(sys.argv[1]) / "llama")
    for place, threads in enumerate(map(int, sys.argv[2:])):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                torch.set_num_threads(threads)
                run(Path(sys.argv[1]), place)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, f"the run with {threads} threads failed"
