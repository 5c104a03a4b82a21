"""The state that torch is in when a function is called changes no result: default device and dtype, gradient modes,
threads; and no run of a denoiser changes the mode of its networks."""

from __future__ import annotations

import ast
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import scoresde as S

PACKAGE = Path(S.__file__).parent


class Net(nn.Module):
    """Dropout and batch norm: in training mode nothing can be drawn twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.norm, self.drop = nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Dropout(0.3)
        self.outlet, self.label = nn.Linear(16, 2), nn.Embedding(4, 16)
        self.norm.eval()  # as where a pretrained part is frozen

    def forward(self, x: Tensor, c: Tensor, cond: Tensor | None = None) -> Tensor:
        h = self.inlet(torch.cat([x, c[:, None]], 1))
        h = h if cond is None else h + self.label(cond)
        return self.outlet(self.drop(torch.tanh(self.norm(h))))


def judged(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return -x.square().sum(1)


def runs(model: S.Denoiser) -> dict[str, Callable[[], object]]:
    """What a user calls, each from the same seed."""
    x, label, null = S.Rng(5).normal((6, 2)), torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([3])
    sampler, budget = S.Sampler(S.Heun(), S.LogSNRGrid(), steps=3), S.Budget(8)
    ode = S.AdaptiveODE(1e-2, 1e-2)
    seen = S.Observation(torch.tensor([0.3]), lambda z: z[:, :1], std=0.5, linear=True)
    few = {"samples": 8, "batch_size": 4, "iterations": 2, "fine_steps": 12}
    shape: dict[str, object] = {"shape": (2,)}
    return {
        "draws": lambda: (S.Rng(3).normal((2, 2)), S.Rng(3).uniform((2,)), S.Rng(3).permutation(5)),
        "sampler": lambda: sampler(model, (6, 2), cond=label, rng=S.Rng(0)),
        "seeds": lambda: S.Sampler(S.Ancestral(), steps=3)(model, (2, 2), rng=S.Rng(seeds=[1, 2])),
        "sample": lambda: S.sample(model, x, budget=12, cond=label),
        "iterate": lambda: [trace.x for trace in sampler.iterate(model, x)],
        "corrector": lambda: S.Sampler(S.PredictorCorrector(S.DDIM(), S.Langevin()), steps=2)(model, (6, 2)),
        "restart": lambda: S.Sampler(S.Restart(steps=1, repeats=1), steps=4)(model, (6, 2)),
        "adaptive": lambda: S.Sampler(S.AdaptiveSDE(rtol=0.5, atol=0.5))(model, (6, 2)),
        "encode": lambda: ode.encode(model, x),
        "guided": lambda: sampler(S.ClassifierFree(model, 2.0, null=null), x, cond=label),
        "energy": lambda: sampler(S.Energy(model, judged, of="x0", conditional=False), x),
        "posterior": lambda: sampler(S.MMPS(model, seen), x),
        "sdedit": lambda: S.sdedit(model, x, sampler, 0.5),
        "log p": lambda: S.log_likelihood(model, x, budget, cond=label),
        "log p, exact": lambda: S.log_likelihood(model, x, S.Tolerance(0.1, 0.1), divergence=S.Exact()),
        "log p, sketch": lambda: S.log_likelihood(model, x, S.Budget(9), divergence=S.HutchPlusPlus(1, 2)),
        "both": lambda: S.sample_with_log_prob(model, (6, 2), budget),
        "classify": lambda: S.classify(model, x, 3, budget),
        "elbo": lambda: S.elbo(model, x, samples=2, cond=label),
        "vlb": lambda: S.vlb(model, x, steps=2),
        "weighted": lambda: S.importance_weighted(model, x, steps=2, samples=2),
        "measure": lambda: (model.measure(x).data_std, model.roughness),
        "fit_grid": lambda: S.fit_grid(model, S.Adams(2), steps=3, **shape, **few).log_snr,
        "fit_sampler": lambda: S.fit_sampler(model, budget=4, samples=8, calls=60, **shape).error,
    }  # fmt: skip


NAMES = list(runs(S.ScoreFunction(lambda x, t: -x, S.VPSDE())))


@functools.cache
def network() -> Net:
    torch.manual_seed(0)
    return Net()


def made(training: bool = False) -> S.Preconditioned:
    model = S.Preconditioned(network(), S.VPSDE(), S.EDM())
    network().train(training)
    network().norm.eval()
    return model


def parts(found: object) -> list[object]:
    """The numbers of a result, however it is packed."""
    if isinstance(found, (tuple, list)):
        return [part for one in found for part in parts(one)]
    if isinstance(found, (Tensor, float, int, str, type(None))):
        return [found]
    return parts(list(vars(found).values()))


def assert_same(found: object, right: object) -> None:
    for one, other in zip(parts(found), parts(right), strict=True):
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            assert (one.device, one.dtype) == (other.device, other.dtype)
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
        else:
            assert one == other or one != one


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AMBIENT: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "device": lambda: default_device("meta"),  # in place of a GPU: whatever lands there by mistake has no numbers
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
}


@functools.cache
def without(name: str) -> object:
    return runs(made())[name]()


@pytest.mark.parametrize(
    ("ambient", "name"),
    # a fit, of seconds, once more than its parts
    [(a, n) for a, n in itertools.product(AMBIENT, NAMES) if n != "fit_sampler" or a in ("inference_mode", "device")],
)
def test_results_are_those_without_it(ambient: str, name: str) -> None:
    right, run = without(name), runs(made())[name]
    with AMBIENT[ambient]():
        found = run()
    assert_same(found, right)


@pytest.mark.parametrize("name", NAMES)
def test_networks_run_in_eval_mode_and_are_given_back_as_they_were(name: str) -> None:
    model = made(training=True)
    before = {key: module.training for key, module in model.named_modules()}
    assert_same(runs(model)[name](), without(name))
    assert {key: module.training for key, module in model.named_modules()} == before
    assert before["network.drop"] and not before["network.norm"]


def test_a_mode_comes_back_from_exceptions_and_from_runs_that_are_left() -> None:
    model = made(training=True)
    states = iter(S.Sampler(S.DDIM(), steps=4).iterate(model, (2, 2)))
    next(states), next(states)
    assert network().drop.training  # between two steps the network is the user's
    del states
    with pytest.raises(ZeroDivisionError):
        S.Sampler(S.DDIM(), steps=2)(S.Energy(model, lambda z, t, cond: 1 / 0), (2, 2))
    with pytest.raises(S.SolverError):
        S.log_likelihood(model, torch.full((2, 2), torch.nan), S.Budget(8))
    assert network().drop.training


def test_what_was_made_in_inference_mode_is_taken_outside() -> None:
    """Latents of an encoder, say; autograd refuses to keep them, so they are copied."""
    model = made()
    right = S.log_likelihood(model, S.Rng(5).normal((6, 2)), S.Budget(9), divergence=S.HutchPlusPlus(1, 2))
    with torch.inference_mode():
        x, label, rng = S.Rng(5).normal((6, 2)), torch.tensor([0, 1, 2, 0, 1, 2]), S.Rng(seeds=[0, 1])
    assert x.is_inference()
    assert_same(S.log_likelihood(model, x, S.Budget(9), divergence=S.HutchPlusPlus(1, 2)), right)
    S.DenoisingLoss(model)(x, label).mean().backward()
    S.log_likelihood(model, x, S.Budget(8), cond=label)
    rng.rows(torch.tensor([1])).normal((1, 2))  # a count moves on outside, too
    assert torch.equal(rng.normal((2, 2))[0], S.Rng(0).normal((1, 2))[0])


def test_the_number_of_threads_changes_no_draw() -> None:
    right = S.Rng(0).normal((64, 100))
    try:
        torch.set_num_threads(2)
        assert torch.equal(S.Rng(0).normal((64, 100)), right)
    finally:
        torch.set_num_threads(1)


# Modules make their tensors where the user wants them; commands choose a device of their own.
_ELSEWHERE = ("nn", "kernels", "cli", "evaluate", "runs")
_MAKERS = {"tensor", "zeros", "ones", "empty", "full", "eye", "linspace", "arange", "rand", "randn", "randint"}


def test_every_tensor_is_made_on_a_named_device() -> None:
    """And, where it is not of integers by itself, in a named dtype."""
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in _ELSEWHERE:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("torch."):
                continue
            maker, given = ast.unparse(node.func).removeprefix("torch."), {word.arg for word in node.keywords}
            if maker in _MAKERS:
                assert "device" in given, f"{path}:{node.lineno}: {ast.unparse(node)}"
                whole = maker in ("arange", "randint") or path.name in ("rng.py", "world.py", "folder.py", "kinds.py")
                assert "dtype" in given or whole, f"{path}:{node.lineno}: {ast.unparse(node)}"
