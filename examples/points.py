"""A network trained on points of the plane: samples, and log p beside the exact density."""

import torch

import scoresde as S


def main() -> dict[str, float]:
    sde = S.VPSDE()
    exact = S.GaussianMixtureDenoiser(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.05, torch.tensor([0.3, 0.7]), sde)
    data = exact.sample(4096, rng=S.Rng(0))
    network = S.nn.MLP((2,), width=64, depth=2)
    model = S.Preconditioned(network, sde, S.EDM(sigma_data=1.0))
    loss, optimizer, rng, steps = S.DenoisingLoss(model), torch.optim.Adam(network.parameters()), S.Rng(1), 500
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        optimizer.zero_grad()
        loss(data[step % 8 :: 8], rng=rng).mean().backward()
        optimizer.step()
    model.eval()
    made = S.Sampler(S.UniPC(2), steps=20)(model, (500, 2), rng=S.Rng(2))
    held_out = exact.sample(200, rng=S.Rng(3))
    found = S.log_likelihood(model, held_out, S.Budget(40), divergence=S.Exact())
    return {
        "samples on the right": float((made[:, 0] > 0).float().mean()),  # 0.7 of the data are
        "log p": float(found.log_prob.mean()),
        "exact log p": float(exact.log_prob(held_out).mean()),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    print(main())
