"""Sample k depends on seed k alone, whatever is drawn beside it; and encoding a sample gives its noise back."""

import torch

import scoresde as S


def main() -> dict[str, float]:
    model = S.GaussianMixtureDenoiser(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.05, torch.ones(2) / 2, S.VPSDE())
    sampler = S.Sampler(S.Ancestral(), steps=100)  # which adds noise on the way
    three = sampler(model, (3, 2), rng=S.Rng(seeds=[7, 8, 9]))
    alone = sampler(model, (1, 2), rng=S.Rng(seeds=[9]))

    made, score = S.sample_with_log_prob(model, (16, 2), S.Budget(60), divergence=S.Exact(), rng=S.Rng(0))
    again = S.log_likelihood(model, made, S.Tolerance(1e-6, 1e-6), divergence=S.Exact())
    return {
        "seed 9 among others and alone differ by": float((three[2] - alone[0]).abs().max()),
        "log p drawn and measured differ by, nats": float((score.log_prob - again.log_prob).abs().max()),
        "noise drawn and encoded differ by": float((score.latent - again.latent).abs().max()),
    }


if __name__ == "__main__":
    print(main())
