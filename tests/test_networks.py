"""The recipes of `benchmarks/networks.py`: each builds, and what is trained is what is loaded."""

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch

import scoresde as S

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def recipes(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("recipes")


def test_every_recipe_builds_and_predicts_noise_at_the_end_of_time(recipes):
    """A zero or random network still says that x_T is mostly noise: x̂_0 α + ε̂ σ = x at every time."""
    shapes = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar": (3, 32, 32), "audio": (1, 256), "ethanol": (27,)}
    for name, recipe in recipes.RECIPES.items():
        denoiser = recipe.denoiser().double()
        shape = shapes.get(name.split("_")[0], (2,))
        x = S.Rng(0).normal((2, *shape), dtype=torch.float64)
        for t in (denoiser.sde.t_min, denoiser.sde.t_max):
            found = denoiser(x, torch.tensor(t, dtype=torch.float64))
            # float64: two terms of size |x|/α and |x|/σ at most, which cancel
            scale = 1e-12 * (1 + 1 / float(found.scales.alpha.min()))
            assert (found.x0 * found.scales.alpha + found.eps * found.scales.sigma - x).abs().max() < scale, name


def test_the_discrete_loss_asks_for_the_steps_of_its_table_each_as_often(recipes):
    sde = recipes.linear_betas(8)
    t, importance = recipes.TableTimes().sample(sde, 8000, S.Rng(0), torch.device("cpu"))
    steps = recipes.step_index(sde, t)
    assert bool((importance == 1).all())
    assert torch.equal(steps, steps.round())
    counts = torch.bincount(steps.long(), minlength=8)
    assert len(counts) == 8
    assert (counts - 1000).abs().max() < 5 * (8000 / 8 * 7 / 8) ** 0.5  # five standard deviations of a binomial count


def test_a_trained_network_is_loaded_with_its_weights_and_shape(recipes, monkeypatch, tmp_path):
    recipe = dataclasses.replace(recipes.RECIPES["moons_relu"], images=2048, batch=256)
    monkeypatch.setitem(recipes.RECIPES, "moons_relu", recipe)
    with pytest.raises(FileNotFoundError, match=r"networks\.py train moons_relu"):
        recipes.load("moons_relu", tmp_path)
    recipes.train("moons_relu", Path(), tmp_path)
    denoiser, shape, cond = recipes.load("moons_relu", tmp_path)
    start = recipe.denoiser().network.state_dict()
    assert shape == (2,)
    assert cond(3) is None
    assert any(not torch.equal(value, start[key]) for key, value in denoiser.network.state_dict().items())
    again, _, _ = recipes.load("moons_relu", tmp_path)
    x, t = S.Rng(1).normal((4, 2)), torch.tensor(0.5)
    assert torch.equal(denoiser(x, t).x0, again(x, t).x0)
    assert abs(float(recipes.facts("moons_relu", tmp_path)["spread"]) - 1) < 0.05  # toys have variance 1
