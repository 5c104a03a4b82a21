"""Samples given a noisy measurement of the first coordinate, beside the exact posterior mean of the second."""

import torch

import scoresde as S

SLOPE, VARIANCE, NOISE = 0.8, 1.0, 0.3


def main() -> dict[str, float]:
    # a Gaussian whose coordinates are correlated, so that the posterior is known
    covariance = torch.tensor([[VARIANCE, SLOPE], [SLOPE, VARIANCE]])
    model = S.GaussianMixtureDenoiser(torch.zeros(1, 2), covariance[None], torch.ones(1), S.VPSDE())
    seen = S.Observation(torch.tensor([1.5]), lambda x: x[:, :1], std=NOISE, linear=True)
    made = S.Sampler(S.DDIM(eta=1.0), S.LogSNRGrid(), steps=100)(S.MMPS(model, seen), (2000, 2), rng=S.Rng(0))
    gain = SLOPE / (VARIANCE + NOISE**2)
    return {
        "mean": float(made[:, 1].mean()),
        "exact mean": gain * 1.5,
        "deviation": float(made[:, 1].std()),
        "exact deviation": (VARIANCE - gain * SLOPE) ** 0.5,
    }


if __name__ == "__main__":
    print(main())
