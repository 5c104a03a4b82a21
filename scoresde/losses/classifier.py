r"""Noise-conditional classifiers: log p(y | x_t) of a network, and the loss that trains one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import positive
from ..diffusion.conditions import Cond, named
from ..diffusion.denoiser import default_noise_input
from ..diffusion.sde import SDE
from ..noise.rng import Rng
from ..ops.broadcast import per_sample, plain, samples
from .denoising import LogSNRTimes, Times
from .loss import Loss, Terms, fresh


class NoisyClassifier(nn.Module):
    r"""log p(y | x_t) of a network of logits: what `guidance.Classifier` takes.

    Its inputs are those of a denoiser's network: c_in x_t with c_in = 1/√(α²σ_d² + σ²), and c_noise = −λ/8.

    Args:
        network: (x (B, *event), c_noise (B,)) -> logits (B, K), such as `nn.Classifier`.
        sde: the process of x_t.
        sigma_data: σ_d, standard deviation of the data, > 0.

    Raises:
        ValueError: sigma_data ≤ 0.
    """

    kind, draws, encodes = "a classifier", False, False  # see `Denoiser`

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor], sde: SDE, *, sigma_data: float = 1.0):
        super().__init__()
        self.network, self.sde = network, sde
        self.sigma_data = positive(sigma_data, "sigma_data", "the standard deviation of the data")

    def logits(self, x: Tensor, t: Tensor) -> Tensor:
        """log p(y | x_t) up to a constant, (B, K), at x (B, *event) and t (() or (B,))."""
        scales = self.sde.at(t, x)
        c_in = (scales.alpha**2 * self.sigma_data**2 + scales.sigma**2).rsqrt()
        return self.network(c_in * x, per_sample(default_noise_input(self.sde, scales.t), x))

    def forward(self, x: Tensor, t: Tensor, y: Cond) -> Tensor:
        """log p(y | x_t) (B,) in nats of labels y (B,), or of a condition with y["label"].

        Raises:
            ValueError: labels that are not integers (B,).
        """
        return self.logits(x, t).log_softmax(1).gather(1, labels(y, len(x))[:, None])[:, 0]


class ClassifierLoss(Loss):
    """Per-sample cross-entropy −log p(y | x_t) in nats, x_t = α x_0 + σ ε at drawn t; to be averaged by the caller.

    Its least mean is the conditional entropy of y at each noise level, reached by the exact posterior only (the
    logarithmic score is proper), whatever the times: these decide where a small network does its best.

    Args:
        classifier: what is trained.
        times: time sampler, default uniform in log-SNR, where classes come and go.
        smoothing: share in [0, 1) of the target that is spread over all classes; 0 for the exact posterior.

    Raises:
        ValueError: smoothing out of range, or a cut-off outside the SDE's times.
    """

    def __init__(self, classifier: NoisyClassifier, times: Times | None = None, *, smoothing: float = 0.0):
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing is a share in [0, 1); got {smoothing}.")
        self.denoiser = classifier
        self.times = LogSNRTimes() if times is None else times
        self.smoothing = float(smoothing)
        self.times.start(classifier.sde)

    @property
    def classifier(self) -> NoisyClassifier:
        """What is trained."""
        return self.denoiser

    def terms(self, x0: Tensor, cond: Cond = None, *, rng: Rng | None = None) -> Terms:
        """The terms of samples x0 (B, *event) with labels (B,), 0 … K − 1; without `rng` the noise is `fresh`."""
        loss, t, _, _ = self._answers(x0, cond, rng)
        return Terms(loss, loss, t)

    def measured(self, x0: Tensor, cond: Cond = None, *, rng: Rng | None = None) -> dict[str, Tensor]:
        """What is reported of held-out samples, (B,) each: "loss", and "accuracy", 1 where the label is likeliest."""
        loss, _, logits, label = self._answers(x0, cond, rng)
        return {"loss": loss, "accuracy": (logits.argmax(1) == label).to(loss.dtype)}

    def _answers(self, x0: Tensor, cond: Cond, rng: Rng | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(cross-entropy, drawn times, logits, labels)."""
        rng, x0 = fresh() if rng is None else rng, samples(x0, "x0")
        sde = self.classifier.sde
        t, _ = self.times.sample(sde, len(x0), rng, x0.device)
        x = sde.perturb(x0, t, rng.normal_like(x0))
        logits, label = self.classifier.logits(x, t), labels(cond, len(x0))
        loss = F.cross_entropy(logits, label, reduction="none", label_smoothing=self.smoothing)
        return loss, t, logits, label


def _whole_numbers(label: Tensor) -> bool:
    return not (label.is_floating_point() or label.is_complex() or label.dtype == torch.bool)


def labels(cond: Cond, n: int) -> Tensor:
    """The labels (n,) int64 of a condition.

    Raises:
        ValueError: it has none, or they are not integers (n,).
    """
    label = named(cond).get("label")
    if label is None or label.shape != (n,) or not _whole_numbers(label):
        got = "none" if label is None else f"{label.dtype} of shape {tuple(label.shape)}"
        raise ValueError(f"A classifier is asked about integer labels ({n},), one per sample; got {got}.")
    return plain(label.long())
