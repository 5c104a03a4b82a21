"""A conditional model of three clusters, and what classifier-free guidance does to its samples."""

import torch

import scoresde as S

CENTRES = torch.tensor([[0.0, 1.0], [0.9, -0.5], [-0.9, -0.5]])


def main() -> dict[float, float]:
    rng = S.Rng(0)
    labels = rng.integers(3, (4096,))
    data = CENTRES[labels] + 0.5 * rng.normal((4096, 2))  # they overlap
    network = S.nn.MLP((2,), width=64, depth=2, classes=3, cond_dropout=0.2)
    model = S.Preconditioned(network, S.VPSDE(), S.EDM(sigma_data=0.9), sigma_data=0.9)
    loss, optimizer, steps = S.DenoisingLoss(model), torch.optim.Adam(network.parameters()), 400
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        index = rng.integers(len(data), (512,))
        optimizer.zero_grad()
        loss(data[index], labels[index], rng=rng).mean().backward()
        optimizer.step()
    model.eval()
    asked, shares = torch.arange(3).repeat(200), {}
    for scale in (0.0, 1.0, 3.0):  # 0 forgets the class, 1 is the model, more is surer
        guided = S.ClassifierFree(model, scale=scale)
        made = S.Sampler(S.UniPC(2), steps=20)(guided, (600, 2), cond=asked, rng=S.Rng(1))
        shares[scale] = float((torch.cdist(made, CENTRES).argmin(1) == asked).float().mean())
    return shares


if __name__ == "__main__":
    torch.manual_seed(0)
    print(main())
