"""Fréchet distance between Gaussians fitted to features, with the protocol that a number needs to mean anything."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs.codec import Codec
from .features import network_features
from .pairs import paired


def frechet_distance(features_x: Tensor, features_y: Tensor) -> float:
    r"""|μ_x − μ_y|² + tr(Σ_x + Σ_y − 2 (Σ_x^{1/2} Σ_y Σ_x^{1/2})^{1/2}), in squared units of the features.

    The squared 2-Wasserstein distance between the Gaussians of the same mean and covariance (Dowson & Landau 1982,
    eq. 16), with unbiased covariances. The last trace is the sum of the singular values of Σ_x^{1/2} Σ_y^{1/2}, with
    symmetric roots by eigendecomposition, so that nothing complex can appear; round-off below 0 is returned as 0. The
    estimate is biased upwards, by O(1/n).

    Args:
        features_x: (n, F), n ≥ 2.
        features_y: (m, F), m ≥ 2.

    Raises:
        TypeError, ValueError: see `scoresde.metrics.pairs.paired`.
    """
    x, y = paired(features_x, features_y, minimum=2)
    cov_x, cov_y = _covariance(x), _covariance(y)
    cross = torch.linalg.svdvals(_root(cov_x) @ _root(cov_y)).sum()
    squared_shift = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return max(0.0, float(squared_shift + cov_x.trace() + cov_y.trace() - 2 * cross))


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def _root(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


@dataclass(frozen=True)
class FrechetRecord:
    """A Fréchet distance and how it was measured; numbers compare only where everything but `value` agrees.

    Attributes:
        value: see `frechet_distance`.
        name: of the metric, e.g. "LeNet-FD".
        extractor: class of the network.
        samples, reference: number of x and of y.
        dims: of the features.
        rounding: "none", or "k levels": both samples were rounded to the k raw values first.
        small: fewer samples than the protocol asks for; such a value is for watching a run only.
    """

    value: float
    name: str
    extractor: str
    samples: int
    reference: int
    dims: int
    rounding: str
    small: bool

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


class Frechet:
    """Fréchet distance on the features of a network that the user gives, in eval mode, in batches.

    Args:
        extractor: (B, *event) → (B, F); runs where its parameters are, and is left in the mode it was in.
        name: of the metric, e.g. "LeNet-FD". "FID" is reserved for Inception features (Heusel et al. 2017).
        scaling: codec of the data; of integers samples and reference are both decoded to raw values and encoded at bin
            centres first, so that rounding is not what is measured. None for no rounding.
        batch_size: ≥ 1.
        min_samples: fewest samples on either side, ≥ 2. The bias falls as 1/n: published numbers use 50,000.
        allow_small: go on with fewer, or with no more samples than features, and mark the record as small.

    Raises:
        ValueError: a value out of range, or a metric called FID on other features.
    """

    def __init__(
        self,
        extractor: nn.Module,
        name: str,
        *,
        scaling: Codec | None = None,
        batch_size: int = 256,
        min_samples: int = 2048,
        allow_small: bool = False,
    ):
        if batch_size < 1 or min_samples < 2:
            raise ValueError(f"Expected batch_size ≥ 1 and min_samples ≥ 2; got {batch_size} and {min_samples}.")
        classes = {type(module).__name__ for module in extractor.modules()}
        if "fid" in name.lower() and not any("inception" in kind.lower() for kind in classes):
            raise ValueError(
                f"name={name!r}, but {type(extractor).__name__} is no Inception network and its numbers do not compare "
                "with FID. Call it after its features, e.g. 'LeNet-FD'."
            )
        self.extractor, self.name, self.scaling = extractor, name, scaling
        self.batch_size, self.min_samples, self.allow_small = batch_size, min_samples, allow_small

    def __call__(self, x: Tensor, reference: Tensor) -> FrechetRecord:
        """Distance of the samples x (n, *event) from the reference (m, *event), both in model coordinates.

        Raises:
            ValueError: too few samples, or features that are not (B, F) and finite.
        """
        fewest = min(len(x), len(reference))
        if fewest < self.min_samples and not self.allow_small:
            raise ValueError(
                f"{self.name} needs at least {self.min_samples} samples on either side; got {len(x)} and "
                f"{len(reference)}. Draw more, or set allow_small=True for a number that compares with no other."
            )
        features = [self.features(value) for value in (x, reference)]
        dims = features[0].shape[1]
        if fewest <= dims and not self.allow_small:
            raise ValueError(
                f"{self.name}: {fewest} samples cannot fill a covariance of {dims} features; draw more than {dims}, or "
                "set allow_small=True for a number that compares with no other."
            )
        return FrechetRecord(
            value=frechet_distance(*features),
            name=self.name,
            extractor=type(self.extractor).__name__,
            samples=len(x),
            reference=len(reference),
            dims=dims,
            rounding="none" if self.scaling is None else self.scaling.rounding,
            small=fewest < self.min_samples or fewest <= dims,
        )

    def features(self, x: Tensor) -> Tensor:
        """(n, F) float64 on the CPU; see `scoresde.metrics.features.network_features`."""
        return network_features(self.extractor, self._rounded(x), self.batch_size)

    def _rounded(self, x: Tensor) -> Tensor:
        if self.scaling is None or not self.scaling.discrete:
            return x
        return self.scaling.encode(self.scaling.decode(x))
