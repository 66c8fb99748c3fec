"""What ``tests/bench/bench_gpu.py`` measured, as the tables of the README: speed and memory of the paper profile's parts, hours of the whole.

Both are copied from ``results/bench_gpu.csv``. What that file lacks, or marks so, stands as "not measured"; so does everything while
there is no such file.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from dl.config import get_profile
from dl.store import markdown_table

ABSENT = "not measured"
PAPER = get_profile("paper")


@dataclass(frozen=True)
class Part:
    """One row of the first table: where its numbers stand in the file (names of rows), and how they are shown."""

    label: str
    section: str
    speed: str
    speed_form: str
    share: str = ""
    share_form: str = ""
    memory: str = ""
    where: dict[str, str] = field(default_factory=dict)


PARTS = (
    *(Part(f"captioner, a step of {batch} captions{note}", "llama_train", f"step_time{end}", "{:.3f} s",
           f"model_utilisation{end}", "{:.0%} of the matrix product", f"peak_memory{end}", {"batch": str(batch)})
      for batch in (16, 64) for note, end in ((", gradient checkpointing", "_checkpointed"), ("", ""))),
    *(Part(f"captioner, captions of 30 tokens, {decoding}, 64 sequences at a time", "llama_generate", f"clips_per_s_{end}", "{:,.1f} clips/s",
           f"bandwidth_share_{end}", "{:.0%} of the copy rate", f"peak_memory_{end}")
      for decoding, end in (("beam 4", "beam_4"), ("greedy", "greedy"))),
    *(Part(f"CLAP's audio tower, {dtype}, batch {batch}", "htsat_embed", "clips_per_s", "{:,.0f} clips/s",
           memory="peak_memory", where={"batch": str(batch), "dtype": dtype})
      for dtype, batch in (("float32", 16), ("bfloat16 autocast", 128))),
    Part(f"bridge, a step of {PAPER.bridge.batch_size} pairs", "bridge_train", "step_time", "{:.4f} s",
         "products_share", "{:.0%} is matrix products", "peak_memory"),
    Part("bridge, one step, 1,000 vectors", "bridge_inference", "one_step", "{:.2f} ms"),
    Part("bridge, 5 DDIM steps, 1,000 vectors", "bridge_inference", "ddim_5_steps", "{:.2f} ms"),
    Part("Diffusion Bridge's sampler, 5 steps, 1,000 vectors", "bridge_inference", "diffusion_bridge_5_steps", "{:.2f} ms"),
    Part("profile mini: a fit of the bridge", "mini_full", "bridge_fit", "{:.1f} s"),
    Part("profile mini: a fit of a caption decoder", "mini_full", "decoder_fit", "{:.0f} s"),
    Part("profile mini: captions of the test clips, beam 4", "mini_full", "captions", "{:.1f} s"),
)
HOURS = {
    "embed_features": "log-mels of all clips, one process on the CPU",
    "embed_audio": "CLAP's audio tower over all clips",
    "embed_text": "CLAP's text tower over all captions",
    "bridge_training": f"{len(PAPER.seeds)} bridges of {PAPER.bridge.train_steps:,} steps",
    "captioner_training": f"caption decoders of {PAPER.captioner.train_steps:,} steps, batch {PAPER.captioner.batch_size}",
    "generation": f"captions of the test clips, beam {PAPER.captioner.num_beams}",
    "total": "in all",
}


def gpu_table(results: Path) -> str:
    """Speed and memory of the parts, then the estimate of a default run of the paper profile, as Markdown.

    Args:
        results: ``results/<profile>``; the file lies in the folder above it.
    """
    path = results.parent / "bench_gpu.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False) if path.is_file() else None

    def value(part: Part, name: str, form: str) -> str:
        """One number as it is shown; blank where the part has no such number."""
        if not name:
            return ""
        row = find(table, section=part.section, name=name, **part.where)
        return ABSENT if row is None else form.format(float(row.value))

    speeds = [[part.label, value(part, part.speed, part.speed_form), value(part, part.share, part.share_form), value(part, part.memory, "{:.1f}")]
              for part in PARTS]
    hours = []
    for name, part in HOURS.items():
        row = find(table, section="estimate", name=name)
        hours.append([part, "" if row is None else row.reason, ABSENT if row is None else duration(float(row.value))])
    return "\n".join([headline(table), markdown_table(["part", "speed", "share", "peak memory (GiB)"], speeds),
                      "A default run of the paper profile, from these speeds; decoding the sounds, the search on val and scoring come on top:\n",
                      markdown_table(["part", "how", "time"], hours, left=2)])


def find(table: pd.DataFrame | None, **where: str) -> pd.Series | None:
    """The first measured row whose columns equal ``where``, else None."""
    if table is None:
        return None
    chosen = table[(table.status == "ok") & (table[list(where)] == pd.Series(where)).all(axis=1)]
    return None if chosen.empty else chosen.iloc[0]


def measured(results: Path, section: str, name: str, show: Callable[[float], str], **where: str) -> str:
    """One measured figure of ``bench_gpu.csv`` as ``show`` writes it; ``where`` names further columns."""
    path = results.parent / "bench_gpu.csv"
    row = find(pd.read_csv(path, dtype=str, keep_default_na=False), section=section, name=name, **where) if path.is_file() else None
    return ABSENT if row is None else show(float(row.value))


def headline(table: pd.DataFrame | None) -> str:
    """The card, the versions and what the card can do at all."""
    if table is None:
        return "No GPU has been measured yet.\n"
    first, rates = table.iloc[0], []
    for name, what in (("matmul_square", "bfloat16 matrix product"), ("copy", "copy within its memory")):
        row = find(table, section="ceilings", name=name)
        rates.append(f"{what} " + (ABSENT if row is None else f"{float(row.value):,.0f} {row.unit}"))
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "transformers", "peft"))
    return f"One {first.card} ({versions}): {', '.join(rates)}.\n"


def duration(hours: float) -> str:
    """Hours, or minutes where it is less than one."""
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
