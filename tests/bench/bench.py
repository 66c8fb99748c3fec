"""Our costs beside others' for the same job, in turn, in one process, on the same inputs: ratios with their goals.

    python tests/bench/bench.py --out results [--only SECTION ...] [--threads N] [--tiny]

writes ``bench.csv`` into the folder, each row the moment it is measured, and from its rows ``figures/bench_growth.{pdf,svg,png,csv}``. About a quarter of an
hour on two quiet cores; everything runs on the CPU but ``--only bridge_training_gpu``, which measures a GPU where there is one. With ``--only`` the other rows stay.

A ratio is the median over pairs that were timed one after the other, with the 95 % interval of that median; a goal counts as met, or missed, only where the
whole interval says so. Where two ways must give the same answer, that is checked in the same run, and a comparison whose answers differ is not
measured. A goal that is not met comes with a profile: where our time went, as shares of all operators' own time.

* ``bridge_training``      a training step against the same matrix products bare
* ``bridge_inference``     one step against Diffusion Bridge's five, with its U-Net and with our network
* ``embedding``            sound files to vectors against laion-clap's own way, and against decoding alone
* ``captioning``           captions in a batch against one by one
* ``captioner_training``   a step and its memory against transformers' Trainer
* ``metrics``              caption metrics against aac-metrics
* ``growth``               how each cost grows with clips, D and steps

``--tiny`` runs the parts that need no download-sized model in seconds; its numbers mean nothing.
"""
from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

GPU_SECTION = "bridge_training_gpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")                             # before any import of huggingface_hub reads it
if GPU_SECTION not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""                              # before torch looks for one
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import bridge_ratios
import caption_ratios
import encoder_ratios
import growth
import pandas as pd
import torch
import trainer_ratios
from ratios import Ratios

from dl.plots import write_figure

PARTS: dict[str, Callable[[Ratios, bool], None]] = {                     # section -> what measures it, tiny or not
    "bridge_training": lambda bench, tiny: bridge_ratios.bridge_training(bench, bridge_ratios.TINY if tiny else bridge_ratios.Sizes()),
    GPU_SECTION: lambda bench, tiny: bridge_ratios.bridge_training_gpu(bench, bridge_ratios.Sizes()),
    "bridge_inference": lambda bench, tiny: bridge_ratios.bridge_inference(bench, bridge_ratios.TINY if tiny else bridge_ratios.Sizes()),
    "embedding": lambda bench, tiny: encoder_ratios.embedding(bench, encoder_ratios.Sizes()),
    "captioning": lambda bench, tiny: caption_ratios.captioning(bench, caption_ratios.TINY if tiny else caption_ratios.Sizes()),
    "captioner_training": lambda bench, tiny: trainer_ratios.captioner_training(bench, trainer_ratios.TINY if tiny else trainer_ratios.Sizes()),
    "metrics": lambda bench, tiny: caption_ratios.metrics(bench, caption_ratios.Sizes()),
    "growth": lambda bench, tiny: growth.growth(bench, growth.TINY if tiny else growth.Sizes()),
}
NOT_TINY = ("embedding", "metrics")                                      # laion-clap and Java take longer to start than a test may


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, draw; 0 however many rows could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder that gets bench.csv and figures/")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=None, metavar="SECTION", help=f"of {', '.join(PARTS)}; the rows of the others stay")
    parser.add_argument("--threads", type=int, default=None, help="of torch, for ours and theirs alike; by default what torch takes")
    parser.add_argument("--budget-seconds", type=float, default=3600, help="what would start later is not measured")
    parser.add_argument("--limit-seconds", type=float, default=420, help="what one measurement may take; a busy machine needs more")
    parser.add_argument("--tiny", action="store_true", help="small sizes, without the sections " + " and ".join(NOT_TINY))
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    sections = tuple(given.only or (name for name in PARTS if not (given.tiny and name in NOT_TINY)))
    bench = Ratios(given.out / "bench.csv", given.budget_seconds, tuple(PARTS), sections, given.limit_seconds)
    for section in sections:
        bench.part(section, lambda section=section: PARTS[section](bench, given.tiny))
    data = growth.growth_data(pd.read_csv(bench.path, dtype=str, keep_default_na=False))
    if data is not None:
        write_figure(given.out / "figures", growth.plot_growth(data), "bench_growth", data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
