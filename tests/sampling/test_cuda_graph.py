"""Sampling by one CUDA graph, without a GPU.

Two stand-ins. For the logic a graph that runs its function again where a real one would replay its kernels: static
buffers, noise by position, what is recorded anew and when. For what a capture cannot contain a device that has shapes
and no values: whatever reads one, or copies between it and the CPU, is an error there, as it is in a capture.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracles import all_sdes, mixture
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from scoresde import (
    DDIM,
    DEIS,
    EDM,
    IPNDM,
    RK4,
    VPSDE,
    Adams,
    AdaptiveODE,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    Churn,
    DPMSolver,
    DPMSolverPP,
    EulerMaruyama,
    Heun,
    KarrasGrid,
    Langevin,
    LogSNRGrid,
    Midpoint,
    Preconditioned,
    PredictorCorrector,
    Restart,
    ReverseDiffusion,
    Rng,
    Sampler,
    SASolver,
    SolverError,
    TorchSDE,
    UniPC,
)
from scoresde.nn import MLP, UNet
from scoresde.noise import switch
from scoresde.sampling import Step, cuda_graph

STOCHASTIC: dict[str, Step] = {
    "euler-maruyama": EulerMaruyama(),
    "reverse-diffusion": ReverseDiffusion(),
    "ddim": DDIM(0.5),
    "ancestral": Ancestral(),
    "pc": PredictorCorrector(ReverseDiffusion(), Langevin()),
    "pc-measured": PredictorCorrector(ReverseDiffusion(), Langevin(measured=True), corrector_steps=2),
    "pc-annealed": PredictorCorrector(Ancestral(), AnnealedLangevin()),
    "churn": Churn(),
    "restart": Restart(high=5.0, repeats=2, steps=2),
    "restart-dpmpp": Restart(DPMSolverPP(), high=5.0, repeats=1, steps=3),
    "dpm-solver": DPMSolver(3, eta=1.0),
    "dpmpp": DPMSolverPP(2, eta=1.0),
    "unipc": UniPC(2, eta=1.0),
    "sa": SASolver(3, 2),
    "deis": DEIS(3, eta=0.5),
    "adams": Adams(3, 3, eta=1.0),
}
DETERMINISTIC: dict[str, Step] = {
    "euler": EulerMaruyama(probability_flow=True),
    "reverse-diffusion-pf": ReverseDiffusion(probability_flow=True),
    "ddim-0": DDIM(),
    "heun": Heun(),
    "midpoint": Midpoint(),
    "rk4": RK4(),
    "dpm-solver-2": DPMSolver(2),
    "dpm-solver-eps": DPMSolver(3, "eps"),
    "dpmpp-3": DPMSolverPP(3),
    "unipc-3": UniPC(3),
    "deis-4": DEIS(4),
    "ipndm": IPNDM(),
    "adams-0": Adams(3),
}
SDES = all_sdes()


class Network(nn.Module):
    """One layer, one buffer, and a condition that may be missing, a tensor or a mapping."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any = None) -> Tensor:
        inputs = torch.cat([x, c_noise[:, None]], 1).to(self.layer.weight.dtype)
        out = torch.tanh(self.layer(inputs)).to(x.dtype) * self.scale
        if cond is None:
            return out
        return out + (cond if isinstance(cond, Tensor) else cond["a"] - cond["b"])


def network() -> Preconditioned:
    torch.manual_seed(0)
    return Preconditioned(Network(), VPSDE(), EDM())


# The logic, with a graph that runs its function again.


class Again:
    """Where a real graph holds kernels and the memory they read and write, this holds the function."""

    recorded = 0
    forget = False  # a real graph does not keep the function, and so not the network

    def __init__(self, like: Tensor):
        self.run: Callable[[], Tensor] | None = None

    def record(self, run: Callable[[], Tensor]) -> Tensor:
        type(self).recorded += 1
        run()
        self.out = run()
        if not self.forget:
            self.run = run
        return self.out

    def replay(self) -> None:
        assert self.run is not None
        self.out.copy_(self.run())


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> type[Again]:
    class Fresh(Again):
        pass

    monkeypatch.setattr(cuda_graph, "CudaGraph", Fresh)
    return Fresh


def samplers(step: Step, steps: int = 5, **how: Any) -> tuple[Sampler, Sampler]:
    """One by a graph and one by the loop."""
    return Sampler(step, steps=steps, cuda_graph=True, **how), Sampler(step, steps=steps, **how)


def same_streams(one: Rng, other: Rng) -> bool:
    return torch.equal(one.state_dict()["streams"], other.state_dict()["streams"])


RNGS: dict[str, Callable[[int], Rng]] = {
    "one": lambda seed: Rng(seed),
    "per-sample": lambda seed: Rng(seeds=[seed, 5, 2**62 + seed]),
    "share": lambda seed: Rng(seed).share(1, 3),
}


@pytest.mark.parametrize("make", RNGS.values(), ids=RNGS.keys())
@pytest.mark.parametrize("step", STOCHASTIC.values(), ids=STOCHASTIC.keys())
def test_a_replay_gives_what_the_loop_gives_and_leaves_rng_there(
    step: Step, make: Callable[[int], Rng], graph: type[Again]
) -> None:
    """Bit for bit, by one recording: for the first seed, for the numbers after it, and for another seed."""
    model = network()
    by_graph, by_loop = samplers(step, grid=LogSNRGrid())
    one, other = make(1), make(1)
    outputs = []
    for _ in range(2):
        outputs.append(by_graph(model, (3, 2), rng=one))
        assert torch.equal(outputs[-1], by_loop(model, (3, 2), rng=other))
        assert same_streams(one, other)
    one, other = make(4), make(4)
    one.normal((3, 2)), other.normal((3, 2))  # begins at its second draw
    outputs.append(by_graph(model, (3, 2), rng=one))
    assert torch.equal(outputs[-1], by_loop(model, (3, 2), rng=other)) and same_streams(one, other)
    assert graph.recorded == 1
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("step", DETERMINISTIC.values(), ids=DETERMINISTIC.keys())
def test_steps_without_noise_too(step: Step, graph: type[Again]) -> None:
    model = network()
    by_graph, by_loop = samplers(step)
    for seed in (0, 1):
        assert torch.equal(by_graph(model, (3, 2), rng=Rng(seed)), by_loop(model, (3, 2), rng=Rng(seed)))
    assert graph.recorded == 1


def test_streams_that_stand_apart(graph: type[Again]) -> None:
    """Streams of a part moved alone before; only the part's move on now."""
    model = network()
    by_graph, by_loop = samplers(Ancestral())
    positions = []
    for sampler in (by_graph, by_loop):
        rng = Rng(seeds=[7, 8, 9])
        rng.rows(torch.tensor([1])).normal((1, 2))
        whole = sampler(model, (3, 2), rng=rng)
        part = sampler(model, (2, 2), rng=rng.rows(torch.tensor([2, 0])))
        positions.append((whole, part, rng.state_dict()["streams"]))
    for found, expected in zip(*positions, strict=True):
        assert torch.equal(found, expected)


def test_given_starting_points_are_read_and_not_kept(graph: type[Again]) -> None:
    model = network()
    by_graph, by_loop = samplers(Ancestral())
    start = torch.randn(3, 2)
    kept = start.clone()
    first = by_graph(model, start, rng=Rng(0))
    again = by_graph(model, 2 * start, rng=Rng(0))
    assert torch.equal(first, by_loop(model, start, rng=Rng(0)))  # not overwritten by the second replay
    assert torch.equal(again, by_loop(model, 2 * start, rng=Rng(0)))
    assert torch.equal(start, kept) and graph.recorded == 1


def test_conditions_are_copied_in(graph: type[Again]) -> None:
    model = network()
    by_graph, by_loop = samplers(Ancestral())

    def check(cond: Any, recorded: int) -> None:
        expected = by_loop(model, (3, 2), cond=cond, rng=Rng(0))
        assert torch.equal(by_graph(model, (3, 2), cond=cond, rng=Rng(0)), expected)
        assert graph.recorded == recorded

    a, b = torch.randn(3, 2), torch.randn(3, 2)
    check(a, 1)
    check(b, 1)
    check({"a": a, "b": b}, 2)
    check({"b": a, "a": b}, 2)
    check({"a": a, "b": b[:1]}, 3)
    check({"a": a, "b": b[:1].double()}, 4)
    check(None, 5)


def test_what_a_recording_is_bound_to(graph: type[Again]) -> None:
    """Each change but the first two is recorded anew; a network's new values alone are not a change."""
    model = network()
    by_graph, by_loop = samplers(Ancestral())

    def check(recorded: int, shape_or_x: Any = (3, 2), rng: Callable[[], Rng] = lambda: Rng(0)) -> None:
        expected = by_loop(model, shape_or_x, rng=rng())
        assert torch.equal(by_graph(model, shape_or_x, rng=rng()), expected)
        assert graph.recorded == recorded
        by_graph(model, shape_or_x, rng=rng())
        assert graph.recorded == recorded

    check(1)
    with torch.no_grad():
        model.network.layer.weight.mul_(1.5)  # type: ignore[union-attr]
    check(1)
    check(2, (4, 2))
    check(3, torch.randn(4, 2, dtype=torch.float64))
    check(4, torch.randn(2, 4).T)
    check(5, (3, 2))
    check(6, rng=lambda: Rng(seeds=[1, 2, 3]))
    check(7, rng=lambda: Rng(0).share(1, 2))
    check(8, rng=lambda: Rng(0).share(0, 2))
    check(8, rng=lambda: Rng(1))
    model.network.layer.weight = nn.Parameter(torch.randn(2, 3))  # type: ignore[union-attr]
    check(9)
    model.network.scale = torch.tensor([0.5, 2.0])  # type: ignore[union-attr]
    check(10)
    model.eval()
    check(11)
    for sampler in (by_graph, by_loop):
        sampler.steps = 7
    check(12)
    for sampler in (by_graph, by_loop):
        sampler.denoise = False
    check(13)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(14)


def test_every_denoiser_has_its_own_and_none_is_kept_alive(graph: type[Again]) -> None:
    by_graph, by_loop = samplers(Ancestral())
    models = [network(), network()]
    with torch.no_grad():
        models[1].network.scale.mul_(2)  # type: ignore[union-attr]
    for model in (*models, *models):
        assert torch.equal(by_graph(model, (3, 2), rng=Rng(0)), by_loop(model, (3, 2), rng=Rng(0)))
    assert graph.recorded == 2

    graph.forget = True
    lonely = network()
    with pytest.raises(AssertionError):  # of the graph that has nothing to replay
        by_graph(lonely, (3, 2))
    gone = [weakref.ref(lonely), weakref.ref(lonely.network)]
    del lonely
    gc.collect()
    assert [each() for each in gone] == [None, None]
    assert len(by_graph._graphs._kept) == 2


def test_copies_of_a_sampler_record_for_themselves(graph: type[Again]) -> None:
    model = network()
    by_graph, by_loop = samplers(Ancestral())
    expected = by_loop(model, (3, 2), rng=Rng(0))
    by_graph(model, (3, 2), rng=Rng(0))
    for count, twin in enumerate((copy.deepcopy(by_graph), pickle.loads(pickle.dumps(by_graph))), 2):
        assert torch.equal(twin(model, (3, 2), rng=Rng(0)), expected)
        assert graph.recorded == count


def test_inference_mode_and_after(graph: type[Again]) -> None:
    """A buffer that was made in inference mode could not be written to outside it."""
    model = network()
    by_graph, by_loop = samplers(Ancestral())
    expected = by_loop(model, (3, 2), rng=Rng(0))
    with torch.inference_mode():
        assert torch.equal(by_graph(model, (3, 2), rng=Rng(0)), expected)
    out = by_graph(model, (3, 2), rng=Rng(0))
    assert torch.equal(out, expected) and not out.requires_grad and not out.is_inference()
    assert graph.recorded == 1


def test_samples_that_are_not_finite_are_named(graph: type[Again]) -> None:
    model = network()
    sampler = Sampler(Ancestral(), steps=4, cuda_graph=True)
    start = torch.randn(3, 2)
    sampler(model, start)
    start[1, 0] = torch.nan
    with pytest.raises(SolverError) as caught:
        sampler(model, start)
    assert caught.value.samples == [1] and caught.value.evaluations == 5
    assert torch.isfinite(sampler(model, start[[0, 2, 0]])).all()


def test_a_trajectory_is_the_loop(graph: type[Again]) -> None:
    model = network()
    by_graph, by_loop = samplers(Ancestral())
    for one, other in zip(by_graph.iterate(model, (3, 2)), by_loop.iterate(model, (3, 2)), strict=True):
        assert torch.equal(one.x, other.x) and one.evaluations == other.evaluations
    assert graph.recorded == 0


@pytest.mark.parametrize(
    "step", [AdaptiveODE(1e-3, 1e-3), AdaptiveSDE(), TorchSDE(adaptive=True), Restart(AdaptiveODE(1e-3, 1e-3))]
)
def test_adaptive_steps_are_refused_at_construction(step: Step) -> None:
    with pytest.raises(ValueError, match=f"{type(step).__name__} decides .* take a step of fixed size"):
        Sampler(step, cuda_graph=True)


def test_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"on a CUDA device, and this batch is on cpu: .* cuda_graph=False"):
        Sampler(Ancestral(), steps=2, cuda_graph=True)(network(), (3, 2))


def test_a_condition_elsewhere_is_refused(graph: type[Again]) -> None:
    with pytest.raises(ValueError, match="needs the condition where the samples are, on cpu; got meta"):
        Sampler(Ancestral(), steps=2, cuda_graph=True)(network(), (3, 2), cond=torch.empty(3, 2, device="meta"))
    assert graph.recorded == 0


def test_the_kernels_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU there is no CUDA tensor to ask about: one is played by what is asked of it."""

    class Played:
        device, dtype = torch.device("cuda:0"), torch.float32

    monkeypatch.setitem(switch._decided, (Played.device, Played.dtype), False)
    monkeypatch.setitem(switch._reasons, (Played.device, Played.dtype), "no compiler was found")
    with pytest.raises(RuntimeError, match=r"draw the noise inside the graph; .*float32 on cuda:0: no compiler"):
        cuda_graph.CudaGraph(Played())  # type: ignore[arg-type]


def test_a_failed_capture_names_the_line() -> None:
    """Of ours, not of torch, and of the first error, not of the end of the capture that fails after it."""

    def read_back() -> None:
        torch.ones(2).reshape(3)  # stands for a value that is read back

    try:
        try:
            read_back()
        finally:
            raise RuntimeError("the capture has failed")
    except RuntimeError as error:
        text = cuda_graph.explained(error)
    line = read_back.__code__.co_firstlineno + 1
    assert f"test_cuda_graph.py:{line}, `torch.ones(2).reshape(3)  # stands for a value that is read back`" in text
    assert "shape '[3]' is invalid for input of size 2" in text and "cuda_graph=False" in text


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of torch.cuda, in order: there is none here."""
    asked: list[str] = []

    @contextlib.contextmanager
    def within(name: str) -> Iterator[None]:
        asked.append(f"{name} {{")
        try:
            yield
        finally:
            asked.append("}")

    class Stream:
        def __init__(self, name: str = "side"):
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            asked.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            asked.append("replay")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("current"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: within(str(device)))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: within(stream.name))
    monkeypatch.setattr(
        torch.cuda, "graph", lambda graph, stream, capture_error_mode: within(f"capture on {stream.name}")
    )
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: asked.append(f"waiting: {mode}"))
    monkeypatch.setattr(cuda_graph, "enabled", lambda device, dtype: True)
    return asked


class OnCuda:
    device, dtype = torch.device("cuda:1"), torch.float32


def test_a_graph_is_warmed_up_and_captured_on_one_stream_of_its_own(cuda: list[str]) -> None:
    graph = cuda_graph.CudaGraph(OnCuda())  # type: ignore[arg-type]
    outputs = [torch.zeros(1), torch.ones(1)]
    found = graph.record(lambda: cuda.append("run") or outputs[cuda.count("run") - 1])  # type: ignore[func-returns-value]
    graph.replay()
    assert found is outputs[1]
    assert cuda == [
        *("cuda:1 {", "side waits for current", "side {", "waiting: error", "run", "waiting: 0", "}"),
        *("current waits for side", "capture on side {", "run", "}", "}", "replay"),
    ]


@pytest.mark.parametrize(
    ("fails_at", "error", "expected"),
    [
        (1, "called a synchronizing CUDA operation", r"test_cuda_graph.py:\d+, .*cuda_graph=False\.$"),
        (1, "mat1 and mat2 shapes cannot be multiplied", "^mat1 and mat2 shapes cannot be multiplied$"),
        (2, "operation not permitted when stream is capturing", "reads a value back.*Start a new process"),
    ],
)
def test_what_fails_while_a_graph_is_made(fails_at: int, error: str, expected: str, cuda: list[str]) -> None:
    """What would spoil the capture is found before it; errors of the network remain what they are."""

    def run() -> Tensor:
        cuda.append("run")
        if cuda.count("run") == fails_at:
            raise RuntimeError(error)
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match=expected):
        cuda_graph.CudaGraph(OnCuda()).record(run)  # type: ignore[arg-type]
    assert cuda.count("waiting: error") == cuda.count("waiting: 0") == 1
    assert sum(line.startswith("capture") for line in cuda) == fails_at - 1


# What a capture cannot contain, on a device without values.

GPU = torch.device("meta")


class NotCapturable(RuntimeError):
    pass


class Capture(TorchDispatchMode):
    """Refuses what a CUDA graph cannot contain, of ops on tensors of `GPU`; those on the CPU run, once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there, here = ([t for t in tensors if (t.device == GPU) is on] for on in (True, False))
        target = kwargs.get("device")
        to_gpu = target is not None and torch.device(target) == GPU
        name = func.overloadpacket.__name__
        if not there and not to_gpu:
            with _disable_current_modes():
                return func(*args, **kwargs)
        if any(not isinstance(tensor, FakeTensor) for tensor in there):
            raise NotCapturable(f"{name}: a tensor of Python numbers was copied to the device")
        if name == "_to_copy" and (bool(here) if to_gpu else target is not None):
            raise NotCapturable(f"{name}: from one device to the other")
        # elementwise kernels take a number of the CPU as an argument, but `where` copies it
        number = (torch.Tag.pointwise in func.tags or name == "fill_") and name != "where"
        number |= func.namespace == "scoresde"  # coefficients go along with the launch
        if there and any(tensor.ndim or not number for tensor in here):
            raise NotCapturable(f"{name}: tensors of both devices")
        return func(*args, **kwargs)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Under it new tensors on `GPU` have a shape and no value, and the kernels take them."""
    for dtype in (torch.float32, torch.float64):
        monkeypatch.setitem(switch._decided, (GPU, dtype), True)
    # there is no autocast for this device
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad():
        yield mode


def capture(mode: FakeTensorMode, step: Step, model: Callable[[], nn.Module], grid: Any = None, steps: int = 3) -> None:
    """The function that `Sampler(step, cuda_graph=True)` records, under the rules of a capture."""
    sampler = Sampler(step, grid, steps, cuda_graph=True)
    with mode:
        denoiser: Any = model()
        x, rng = torch.empty(4, 2, device=GPU), Rng(0).captured(GPU)
    times = sampler.times(denoiser)
    with mode, Capture():
        for state in sampler._states(denoiser, x, times, None, rng):
            assert state.shape == (4, 2) and state.device == GPU


def on_the_device(sde: Any) -> nn.Module:
    with torch.device(GPU):
        return Preconditioned(Network(), sde, EDM())


def exact_on_the_device(sde: Any) -> nn.Module:
    with _disable_current_modes():
        exact = mixture(sde, (2,))
    for name, buffer in list(exact.named_buffers()):
        setattr(exact, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU))
    return exact


EVERY = STOCHASTIC | DETERMINISTIC


@pytest.mark.parametrize("step", EVERY.values(), ids=EVERY.keys())
def test_every_step_can_be_captured(step: Step, on_gpu: FakeTensorMode) -> None:
    multistep = 2 + int(step.order) if step.evaluations == 1 else 2  # until all past values are there
    capture(on_gpu, step, lambda: on_the_device(VPSDE()), KarrasGrid(), multistep)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
@pytest.mark.parametrize("name", ["pc", "churn", "adams-0"])
def test_under_every_sde(name: str, sde: Any, on_gpu: FakeTensorMode) -> None:
    """By steps that between them ask it for all it knows: also tables, which have values of their own to look up."""
    capture(on_gpu, EVERY[name], lambda: on_the_device(sde), KarrasGrid())


@pytest.mark.parametrize("sde", [SDES["vp"], SDES["ddpm"]], ids=["vp", "ddpm"])
def test_with_an_exact_score_too(sde: Any, on_gpu: FakeTensorMode) -> None:
    capture(on_gpu, PredictorCorrector(Ancestral(), Langevin()), lambda: exact_on_the_device(sde))


@pytest.mark.parametrize(
    "network",
    [lambda: MLP((2,)), lambda: UNet((2, 8, 8), attention=(4,)), lambda: UNet((2, 8, 8), embedding="sinusoidal")],
    ids=["mlp", "u-net", "ddpm++"],
)
def test_our_networks_can_be_captured(network: Callable[[], nn.Module], on_gpu: FakeTensorMode) -> None:
    with on_gpu, torch.device(GPU):
        inner: Any = network()
        model, x = Preconditioned(inner, VPSDE(), EDM()).eval(), torch.empty(2, *inner.event_shape)
    t = torch.tensor(0.5, dtype=torch.float64)
    with on_gpu, Capture():
        assert model(x, t).x0.shape == x.shape


def test_torchsde_cannot_be_captured(on_gpu: FakeTensorMode) -> None:
    """Its Brownian motion is drawn on the CPU."""
    with pytest.raises(RuntimeError, match="'integers' are made on the CPU, which a CUDA graph cannot do"):
        capture(on_gpu, TorchSDE(), lambda: on_the_device(VPSDE()))


TABLE = torch.ones(2)
FORBIDDEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "item": lambda x, t: x.sum().item(),
    "float": lambda x, t: float(x.sum()),
    "if": lambda x, t: 1 if x.any() else 0,
    "tolist": lambda x, t: x.tolist(),
    "mask": lambda x, t: x[x > 0].sum(),
    "nonzero": lambda x, t: (x > 0).nonzero(),
    "equal": lambda x, t: torch.equal(x, x),
    "unique": lambda x, t: x.unique(),
    "to the CPU": lambda x, t: x.cpu(),
    "a number to the device": lambda x, t: t.to(x.device),
    "a table to the device": lambda x, t: TABLE.to(x),
    "a table that stayed": lambda x, t: TABLE * x,
    "new tensor": lambda x, t: torch.tensor(2.0, device=x.device) * x,
    "new tensors": lambda x, t: x * x.new_tensor([1.0, 2.0]),
    "list of places": lambda x, t: x[[0, 1]],
    "places on the CPU": lambda x, t: x[torch.tensor([0, 1])],
    "copy": lambda x, t: x.copy_(TABLE.expand(4, 2)),
    "where": lambda x, t: torch.where(t > 0, x, x),
    "stack": lambda x, t: torch.stack([x.sum().double(), t]),
}
ALLOWED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "number": lambda x, t: t * x,
    "addcmul": lambda x, t: torch.addcmul(x, x, t.float()),
    "fill": lambda x, t: torch.empty_like(t, device=x.device).fill_(t),
    "full": lambda x, t: torch.full((), float(t), device=x.device),
    "entry": lambda x, t: x[0, 1],
    "zeros": lambda x, t: torch.zeros_like(x),
    "arange": lambda x, t: torch.arange(4, device=x.device),
    "if on the CPU": lambda x, t: x if t > 0 else 2 * x,
    "table on the CPU": lambda x, t: TABLE[(t > 0).long()] * x,
    "cast": lambda x, t: x.double(),
}


@pytest.mark.parametrize("act", [*FORBIDDEN.values(), *ALLOWED.values()], ids=[*FORBIDDEN, *ALLOWED])
def test_the_rules_find_what_they_are_for(act: Callable[[Tensor, Tensor], Any], on_gpu: FakeTensorMode) -> None:
    x, t = None, torch.tensor(0.5, dtype=torch.float64)
    with on_gpu:
        x = torch.empty(4, 2, device=GPU)
    refused = pytest.raises(RuntimeError) if act in FORBIDDEN.values() else contextlib.nullcontext()
    with refused, on_gpu, Capture():
        act(x, t)
