"""Sound files to CLAP vectors: against laion-clap's own way on the same weights and files, and against decoding alone."""
from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch
from ratios import Goal, Ratios, check_equal, faster, in_turn, torch_profile

from dl.clap import ClapEncoder, LaionClapBackend, build_laion_clap, crop, decode
from dl.config import get_profile
from dl.data import SAMPLING_RATE, Split, load_split, read_audio

LAION_GOAL, DECODING_GOAL = faster(2), Goal("ours / theirs", ">=", 2)
TEXT_TOWER = {"vocab_size": 300, "hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12, "intermediate_size": 64,
              "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}         # no text is embedded here


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    files: int = 32
    repeats: int = 5


def random_laion_clap(seed: int = 0):
    """laion-clap's HTSAT-tiny with random weights that tell sounds apart (the usual 0.02 would put all on one spot)."""
    torch.manual_seed(seed)
    clap = build_laion_clap("HTSAT-tiny", TEXT_TOWER, None)
    for name, parameter in clap.model.named_parameters():
        if parameter.ndim == 2 and "extractor" not in name and "embeddings" not in name:
            torch.nn.init.xavier_normal_(parameter)
    clap.model.audio_branch.bn0.running_mean.fill_(-30)
    clap.model.audio_branch.bn0.running_var.fill_(400)
    return clap.eval()


@contextmanager
def sound_files(count: int) -> Iterator[list[Path]]:
    """Test scenes of data/mini, their first 10 s, as 16-bit WAV at 48 kHz in a temporary folder."""
    split = load_split(get_profile("mini"), "test")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{place:03d}.wav" for place in range(count)]
        for place, file in enumerate(files):
            soundfile.write(file, crop(split.waveform(place)), SAMPLING_RATE, subtype="PCM_16")
        yield files


def decoded(files: list[Path]) -> list[np.ndarray]:
    """The files as ``embed_split`` decodes them."""
    split = Split("test", [file.stem for file in files], [[""]] * len(files), pd.DataFrame(index=range(len(files))), lambda place: read_audio(files[place]))
    return [sound for _, sound in decode(split, range(len(files)))]


def embedding(bench: Ratios, sizes: Sizes) -> None:
    """Both comparisons on the same files, in seconds for all of them."""
    names = f"{sizes.files} files, against laion-clap", "8 files, against decoding alone"

    def measure() -> None:
        clap = random_laion_clap()
        encoder = ClapEncoder(LaionClapBackend(clap, "random"))
        with sound_files(sizes.files) as files:
            paths = [str(file) for file in files]

            def ours() -> torch.Tensor:
                return encoder.embed_audio(decoded(files))

            pairs, rows, wanted = in_turn(ours, lambda: clap.get_audio_embedding_from_filelist(paths), sizes.repeats, warmup=0, seconds=60)
            same = check_equal(rows, wanted, 1e-4, "rows")
            if not float(torch.cdist(rows, rows).add(torch.eye(len(rows))).min()) > 1e-2:
                raise AssertionError("the random weights do not tell the sounds apart")
            bench.compare("embedding", names[0], pairs, LAION_GOAL,
                          f"get_audio_embedding_from_filelist on the same random HTSAT-tiny; {same}. It decodes one file after the other, puts all into one "
                          "batch, and keeps what a gradient would need; ours decodes in threads and runs batches without a gradient. What is left in "
                          "both is the tower itself, most of it matrix products, on the same library", profile=lambda: torch_profile(lambda: encoder.embed_audio(decoded(files[:8])), most=8))
            few = files[:8]
            bench.compare("embedding", names[1], in_turn(lambda: encoder.embed_audio(decoded(few)), lambda: decoded(few), sizes.repeats)[0], DECODING_GOAL,
                          "decoding and encoding together against decoding: at 2 and above the encoder is the longer part")

    bench.attempt(measure, "embedding", names[0])
