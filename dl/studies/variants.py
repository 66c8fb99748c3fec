"""The registry of ablations: which one thing about the bridge is changed, and the question that it answers.

Every variant is a change of the *base*, the ``diffusion_link`` that ``search.csv`` chose on val, trained for fewer steps (``STEPS``) than the
row of Table 1, so that its figures are not that row's (``dl.studies.ablations.base_config``). What
``BridgeConfig`` can say is said by its fields; the scale s, centring and the share of pairs are expressed outside it. [ours: the
paper's ablations are unknown]

Left out: the optimiser, the batch size and the dropout (tuned or fixed for all systems, no part of the method), and lambda tuned anew
for each form of the topology loss (all forms stand at one lambda).
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dl.config import BridgeConfig

FRACTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)                                # shares of the training clips
CONTROLS = ("ridge", "regression_mlp")                                 # at the same clips
STEPS = {"mini": 240}       # of every fit, the base's too; with Table 1's 600 the hundred fits would take 92 CPU-minutes instead of 40
SMOKE = {"scale": 1, "centring": 2, "entry_noise": 4, "pairs": 3}      # what profile smoke runs: the first variants of these ablations


@dataclass(frozen=True)
class Variant:
    """One change of the base.

    Attributes:
        label: its system name in ``metrics.csv``.
        changes: fields of ``BridgeConfig``; k*, n and add_noise act at the call and need no fit of their own.
        system: diffusion_link, or a control of ``dl.peers.REGISTRY`` with its own chosen hyper-parameters.
        fraction: share of the training clips, see ``dl.studies.ablations.few_pairs``.
        scale: s in place of sqrt(D).
        centred: the mean of each modality is taken away before the fit and the text mean put back after it (``dl.peers.centre``).
        signal: enter at the level whose abar is nearest to this; None takes the base's k*, as a share of T.
    """

    label: str
    changes: dict[str, Any] = field(default_factory=dict)
    system: str = "diffusion_link"
    fraction: float = 1.0
    scale: float | None = None
    centred: bool = False
    signal: float | None = None


@dataclass(frozen=True)
class Ablation:
    """One question.

    Attributes:
        question: in one sentence.
        variants: what is run; one of them may be the base itself under another name.
        axis: what the axis of its figure is called.
        compare: pairs of labels whose paired difference is recorded beside those from the base.
    """

    question: str
    variants: tuple[Variant, ...]
    axis: str
    compare: tuple[tuple[str, str], ...] = ()


def _each(prefix: str, name: str, values: Iterable, **also: Any) -> tuple[Variant, ...]:
    return tuple(Variant(f"{prefix}{value:g}" if isinstance(value, float) else f"{prefix}{value}", {name: value, **also}) for value in values)


def _schedules(suffix: str = "", signal: float | None = None) -> tuple[Variant, ...]:
    tenfold = {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2}      # a tenth of the levels, tenfold betas: the same range of noise
    choices: dict[str, dict[str, Any]] = {"scaled_linear": {}, "linear": {"beta_schedule": "linear"}, "cosine": {"beta_schedule": "squaredcos_cap_v2"}, "T_100": tenfold}
    return tuple(Variant(name + suffix, changes, signal=signal) for name, changes in choices.items())


def _entries(levels: Iterable[int]) -> tuple[Variant, ...]:
    return tuple(Variant(f"{name}_k{k:03d}", {"start_timestep": k, "num_inference_steps": 1, "add_noise": name == "noise"})
                 for k in levels for name in ("noise", "none"))


def _calls(pairs: Iterable[tuple[int, int]]) -> tuple[Variant, ...]:
    return tuple(Variant(f"k{k:03d}_n{n:02d}", {"start_timestep": k, "num_inference_steps": n}) for k, n in pairs)


ABLATIONS: dict[str, Ablation] = {
    "topology_weight": Ablation("How much should the topology loss weigh? lambda = 0 leaves it out.",
                                _each("lambda_", "topology_weight", (0.0, 0.1, 1.0, 10.0)), "weight of the topology loss"),
    "topology_form": Ablation("Does the form of the topology loss matter? All four at lambda = 1, where the loss acts.",
                              _each("", "topology_form", ("gram", "softmax_kl", "cross_gram", "distance"), topology_weight=1.0),
                              "form of the topology loss"),
    "self_loss": Ablation("Does it help that the network also predicts a text from its own noised self?",
                          (Variant("self_on", {"self_weight": 1.0}), Variant("self_off", {"self_weight": 0.0})), "self prediction"),
    "loss": Ablation("Absolute or squared error: towards the conditional median or the mean?", _each("", "loss", ("l1", "l2")), "prediction loss"),
    "scale": Ablation("On which scale s does the noise meet the vectors? lambda is scaled along, so that the ratio of the two losses stays.",
                      (Variant("s_1", scale=1.0), Variant("s_5", scale=5.0), Variant("s_sqrt_D")), "scale s"),
    "centring": Ablation("Is it easier to learn a map between vectors whose means were taken away?",
                         (Variant("as_they_are"), Variant("centred", centred=True)), "vectors"),
    "schedule": Ablation("Does the noise schedule matter, or the number of levels T? Entered at the base's k*, and where half the variance is noise.",
                         (*_schedules(), *_schedules("_half", 0.5)), "noise schedule"),
    "blocks": Ablation("How many residual blocks does the network need?", _each("blocks_", "num_blocks", (1, 2, 3, 4, 5)), "residual blocks"),
    "width": Ablation("How wide must it be?", tuple(Variant(f"W_{w}D", {"width_factor": w}) for w in (1, 2, 4)), "width"),
    "ema": Ablation("Does it help to average the weights of the last steps?",
                    (Variant("ema_on", {"ema_decay": BridgeConfig().ema_decay}), Variant("ema_off", {"ema_decay": 0.0})), "weights"),
    "start_step": Ablation("Where should the audio vector enter (k*), and in how many DDIM steps (n) should it leave? Same fits, called otherwise.",
                           _calls([(0, 1), *((k, n) for k in (25, 100, 300, 600) for n in (1, 10)), (300, 5), (300, 50)]),
                           "start step k* and steps n"),
    "entry_noise": Ablation("Must noise be added to the audio vector where it enters? Same fits, one step, called otherwise.",
                            _entries((0, 100, 300, 600)), "noise at entry, by k*"),
    "pairs": Ablation("How many pairs does it take, and do the controls take fewer?",
                      tuple(Variant(f"{system}_{round(100 * share)}pct", system=system, fraction=share)
                            for share in FRACTIONS for system in ("diffusion_link", *CONTROLS)), "share of the training clips",
                      tuple((f"diffusion_link_{round(100 * share)}pct", f"{control}_{round(100 * share)}pct")
                            for share in FRACTIONS[:-1] for control in CONTROLS)),
}
