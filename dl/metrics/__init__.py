"""The modality gap (``gap``, ``neighbours``) and captions (``captions``, ``caption_runs``, ``java``), measured with intervals (``bootstrap``).

Here stands what a metric is called where it is shown.
"""

TITLES = {
    "pair_cosine": "pair cosine", "cosine_margin": "cosine margin", "centroid_gap": "centroid gap", "rmg": "RMG", "recall_at_10": "R@10",
    "effective_rank": "effective rank", "bleu_4": "BLEU-4", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider_d": "CIDEr-D", "spice": "SPICE",
    "spider": "SPIDEr", "sbert_sim": "SBERT similarity",
}
ARROWS = {"higher": " ↑", "lower": " ↓"}         # a metric's better side, by ``DIRECTION`` of its module
