"""A process of your own: its marginal, the rates of that, and the inverse of the log-SNR. All samplers take it."""

import torch

import scoresde as S


class Line(S.SDE):
    """x_t = x_0 + σ_max t ε."""

    def __init__(self, sigma_max: float = 10.0):
        self.sigma_max, self.t_min, self.t_max = sigma_max, 1e-3, 1.0

    def marginal(self, t):
        return torch.ones_like(t), self.sigma_max * t

    def rates(self, t):
        return torch.zeros_like(t), self.sigma_max * torch.ones_like(t)

    def time(self, log_snr):
        return torch.exp(-0.5 * log_snr) / self.sigma_max


def main() -> dict[str, float]:
    means, weights = torch.tensor([[-1.0], [1.0]]), torch.tensor([0.25, 0.75])
    model = S.GaussianMixtureDenoiser(means, 0.04, weights, Line())
    found = {}
    for name, step, n in (("DDIM", S.DDIM(), 50), ("Heun", S.Heun(), 25), ("reverse SDE", S.Ancestral(), 200)):
        made = S.Sampler(step, S.LogSNRGrid(), steps=n)(model, (2000, 1), rng=S.Rng(0))
        found[name] = float((made > 0).float().mean())  # 0.75 of the data are
    return found


if __name__ == "__main__":
    print(main())
