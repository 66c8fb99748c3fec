"""Captions: generated in batches against one by one, and scored against aac-metrics."""
from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from random_captioner import RandomCaptioner
from ratios import Ratios, at_most, check_equal, faster, in_turn, python_profile, torch_profile

from dl.captioner import LLMCaptioner
from dl.config import REPO, CaptionerConfig, get_profile
from dl.data import load_split

BATCH_GOAL, METRICS_GOAL = faster(4), at_most(1)
LEXICAL = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider_d")


@dataclass(frozen=True)
class Sizes:
    """How much is measured; ``llama`` holds fields of a random language model, empty for the shipped captioner."""

    clips: int = 16
    llama: dict = field(default_factory=dict)
    repeats: int = 5
    scored: int = 1000
    score_repeats: int = 3


TINY = Sizes(clips=6, repeats=3, llama={"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 256,
                                        "max_position_embeddings": 128})


# ------------------------------------------------------------------------------------------------------------- generation
def captioner_and_vectors(sizes: Sizes) -> tuple[LLMCaptioner, torch.Tensor]:
    """The shipped captioner and the audio vectors of test scenes (mini-CLAP); a random small one and random vectors where asked."""
    if sizes.llama:
        config = CaptionerConfig(language_model="random tiny Llama", projector_width=24, lora_r=2, max_new_tokens=8)
        return RandomCaptioner(16, config, sizes.llama, torch.device("cpu")).captioner, torch.randn(sizes.clips, 16, generator=torch.Generator().manual_seed(0))
    from dl.clap import ClapEncoder

    split = load_split(get_profile("mini"), "test")
    vectors = ClapEncoder.from_pretrained("mini", "cpu").embed_audio([split.waveform(place) for place in range(sizes.clips)])
    return LLMCaptioner.from_pretrained(REPO / "results/mini/checkpoints/captioner"), vectors


def captioning(bench: Ratios, sizes: Sizes) -> None:
    """Greedy captions of the same vectors, all in one batch against one call of ``generate`` for each."""
    name = f"{sizes.clips} clips in a batch, against one by one"

    def measure() -> None:
        captioner, vectors = captioner_and_vectors(sizes)

        def together() -> list[str]:
            return captioner.generate(vectors)

        def one_by_one() -> list[str]:
            return [captioner.generate(vector[None])[0] for vector in vectors]

        pairs, found, wanted = in_turn(together, one_by_one, sizes.repeats, warmup=0)
        same = sum(ours == theirs for ours, theirs in zip(found, wanted, strict=True))
        if same < 0.9 * len(vectors):                                # rounding may turn a tie of two words
            raise AssertionError(f"only {same} of {len(vectors)} captions agree")
        rates = [(ours / len(vectors), theirs / len(vectors)) for ours, theirs in pairs]
        bench.compare("captioning", name, rates, BATCH_GOAL, f"seconds a clip, {captioner.config.language_model}, greedy; {same} of {len(vectors)} captions are the "
                      "same; a batch goes on until its longest caption ends", profile=lambda: torch_profile(together))

    bench.attempt(measure, "captioning", name)


# ---------------------------------------------------------------------------------------------------------------- metrics
def captions_to_score(count: int) -> tuple[list[str], list[list[str]]]:
    """``count`` candidates with five references each: clips of test and val, their first caption with every fourth word left out."""
    references = [captions for split in ("test", "val") for captions in load_split(get_profile("mini"), split).captions]
    references = (references * -(-count // len(references)))[:count]
    return [" ".join(word for place, word in enumerate(captions[0].split()) if place % 4 != 3) for captions in references], references


def metrics(bench: Ratios, sizes: Sizes) -> None:
    """``dl.caption_metrics.score_captions`` against ``aac_metrics.evaluate``; SPICE, which wants models to be downloaded, left out of both."""
    from aac_metrics import evaluate
    from aac_metrics import functional as aac
    from sentence_transformers import SentenceTransformer

    from dl import caption_metrics as scoring
    from dl.caption_metrics import JavaError, find_java, jar
    from dl.mini_clap import minilm_folder

    candidates, references = captions_to_score(sizes.scored)
    shape = f"{sizes.scored:,} captions with {len(references[0])} references each"

    def lexical() -> None:
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(scoring, "sbert_sim", return_value={"": torch.zeros(len(candidates)).numpy()}), \
                mock.patch.object(scoring, "spice", side_effect=JavaError("left out")):
            jars = Path(folder) / "aac-metrics"
            jars.mkdir()
            (jars / "stanford_nlp").symlink_to(jar("tokenizer", "stanford-corenlp-3.4.1.jar").parent)     # pycocoevalcap's: nothing is downloaded
            (jars / "meteor").symlink_to(jar("meteor", "meteor-1.5.jar").parent)
            settings = {"metrics": LEXICAL, "cache_path": folder, "tmp_path": folder, "java_path": str(find_java().path)}

            def ours() -> dict[str, float]:
                return scoring.score_captions(candidates, references).corpus

            def theirs() -> dict[str, torch.Tensor]:
                return evaluate(candidates, references, **settings)[0]

            pairs, found, wanted = in_turn(ours, theirs, sizes.score_repeats, warmup=0)
            same = check_equal(torch.tensor([found[name] for name in LEXICAL]), torch.tensor([float(wanted[name]) for name in LEXICAL]), 1e-6, "scores")
            bench.compare("metrics", "BLEU, METEOR, ROUGE-L, CIDEr-D", pairs, METRICS_GOAL, f"{shape}; {same}. Both start the same METEOR, whose Java loads its "
                          "paraphrase table for many seconds and then answers caption by caption; ours counts n-grams meanwhile and tokenises candidates and "
                          "references in one call", profile=lambda: python_profile(ours))

    def sentences() -> None:
        model = SentenceTransformer(str(minilm_folder()), device="cpu")

        def ours() -> float:
            return float(scoring.sbert_sim({"": (candidates, references)})[""].mean())

        theirs = partial(aac.sbert_sim, candidates, references, return_all_scores=False, sbert_model=model, device="cpu")
        pairs, found, wanted = in_turn(ours, theirs, sizes.score_repeats)
        same = check_equal(torch.tensor(found), wanted, 1e-6, "score")
        bench.compare("metrics", "sbert_sim (all-MiniLM-L6-v2)", pairs, METRICS_GOAL, f"{shape}; {same}. The same model in both; ours embeds equal captions once, "
                      "equal lengths side by side", profile=lambda: torch_profile(ours))

    bench.attempt(lexical, "metrics", "BLEU, METEOR, ROUGE-L, CIDEr-D")
    bench.attempt(sentences, "metrics", "sbert_sim (all-MiniLM-L6-v2)")
