"""Embed a CSV of many clips and print what memory it took: ``python million.py FOLDER CLIPS``.

The CSV is real, the sounds are synthetic (0.1 s each), the encoder is a projection. Prints JSON: the memory in MB
before, with the table read, at ten places of the pass over the sounds, and at its peak.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import psutil
import torch
from ledger import peak_mb

from dl import clap
from dl.clap import embed_split
from dl.config import get_profile
from dl.data import CAPTION_COLUMNS, Split, read_captions

DIM = 256


class Projection:
    """A vector of the first samples; of a caption, ones."""

    embed_dim, weights_sha256, dtype = DIM, "projection", torch.float32

    def embed_audio(self, waveforms: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack([waveform[:DIM] for waveform in waveforms]))

    def embed_text(self, captions: list[str]) -> torch.Tensor:
        return torch.ones(len(captions), DIM)


def memory() -> float:
    return psutil.Process().memory_info().rss / 1e6


def main(folder: Path, clips: int) -> dict:
    torch.set_num_threads(1)
    with open(folder / "train.csv", "w", encoding="utf-8") as file:
        file.write(",".join(CAPTION_COLUMNS) + "\n")
        file.writelines(f"{row},video{row:08d},30,Someone speaks while a dog barks in the distance number {row}\n"
                        for row in range(clips))
    before = memory()
    frame = read_captions(folder / "train.csv")
    sound = 0.1 * np.random.default_rng(0).standard_normal((997, 4800)).astype(np.float32)
    split = Split("train", (frame.youtube_id + "_" + frame.start_time).tolist(), [[text] for text in frame.caption],
                  frame[["youtube_id", "start_time"]], lambda place: sound[place % 997])
    del frame
    table, during, embed_shard = memory(), [], clap._embed_shard

    def watched(shard: Path, of: Split, places: range, *others) -> None:
        embed_shard(shard, of, places, *others)
        if places.start // clap.SHARD_SIZE % max(1, clips // clap.SHARD_SIZE // 10) == 0:
            during.append(round(memory(), 1))
    clap._embed_shard = watched
    profile = get_profile("smoke", results_root=folder / "results")
    embeddings = embed_split(profile, split, Projection(), progress=False)
    assert len(embeddings.clip_ids) == clips and embeddings.skipped == []
    return {"before": before, "table": table, "during": during, "peak": peak_mb()}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
