"""Two processes against one: the same losses, weights, averages and moments, in copies (DDP) and in slices (FSDP2)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import Net
from together import together
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from scoresde import VPSDE, DenoisingLoss, Eps, Preconditioned, Rng
from scoresde.codecs import Scaling
from scoresde.data import Dataset, EpochOrder, Split
from scoresde.losses.coupling import Coupling, Independent, OptimalTransport
from scoresde.losses.denoising import LogSNRTimes, StratifiedTimes, Times, UniformTimes
from scoresde.nn import DiT, LogVariance, UNet
from scoresde.runs.checkpoint import latest, save
from scoresde.train.ema import EMA, PowerEMA
from scoresde.train.parallel import Single, spread_over
from scoresde.train.state import TrainingState
from scoresde.train.trainer import Trainer
from scoresde.train.world import Alone, World, join

CPU = torch.device("cpu")
SAMPLES = 200
RECIPES: dict[str, tuple[Times, Coupling]] = {
    "uniform": (UniformTimes(), Independent()),
    "stratified": (StratifiedTimes(), OptimalTransport(group=16)),
    "log-SNR": (LogSNRTimes(), OptimalTransport(group=32)),
}


def training(
    world: World, how: str, *, recipe: str = "uniform", batch: int = 64, small: bool = False, dropout: float = 0.0,
    power: bool = False, learned: bool = False, seed: int = 0, drop_last: bool = True, lr: float = 1e-3,
    patched: bool = False,
) -> TrainingState:  # fmt: skip
    """A U-Net on images of 8 x 8, a transformer on patches of them, or two layers on points of the plane."""
    torch.manual_seed(seed)
    event = (2,) if small else (1, 8, 8)
    network = Net(dropout) if small else UNet(event, width=8, multipliers=(1, 2), blocks=1, attention=(4,))
    if patched:
        network = DiT(event, width=16, depth=3, heads=2, skips=True)
    with (
        torch.no_grad()
    ):  # a U-Net starts at zero, where most gradients are zero too and Adam divides round-off by itself
        for p in network.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    times, coupling = RECIPES[recipe]
    uncertainty = LogVariance(8) if learned else None
    loss = DenoisingLoss(
        Preconditioned(network, VPSDE(), Eps()), times=times, coupling=coupling, uncertainty=uncertainty
    )
    ema = PowerEMA(loss, sigma_rel=(0.05, 0.1)) if power else EMA(loss, half_life=500)
    parallel = spread_over(world, loss, ema, how)
    # the default eps of 1e-8 turns gradients that are nothing but round-off (of biases before a normalisation) into
    # steps of length lr; with 1e-3 a difference of 1e-7 between gradients makes one of lr · 1e-4 between weights
    optimizer = torch.optim.AdamW(loss.parameters(), lr, eps=1e-3, fused=True)
    if world.rank:
        torch.manual_seed(seed + world.rank)
    x = torch.randn(SAMPLES, *event, generator=torch.Generator().manual_seed(0))
    return TrainingState(
        loss, optimizer, ema, Dataset("normal", Split(x), Split(x), Scaling.identity()),
        EpochOrder(SAMPLES, batch, 0, drop_last), Rng(seed), world=world, parallel=parallel,
    )  # fmt: skip


def trainer(accumulate: int = 1, images: int = 10**6) -> Trainer:
    return Trainer(images=images, batch_size=64, accumulate=accumulate, warmup=200, clip=0.5)


def steps(run: TrainingState, n: int, accumulate: int = 1) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each of n steps."""
    found = []
    for _ in range(n):
        trainer(accumulate).step(run)
        averages = run.tally.averages(reset=True)
        assert averages.skipped == 0
        found.append((averages.loss, averages.grad_norm))
    return found


Groups = dict[str, dict[str, Tensor]]


def largest(mine: Groups, theirs: Groups) -> dict[str, float]:
    """Largest difference, by group: of weights and averages as it is, of moments over the largest of their kind."""
    found = {"noise": float(not torch.equal(mine["random"]["noise"], theirs["random"]["noise"]))}
    assert mine.keys() == theirs.keys()
    for name in mine.keys() - {"random"}:
        assert mine[name].keys() == theirs[name].keys()
        for kind in {key.rpartition("/")[2] if name == "optimizer" else "" for key in mine[name]}:
            keys = [key for key in mine[name] if key.endswith(kind)]
            scale = max(float(theirs[name][key].abs().max()) for key in keys) if kind else 1.0
            error = max(float((mine[name][key] - theirs[name][key]).abs().max()) for key in keys)
            # what is squared has twice the relative error
            found[name] = max(found.get(name, 0.0), error / scale / (2 if kind == "exp_avg_sq" else 1))
    return found


def compare(cases: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float, float, dict[str, float]]]:
    """Each case by both processes and, on rank 0, by one: differences of losses, gradient norms and everything."""
    world, found = join(CPU, 600), []
    for case in cases:
        kind = {key: value for key, value in case.items() if key not in ("how", "accumulate")}
        many = training(world, case["how"], **kind)
        if case.get("patched"):
            assert all(isinstance(block, FSDPModule) for block in many.loss.denoiser.network.blocks)
        rows, whole = steps(many, 10, case["accumulate"]), many.tensors()
        if world.rank == 0:
            one = training(Alone(), "ddp", **kind)
            alone = steps(one, 10, case["accumulate"])
            of_loss, of_norm = (max(abs(a[i] / b[i] - 1) for a, b in zip(rows, alone, strict=True)) for i in (0, 1))
            assert min(norm for _, norm in alone) > 0.5, "nothing was clipped"
            found.append((case, of_loss, of_norm, largest(whole, one.tensors())))
    world.close()
    return found


CASES = [
    {"how": "ddp", "accumulate": 1, "recipe": "stratified"},
    {"how": "ddp", "accumulate": 2, "recipe": "log-SNR", "learned": True, "power": True},
    {"how": "fsdp", "accumulate": 1, "recipe": "uniform"},
    {"how": "fsdp", "accumulate": 2, "recipe": "stratified", "learned": True, "power": True},
    {"how": "fsdp", "accumulate": 1, "recipe": "uniform", "patched": True},
]


def test_two_processes_learn_what_one_learns() -> None:
    """Ten steps of 64 = 2 x 32 images. Sums of 64 terms are exact to 4e-7: nothing may be beyond 1e-6."""
    found, nothing = together(compare, CASES)
    assert len(found) == len(CASES) and nothing == []
    for case, of_loss, of_norm, of_tensors in found:
        assert of_loss < 1e-6 and of_norm < 1e-6, case
        assert of_tensors["noise"] == 0 and max(of_tensors.values()) < 1e-6, (case, of_tensors)


def go_on(folder: Path) -> list[tuple[str, dict[str, float]]]:
    """Three steps by one kind of world, a checkpoint, three more by each other kind: against one process all along."""
    world, found = join(CPU, 600), []
    kinds: dict[str, tuple[World, str]] = {"ddp": (world, "ddp"), "fsdp": (world, "fsdp"), "one": (Alone(), "ddp")}

    def idle(name: str) -> bool:  # one process is rank 0
        return name == "one" and world.rank > 0

    def of(name: str, seed: int = 0) -> TrainingState:
        return training(*kinds[name], recipe="stratified", seed=seed)

    plain = None if idle("one") else of("one")
    if plain is not None:
        steps(plain, 6)
    for name in kinds:
        if not idle(name):
            run = of(name)
            steps(run, 3)
            tensors, records = run.tensors(), run.records()
            if world.rank == 0:
                save(folder / name, run.step, tensors, records)
        world.gather(None)  # until it is there
        for other in [kind for kind in kinds if kind != name]:
            checkpoint = latest(folder / name)
            assert checkpoint is not None
            if not idle(other):
                run = of(other, seed=9)
                run.restore(checkpoint)
                assert (run.step, run.images) == (3, 192)
                steps(run, 3)
                ended = run.tensors()
                if plain is not None:
                    found.append((f"{name} to {other}", largest(ended, plain.tensors())))
    world.close()
    return found


def test_a_checkpoint_is_of_no_number_of_processes(tmp_path: Path) -> None:
    found, nothing = together(go_on, tmp_path)
    kinds = ("ddp", "fsdp", "one")
    assert {name for name, _ in found} == {f"{a} to {b}" for a in kinds for b in kinds if a != b} and nothing == []
    for name, differences in found:
        assert max(differences.values()) < 1e-6, (name, differences)


class Watched(EpochOrder):
    """Remembers what it gave."""

    seen: list[list[int]]

    def next(self) -> Tensor:
        batch = super().next()
        self.seen = [*getattr(self, "seen", []), batch.tolist()]
        return batch


def changing(folder: Path) -> tuple[list[float], list[float], list[list[int]], dict[str, float]]:
    """150 steps: by one, from 50 on by two, from 100 on by one again, each from a checkpoint; and by one all along."""
    world, losses = join(CPU, 600), list[float]()
    seen: list[list[int]] = []
    batch = 40  # 5 steps an epoch
    plain = training(Alone(), "ddp", small=True, batch=batch)
    expected = [loss for loss, _ in steps(plain, 150)]
    for part, kind in enumerate((Alone(), world, Alone())):
        run = training(kind, "ddp", small=True, batch=batch, seed=part)
        run.order = run.loader.order = Watched(SAMPLES, batch, 0)
        if part and (checkpoint := latest(folder)) is not None:
            run.restore(checkpoint)
        assert run.step == 50 * part
        losses += [loss for loss, _ in steps(run, 50)]
        own = [indices[kind.rank * batch // kind.size :][: batch // kind.size] for indices in run.order.seen]
        shares = world.gather(own)[: kind.size]
        seen += [[i for share in step for i in share] for step in zip(*shares, strict=True)]
        tensors, records = run.tensors(), run.records()
        if world.rank == 0:
            save(folder, run.step, tensors, records)
        world.gather(None)
    world.close()
    return losses, expected, seen, largest(run.tensors(), plain.tensors())


def test_one_two_one(tmp_path: Path) -> None:
    """The number of processes changes at steps 50 and 100: each index once per epoch, and losses to 1e-6."""
    for losses, expected, seen, differences in together(changing, tmp_path):
        assert len(losses) == len(seen) == 150
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-6
        assert max(differences.values()) < 1e-5  # of weights that have moved by 0.1 in 150 steps
        for epoch in range(30):
            indices = [i for batch in seen[5 * epoch : 5 * epoch + 5] for i in batch]
            assert sorted(indices) == list(range(SAMPLES))


def spanning(folder: Path) -> list[tuple[float, ...]]:
    """Averages over 6 steps with a checkpoint after 3: by one all along, and by 1 to 2, 2 to 2 and 2 to 1 processes."""
    world, found = join(CPU, 600), []
    for number, kinds in enumerate([[Alone()] * 2, [Alone(), world], [world, world], [world, Alone()]]):
        run = training(kinds[0], "ddp", small=True, batch=40)
        for _ in range(3):
            trainer().step(run)
        tensors, records = run.tensors(), run.records()
        if world.rank == 0:
            save(folder / str(number), run.step, tensors, records)
        world.gather(None)
        again, checkpoint = training(kinds[1], "ddp", small=True, batch=40), latest(folder / str(number))
        assert checkpoint is not None
        again.restore(checkpoint)
        for _ in range(3):
            trainer().step(again)
        averages = again.tally.averages()
        found.append((averages.loss, averages.grad_norm, *averages.by_time))
    world.close()
    return found


def test_rows_that_span_a_change_are_those_of_one(tmp_path: Path) -> None:
    for found in together(spanning, tmp_path):
        assert all(math.isfinite(value) for value in found[0])
        for row in found[1:]:
            assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(row, found[0], strict=True))


def exchanges() -> list[int]:
    """Buckets exchanged in 4 steps, of one pass and of three."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    exchange, world, found, count = default_hooks.allreduce_hook, join(CPU, 600), [], 0

    def counted(state: Any, bucket: Any) -> Any:
        nonlocal count
        count += 1
        return exchange(state, bucket)

    default_hooks.allreduce_hook = counted
    for accumulate in (1, 3):
        run, count = training(world, "ddp", small=True, batch=40), 0
        steps(run, 4, accumulate)
        found.append(count)
    world.close()
    return found


def test_gradients_are_exchanged_once_a_step() -> None:
    assert together(exchanges) == [[4, 4], [4, 4]]


def with_dropout(folder: Path, how: str) -> tuple[bool, bool, bool, bool]:
    """Whether masks differ between ranks; a stop changes a bit; anything but the right generator would have shown."""
    world = join(CPU, 600)
    run = training(world, how, small=True, dropout=0.5)
    masks = world.gather(torch.nn.functional.dropout(torch.ones(100)))
    steps(run, 3)
    tensors, records = run.tensors(), run.records()
    if world.rank == 0:
        save(folder, run.step, tensors, records)
    world.gather(None)
    checkpoint = latest(folder)
    assert checkpoint is not None
    rows, whole = steps(run, 4), run.tensors()
    again, other = training(world, how, small=True, dropout=0.5, seed=5), training(world, how, small=True, dropout=0.5)
    again.restore(checkpoint)
    same_rows, same = steps(again, 4) == rows, again.tensors()
    other.restore(checkpoint)
    torch.manual_seed(77 + world.rank)
    differs = steps(other, 4) != rows
    world.close()
    equal = all(torch.equal(same[g][k], value) for g, part in whole.items() for k, value in part.items())
    return not torch.equal(*masks), same_rows, equal, differs


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_dropout_goes_on_where_it_was(tmp_path: Path, how: str) -> None:
    """With as many processes as before, each gets its own generator back, and everything is equal bit for bit."""
    assert together(with_dropout, tmp_path, how) == [(True, True, True, True)] * 2


def snapshots(folder: Path) -> None:
    world = join(CPU, 600)
    for how in ("ddp", "fsdp"):
        run = training(world, how, power=True, learned=True)
        steps(run, 3)
        run.snapshot(folder / how)
        # what is evaluated: whole on every process, and the same on each
        run.refresh()
        value = run.average.terms(run.dataset.train.raw[:32], rng=Rng(3)).loss.mean()
        assert len(set(world.gather(float(value)))) == 1
        assert not any(p.requires_grad for p in run.average.parameters()) and not run.average.training
        if world.rank == 0:
            (folder / f"{how}.loss").write_text(repr(float(value)))
    world.close()


def test_snapshots_and_measurements_are_of_whole_averages(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    together(snapshots, tmp_path)
    (one,), (other,) = (list((tmp_path / how).iterdir()) for how in ("ddp", "fsdp"))
    assert one.name == other.name
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys() and len(a) > 40
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-6
    losses = [float((tmp_path / f"{how}.loss").read_text()) for how in ("ddp", "fsdp")]
    assert math.isclose(*losses, rel_tol=1e-6)


def refusals() -> list[str]:
    world, found = join(CPU, 600), []
    for batch, drop_last in ((63, True), (1, True), (64, False)):
        try:
            training(world, "ddp", small=True, batch=batch, drop_last=drop_last)
        except ValueError as error:
            found.append(str(error))
    training(world, "ddp", small=True, batch=2)
    world.close()
    return found


def test_batches_that_cannot_be_divided_are_refused() -> None:
    for found in together(refusals):
        assert len(found) == 3
        for text, batch in zip(found, (63, 1, 64), strict=True):
            assert f"batch_size={batch} is of all 2 processes" in text and "drop_last=True" in text


def test_one_process_needs_no_wrapper() -> None:
    run = training(Alone(), "fsdp", small=True)
    assert isinstance(run.parallel, Single)
    assert run.parallel.view(run.average) is run.average
