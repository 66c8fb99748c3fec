"""The losses: cross-sample prediction, self prediction, and the topology of a batch.

L = L_cross + w L_self + lambda L_topo. Notation: f is the network's prediction, t the text embedding it should give, x_t = s t.
Marks: [paper], (paper~) read in a summary of the paper, [SEED], [ours], as in ``dl.config``.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dl.bridge.scheduler import DDIMScheduler, standard_normal
from dl.config import BridgeConfig

TOPOLOGY_FORMS = ("gram", "softmax_kl", "cross_gram", "distance")


def prediction_loss(prediction: Tensor, target: Tensor, loss: str = "l1") -> Tensor:
    """Mean over rows and coordinates of |f - x_t| ("l1" [SEED]) or of (f - x_t)^2 ("l2").

    L_cross when the prediction was made from audio (name: paper~, form: SEED), L_self when it was made from text [SEED].

    Args:
        prediction, target: (B, D) on the scale of x.
        loss: "l1" or "l2".

    Returns:
        () float.

    Raises:
        ValueError: another loss.
    """
    if loss not in ("l1", "l2"):
        raise ValueError(f"unknown loss {loss!r}: choose l1 or l2")
    return F.l1_loss(prediction, target) if loss == "l1" else F.mse_loss(prediction, target)


def topology_loss(prediction: Tensor, target: Tensor, form: str = "gram", temperature: float = 0.1) -> Tensor:
    """L_topo: keep how the text embeddings of a batch stand to each other. The name is the paper's (paper~), each form is ours.

    With c_ij = cos(f_i, f_j) and g_ij = cos(t_i, t_j), over the pairs i != j:
        gram        mean (c_ij - g_ij)^2
        softmax_kl  mean_i KL(softmax_j(g_ij / tau) || softmax_j(c_ij / tau))
        cross_gram  mean (cos(f_i, t_j) - g_ij)^2
        distance    mean (||f_i - f_j|| - ||t_i - t_j||)^2 of the unit vectors

    Args:
        prediction, target: f and t, (B, D) of any norm, B >= 2.
        form: one of TOPOLOGY_FORMS.
        temperature: tau > 0 of softmax_kl [ours: 0.1].

    Returns:
        () float.

    Raises:
        ValueError: unknown form, or fewer than two rows.
    """
    # DEVIATION(topology-formula): the paper's formula is unknown to us; "gram" is our default, the others are its ablation.
    if form not in TOPOLOGY_FORMS:
        raise ValueError(f"unknown topology_form {form!r}: choose one of {', '.join(TOPOLOGY_FORMS)}")
    if len(prediction) < 2:
        raise ValueError("the topology loss compares pairs of rows: use a batch of at least 2, or topology_weight=0")
    f, t = F.normalize(prediction, dim=-1, eps=1e-6), F.normalize(target, dim=-1)  # (B, D); f starts at 0, hence eps
    gram = t @ t.T  # (B, B)
    if form == "softmax_kl":
        wanted = F.log_softmax(_off_diagonal(gram) / temperature, dim=-1)  # (B, B-1)
        found = F.log_softmax(_off_diagonal(f @ f.T) / temperature, dim=-1)  # (B, B-1)
        return F.kl_div(found, wanted, reduction="batchmean", log_target=True)
    if form == "distance":
        difference = _distance(f @ f.T) - _distance(gram)  # (B, B)
    else:
        difference = (f @ f.T if form == "gram" else f @ t.T) - gram  # (B, B)
    squares = difference.square()
    return (squares.sum() - squares.diagonal().sum()) / (len(f) * (len(f) - 1))


def _distance(cosine: Tensor) -> Tensor:
    """Euclidean distance of unit vectors, sqrt(2 - 2 cos); kept off 0, where the root has no slope."""
    return (2 - 2 * cosine).clamp_min(1e-6).sqrt()


def _off_diagonal(square: Tensor) -> Tensor:
    """The entries i != j of a (B, B) matrix, row by row: (B, B-1)."""
    size = len(square)
    return square.flatten()[1:].view(size - 1, size + 1)[:, :-1].reshape(size, size - 1)


def combined_losses(from_audio: Tensor, from_text: Tensor | None, target: Tensor, config: BridgeConfig) -> dict[str, Tensor]:
    """L = L_cross + w L_self + lambda L_topo, and its parts.

    L_topo is averaged over the predictions that are there [ours]. A part whose weight is 0 is left out, and reads 0.

    Args:
        from_audio: f(x_a^k, k), (B, D).
        from_text: f(x_t^k', k'), (B, D), or None where the text rows were left out (self_weight 0).
        target: x_t, (B, D).
        config: its loss, self_weight, topology_weight and topology_form.

    Returns:
        loss, loss_cross, loss_self, loss_topology, each () float.
    """
    # DEVIATION(prediction-losses): only their names are known to us; L1, equal weights and the self term follow SEED.
    zero = target.new_zeros(())
    losses = {"loss_cross": prediction_loss(from_audio, target, config.loss), "loss_self": zero, "loss_topology": zero}
    predictions = [from_audio]
    if from_text is not None:
        losses["loss_self"] = prediction_loss(from_text, target, config.loss)
        predictions.append(from_text)
    if config.topology_weight:
        # DEVIATION(topology-weight): the paper's lambda is unknown to us; ours is chosen on val.
        topology = [topology_loss(prediction, target, config.topology_form) for prediction in predictions]
        losses["loss_topology"] = torch.stack(topology).mean()
    total = losses["loss_cross"] + config.self_weight * losses["loss_self"] + config.topology_weight * losses["loss_topology"]
    return {"loss": total, **losses}


def bridge_losses(
    network: nn.Module, scheduler: DDIMScheduler, x_audio: Tensor, x_text: Tensor, config: BridgeConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """The losses of one batch of pairs: noise both members (paper~), predict the clean text from each, in one forward pass.

    x^k = sqrt(abar_k) x + sqrt(1 - abar_k) eps, k uniform in 0..T-1; eps and k are drawn apart for the audio row and for the text
    row of a pair. With self_weight 0 the text rows are left out.

    Args:
        network: f.
        scheduler: gives abar.
        x_audio, x_text: paired, scaled embeddings, (B, D) float32.
        config: the loss fields.
        generator: source of eps and k.

    Returns:
        loss, loss_cross, loss_self, loss_topology, () float each.
    """
    x = torch.cat([x_audio, x_text]) if config.self_weight else x_audio  # (2B or B, D)
    noise = standard_normal(x.shape, generator, x.device)  # (2B, D)
    timesteps = torch.randint(scheduler.num_train_timesteps, (len(x),), generator=generator).to(x.device)  # (2B,)
    prediction = network(scheduler.add_noise(x, noise, timesteps), timesteps)  # (2B, D)
    from_audio, *rest = prediction.split(len(x_audio))  # (B, D), (B, D)
    return combined_losses(from_audio, rest[0] if rest else None, x_text, config)
