"""scoresde-distil: from any run a flow map, whose folder is a run as any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PLAIN, TINY, command

from scoresde import (
    DDIM,
    ClassifierFree,
    DenoisingLoss,
    FlowMap,
    FlowMapSteps,
    Rng,
    Sampler,
    load,
    sample_with_log_prob,
)
from scoresde.runs.checkpoint import latest
from scoresde.runs.objective import build_loss

STUDENT = (
    "trainer.images=256", "trainer.batch_size=64", "trainer.warmup=0", "trainer.log_every=64",
    "trainer.evaluate_every=0", "trainer.checkpoint_every=128", "evaluation.samples=4", "evaluation.pictures=false",
    "loss.steps=4", "logger=jsonl", "threads=1",
)  # fmt: skip
DRAW = ("n=4", "pictures=false", "threads=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher`, of digits by class, and `fast`, its flow map at guidance scale 2."""
    folder = tmp_path_factory.mktemp("distil")
    digits = ["data=digits", *TINY[3:], "conditional=true", "network.cond_dropout=0.2", "evaluate_at_end=false"]
    done = command("train", *digits, *PLAIN, "parameterization=edm", "out=teacher", cwd=folder)
    assert done.code == 0, done.err
    guided = ("guidance=cfg", "guidance.scale=2")
    done = command("distil", "run=teacher", "out=fast", *guided, *STUDENT, cwd=folder)
    assert done.code == 0, done.err
    assert "It starts from Run('teacher': samples of digits" in done.out
    return folder


def test_its_run_samples_by_one_call_and_by_a_few(folder: Path) -> None:
    done = command("sample", "run=fast", "sampler.steps=2", *DRAW, "out=two", cwd=folder)
    assert done.code == 0 and "flow_map" in done.out, done.err
    run = load(folder / "fast")
    made = run.sample(4, budget=2, rng=Rng(seeds=range(4)))
    np.testing.assert_allclose(np.load(folder / "two" / "samples.npz")["flow_map"], made.numpy(), rtol=1e-5, atol=1e-4)
    assert run.sampler(1).evaluations == 1 and run.sample(3).shape == (3, *run.raw_shape)
    with pytest.raises(AssertionError):  # one call is not two
        torch.testing.assert_close(run.sample(4, rng=Rng(seeds=range(4))), made)


def test_it_begins_as_ddim_of_the_guided_teacher(folder: Path) -> None:
    """After 256 samples at a rate that a network that is told nothing new would keep, they are still alike."""
    teacher, map = load(folder / "teacher"), load(folder / "fast").denoiser
    state = {name: value for name, value in map.state_dict().items() if ".told." not in name}
    assert state.keys() == teacher.denoiser.state_dict().keys()
    label, x = torch.arange(4), teacher.denoiser.prior_sample((4, *teacher.event_shape), rng=Rng(0))
    map.load_state_dict(teacher.denoiser.state_dict(), strict=False)
    torch.nn.init.zeros_(map.network.conditioning.told["end"].weight)
    for steps in (1, 5):
        want = Sampler(DDIM(), None, steps, denoise=False)(ClassifierFree(teacher.denoiser, 2.0), x, cond=label)
        got = Sampler(FlowMap(), None, steps, denoise=False)(ClassifierFree(map, 2.0), x, cond=label)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_condition_is_dropped_for_the_teacher_and_the_map_alike(folder: Path) -> None:
    """By the loss, and no more by the network; so the map may be guided from outside."""
    run = load(folder / "fast")
    assert run.config["network"]["cond_dropout"] == 0 and run.config["loss"]["cond_dropout"] == 0.2
    assert not run.always_conditional and run.sample(2, cond=[3, 4], guidance=2.0).shape == (2, *run.raw_shape)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(folder: Path) -> None:
    shutil.copytree(folder / "fast", folder / "stopped")
    last = latest(folder / "stopped" / "checkpoints")
    assert last is not None
    shutil.rmtree(last.path)
    again = ("guidance=cfg", "guidance.scale=2", *STUDENT, "out=stopped", "resume=auto")
    done = command("distil", "run=teacher", *again, cwd=folder)
    assert done.code == 0 and "stopped at step 2." in done.out, done.out + done.err
    one, two = (load(folder / name, weights="weights").denoiser.state_dict() for name in ("fast", "stopped"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=0)


def test_what_is_left_of_it_without_a_teacher_is_a_denoiser(folder: Path) -> None:
    run = load(folder / "fast")
    assert run.config["teacher"]["run"] == "teacher" and run.config["teacher"]["guidance"]["scale"] == 2
    assert type(build_loss(run.config, run.denoiser, [])) is DenoisingLoss


def test_its_likelihood_says_whose_it_is(folder: Path) -> None:
    few = ("n=2", "threads=1")
    done = command("likelihood", "run=fast", "likelihood=budget", "likelihood.solver.calls=4", *few, cwd=folder)
    assert done.code == 0 and "not of the samples that its few steps make: likelihood=flow_map" in done.out, done.err
    done = command("likelihood", "run=teacher", "likelihood=flow_map", "out=refused", *few, cwd=folder)
    assert done.code == 1 and "told one noise level only" in done.err, done.out + done.err
    assert not (folder / "refused").exists()
    run = load(folder / "fast")
    x, drawn = sample_with_log_prob(run.denoiser, (2, *run.event_shape), FlowMapSteps(2))
    assert x.shape == (2, *run.event_shape) and drawn.name == "bpd/flow-map"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run=fast"], "is a flow map already"),
        (["run=teacher", "loss=simple"], "has no parameter 'teacher'"),
        (["run=teacher", "loss.scales=[4,1]"], "scales is (low, high)"),
        (["run=teacher", "loss.steps=1"], "steps is a whole number of at least 2"),
        (["run=nothing"], "run=nothing is no folder"),
    ],
)
def test_what_cannot_be_distilled_is_refused_and_leaves_nothing(folder: Path, words: list[str], said: str) -> None:
    options = STUDENT[:-3] if "loss=simple" in words else STUDENT  # which has no steps
    done = command("distil", *options, *words, "out=refused", cwd=folder)
    assert done.code == 1 and said in done.err, done.out + done.err
    assert not (folder / "refused").exists()
