"""What every peer offers, and the way into and out of the centred text space.

A *centred* peer (C3, Diffusion Bridge) answers in the space where a text reads norm(t - mean_t). ``space="centred"`` gives that
answer, ``space="text"`` (the main row) takes it back by ``uncentre``. Notation: norm(x) = x / ||x||, mean_a and mean_t are the
means of the training audio and text vectors; a clip counts once in mean_a, a caption once in mean_t.
"""
from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import normalize


def centre(embeddings: Tensor, mean: Tensor) -> Tensor:
    """Into the centred space of a modality: norm(e - mean). (B, D), (D,) -> (B, D) float32 unit norm. [peer: C3]"""
    return normalize(embeddings.double() - mean.double(), dim=-1).float()


def uncentre(centred_emb: Tensor, text_mean: Tensor, text_radius: float) -> Tensor:
    """Back from the centred text space: norm(mean_t + r_t u), r_t = sqrt(mean ||t - mean_t||^2) over training captions.

    Centring divides every text by its own distance to mean_t; r_t, their root mean square, is put back for all, so that the
    answer stands among the texts instead of outside them. [ours: the peers decode in the centred space and need no way back]
    (B, D), (D,) -> (B, D) float32 unit norm.
    """
    return normalize(text_mean.double() + text_radius * centred_emb.double(), dim=-1).float()


class Peer:
    """What every peer offers: ``fit`` on the training split, then a call that maps audio vectors; here the identity.

    Attributes:
        uses_pairs: whether ``fit`` looks at which caption belongs to which clip.
        uses_memory: whether training captions are kept and read at test time.
        trained: whether gradient steps were taken.
        stochastic: whether the answer depends on ``noise_seed``.
        centred: whether the method answers in the centred text space.
        decoder_noise_variance: variance v of the N(0, v I) noise on the text vectors that train the method's caption decoder.
        fitted: names of the tensors that the map keeps, a memory apart.
        source: where the recipe comes from.
    """

    uses_pairs = False
    uses_memory = False
    trained = False
    stochastic = False
    centred = False
    decoder_noise_variance = 0.0
    fitted: tuple[str, ...] = ()
    source = ""
    audio_mean: Tensor
    text_mean: Tensor
    text_radius: float

    def fit(self, audio: Tensor, text: Tensor, text_clip: Tensor, *, seed: int = 0, **context: Any) -> Peer:
        """Take what the method needs from the training split.

        Args:
            audio: (n, D) float32 unit norm, one row a clip.
            text: (m, D) float32 unit norm, one row a caption.
            text_clip: (m,) int64, the row of ``audio`` that a caption belongs to.
            seed: not used by a closed form.
            context: not used by a closed form.

        Returns:
            The peer itself.
        """
        self.audio_mean = audio.double().mean(0)
        self.text_mean = text.double().mean(0)
        self.text_radius = float((text.double() - self.text_mean).square().sum(1).mean().sqrt())
        self._fit(audio.double(), text.double(), text_clip)
        return self

    def _fit(self, audio: Tensor, text: Tensor, text_clip: Tensor) -> None:
        """What the method adds to the two means; (n, D) and (m, D) float64."""

    def _map(self, audio: Tensor) -> Tensor:
        """The map before its last normalisation; (B, D) float64 -> (B, D) float64."""
        return audio

    def set_inference(self, **values: Any) -> Peer:
        """Change how a fitted peer is called (k*, n, add_noise); a closed form has nothing to change.

        Raises:
            ValueError: the method has no such setting.
        """
        if values:
            raise ValueError(f"{type(self).__name__} has no {', '.join(sorted(values))}: only trained peers change at a call")
        return self

    def __call__(self, audio_emb: Tensor, noise_seed: int = 0, space: str = "text") -> Tensor:
        """Map audio vectors.

        Args:
            audio_emb: (B, D) float32 unit norm.
            noise_seed: not used by a closed form.
            space: "text", or for a centred peer "centred".

        Returns:
            (B, D) float32 unit norm, on the device of ``audio_emb``.

        Raises:
            ValueError: the method does not answer in that space.
        """
        if space not in (("text", "centred") if self.centred else ("text",)):
            raise ValueError(f"{type(self).__name__} does not answer in space {space!r}: use space='text'")
        answer = normalize(self._map(audio_emb.double().cpu()), dim=-1).float()
        if self.centred and space == "text":
            answer = uncentre(answer, self.text_mean, self.text_radius)
        return answer.to(audio_emb.device)

    @property
    def num_parameters(self) -> int:
        """How many fitted numbers the map keeps, a memory apart (the tensors that ``fitted`` names)."""
        return sum(getattr(self, name).numel() for name in self.fitted)
