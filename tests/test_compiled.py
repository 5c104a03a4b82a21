"""Every guidance and inverse method under `torch.compile`: the same numbers, and one network call per evaluation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from scoresde import (
    DDIM,
    DPS,
    EDM,
    MMPS,
    TMPD,
    VPSDE,
    Ancestral,
    Auto,
    Blend,
    Classifier,
    ClassifierFree,
    Conditioned,
    Denoiser,
    DiffPIR,
    Energy,
    Exact,
    LogSNRGrid,
    Magnitude,
    Mask,
    Observation,
    PiGDM,
    Preconditioned,
    RandomProjection,
    RePaint,
    Rng,
    Sampler,
    Step,
    TwistedSMC,
    log_likelihood,
)
from scoresde.likelihood.budget import Budget

LABELS = torch.tensor([0, 1, 2, 0])
X = Rng(0).normal((4, 3), dtype=torch.float64)
ONE, EACH = torch.tensor(0.4, dtype=torch.float64), torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=torch.float64)


class Network(nn.Module):
    """Small and nonlinear, float64, with a null label; counts its calls where it is not compiled."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.inlet, self.outlet, self.label = nn.Linear(3, 16), nn.Linear(16, 3), nn.Embedding(4, 16)
        self.double()

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        y = torch.full((len(x),), 3) if cond is None else cond
        return self.outlet(torch.tanh(self.inlet(x) + self.label(y) + c_noise[:, None]))

    def null(self, cond: Tensor | None) -> Tensor | None:
        return None if cond is None else torch.tensor([3])


def model(seed: int = 0) -> Preconditioned:
    return Preconditioned(Network(seed), VPSDE(), EDM(1.0))


def round_(z: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    return z.square().sum(1)


def log_prob(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    weight = torch.arange(9, dtype=x.dtype).reshape(3, 3).sin()
    return (x @ weight).log_softmax(1).gather(1, y[:, None])[:, 0]


PROJECTION = RandomProjection(2, (3,), Rng(5))
SEEN = Observation(Rng(1).normal((4, 2), dtype=torch.float64), PROJECTION, 0.1)
# a y of more entries than iterations is solved by conjugate gradients
LARGE = Observation(torch.tensor([0.2, 0.0, -0.4], dtype=torch.float64), Mask(torch.tensor([1, 0, 1])), 0.1)
BENT = Observation(Rng(2).normal((4, 2), dtype=torch.float64).abs(), Magnitude(PROJECTION), 0.1)

METHODS = {
    "ClassifierFree": lambda d: ClassifierFree(d, 2.0),
    "ClassifierFree, all of it": lambda d: ClassifierFree(d, torch.sigmoid, interval=(0.1, 9.0), rescale=0.5),
    "Auto": lambda d: Auto(d, model(1), 1.5),
    "Classifier": lambda d: Classifier(d, log_prob, 1.2),
    "Energy": lambda d: Energy(d, round_, 0.2),
    "Energy of x0": lambda d: Energy(d, round_, 0.2, of="x0"),
    "Blend, Conditioned": lambda d: Blend(d, [(Conditioned(d, lambda cond: None), -0.5)]),
    "PiGDM": lambda d: PiGDM(d, SEEN),
    "TMPD": lambda d: TMPD(d, SEEN),
    "MMPS": lambda d: MMPS(d, SEEN),
    "MMPS, bent": lambda d: MMPS(d, BENT),
    "MMPS by products": lambda d: MMPS(d, LARGE, iterations=2, tolerance=1e-9),
    "DPS": lambda d: DPS(d, BENT),
    "DiffPIR": lambda d: DiffPIR(d, LARGE, iterations=2),
}


def same(compiled: Denoiser, denoiser: Denoiser, t: Tensor) -> None:
    with torch.no_grad():
        got, want = compiled(X, t, LABELS), denoiser(X, t, LABELS)
    # other orders of sums in float64, times condition numbers up to 1e3
    torch.testing.assert_close(got.x0, want.x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.eps, want.eps, rtol=1e-9, atol=1e-9)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_one_graph_and_calls_the_network_once(name: str) -> None:
    """At one time, and three of them at one for each; per label and per y. The network is in the graph once."""
    denoiser, graphs = METHODS[name](model()), []
    denoiser(X, ONE, LABELS)  # tries the operator

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(denoiser, backend=backend, fullgraph=True)
    for t in (ONE, EACH) if name in ("ClassifierFree, all of it", "Energy of x0", "MMPS") else (ONE,):
        same(compiled, denoiser, t)
    for graph in graphs:
        modules = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        calls = sum(node.target is torch.tanh for m in modules for node in m.graph.nodes)
        assert calls == (2 if name in ("Auto", "Blend, Conditioned") else 1)  # two models there are


@pytest.mark.parametrize("name", ["Classifier", "MMPS"])
def test_what_compilers_make_of_the_graph_is_the_same(name: str) -> None:
    """Traced once more into aten, without side effects; what inductor starts from (which is slow to test)."""
    denoiser = METHODS[name](model())
    denoiser(X, ONE, LABELS)
    same(torch.compile(denoiser, backend="aot_eager", fullgraph=True), denoiser, ONE)


def test_a_compiled_method_is_a_denoiser_like_others() -> None:
    """For samplers, whose time changes with every step and costs no compilation, and for likelihoods."""
    denoiser, graphs = METHODS["Energy of x0"](model()), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(denoiser, backend=backend, fullgraph=True)
    sampler = Sampler(DDIM(), LogSNRGrid(), 6)
    torch.testing.assert_close(sampler(compiled, X, cond=LABELS), sampler(denoiser, X, cond=LABELS))
    assert len(graphs) == 1
    got, want = (log_likelihood(d, X, cond=LABELS, solver=Budget(6), divergence=Exact()) for d in (compiled, denoiser))
    torch.testing.assert_close(got.log_prob, want.log_prob)
    assert got.evaluations == want.evaluations


ALL = Observation(SEEN.y[0], PROJECTION, 0.1)
STEPS: dict[str, Step] = {
    "RePaint of Replacement": RePaint(Ancestral(), SEEN, jump=1, repeats=2),
    "TwistedSMC": TwistedSMC(ALL, 4, DPS),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_compile(name: str) -> None:
    """Particles in one graph, noise and resampling in it. A⁺ looks at its numbers, so that replacement has breaks."""
    step, denoiser = STEPS[name], model()
    told = LABELS[:1].expand(4) if name == "TwistedSMC" else LABELS  # a group is told the same

    def move(x: Tensor, t: Tensor, s: Tensor, state: object, rng: Rng) -> tuple[Tensor, object]:
        return step(denoiser, x, t, s, state, cond=told, rng=rng)

    ends = []
    for run in (move, torch.compile(move, backend="eager", fullgraph=name == "TwistedSMC")):
        x, state, rng = X, step.init(X), Rng(3)
        with torch.no_grad():
            for t, s in itertools.pairwise(torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)):
                x, state = run(x, t, s, state, rng)
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def test_a_compiled_network_goes_inside_of_every_method() -> None:
    """What is compiled in place, as `compile=true` does; where a method differentiates it, it runs as written."""
    inside, plain = model(), model()
    inside.network.compile(backend="aot_eager")
    for build in METHODS.values():
        same(build(inside), build(plain), ONE)
