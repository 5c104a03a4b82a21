"""The kernels on a GPU, against formulas in float64 with the noise of `philox`; marker `gpu`.

    python -m pytest -m gpu

What can be asked of any device is asked of the CPU as well, where the reference answers: so formulas, tolerances and
shapes are right before there is a GPU. On the GPU the mode is "require", and the data are new in every run; their seed
is printed with a failure.

Tolerances: a sum is formed in float32 (float64 of float64), n terms off by at most n + 2 roundings of Σ |c_i x_i|, and
rounded once to its dtype. Noise differs between two processors by at most 2^-22 times its radius √(−2 ln u), which
allows the logarithm and the cosine 2 units in the last place each; no radius exceeds 6.67.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scoresde import (
    DDIM,
    EDM,
    VPSDE,
    Adams,
    Ancestral,
    Churn,
    Heun,
    Langevin,
    Preconditioned,
    PredictorCorrector,
    ReverseDiffusion,
    Rng,
    Sampler,
    ops,
)
from scoresde.kernels.driver import Driver
from scoresde.noise import draws, philox, switch
from scoresde.ops import Noise, library
from scoresde.sampling import Step

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CUDA = torch.device("cuda")
OPS = torch.ops.scoresde
LARGEST_RADIUS = 6.67

each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:]
)
# Two samples of many, many samples of few, a multiple of nothing, all layouts that kernels read in place or not.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "every second": lambda x: torch.stack([x, -x], -1)[..., 0],
    "shifted": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:, :1].expand(x.shape),
}
SHAPES = [(1, 1), (5, 2), (3, 5), (2, 4, 128), (3, 5, 7, 11), (2, 3, 4, 5, 6)]
LARGE = [(2, 2**24 + 5), (2**18 + 3, 7), (2**21, 1), (3, 64, 257, 129)]


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    for mark in GPU:
        test = mark(test)
    return test


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with switch.using("require" if request.param == "cuda" else "off"):
        device = torch.device(request.param)
        assert ops.enabled(device, torch.float32) == (request.param == "cuda")  # which loads the kernels
        yield device


@pytest.fixture
def required() -> Iterator[None]:
    with switch.using("require"):
        assert ops.enabled(CUDA, torch.float32)  # which loads the kernels
        yield


class Data:
    """Tensors, coefficients and noise of a batch, and what they are in float64 on the CPU."""

    def __init__(self, device: torch.device, shape: Sequence[int], dtype: torch.dtype):
        seed = int.from_bytes(os.urandom(4), "little") if device.type == "cuda" else 0
        print(f"data of seed {seed}")
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.shape, self.dtype = device, tuple(shape), dtype

    def tensor(self) -> Tensor:
        return torch.randn(self.shape, generator=self.generator).to(self.device, self.dtype)

    def factor(self, per_sample: bool = True) -> Tensor:
        size = self.shape[:1] if per_sample else ()
        return torch.rand(size, generator=self.generator, dtype=torch.float64).add(0.3).to(self.device)

    def noise(self, per_sample: bool = False) -> tuple[Noise, Tensor]:
        """Where, and the numbers (float64, CPU): seeds and draws beyond 2^32, of rows behind others."""
        size = self.shape[0] if per_sample else 1
        seeds, draws = (torch.randint(2**62, (size,), generator=self.generator) for _ in range(2))
        where = Noise(seeds.to(self.device), draws.to(self.device), 2**33 + 5, 0 if per_sample else 2**20)
        made = philox.streams(seeds, where.row, draws + where.draw, self.shape[0])
        return where, philox.normals(made, max(torch.Size(self.shape[1:]).numel(), 1)).view(self.shape).double()


def wide(value: Tensor | float, like: Tensor) -> Tensor:
    """In float64 on the CPU, so that it broadcasts against samples."""
    value = torch.as_tensor(value).cpu().double()
    return value.view(-1, *[1] * (like.ndim - 1)) if value.ndim == 1 else value


def check(found: Tensor, terms: Sequence[Tensor], noisy: Tensor | float = 0.0) -> None:
    """`found` is the sum of `terms`, of which noise has the coefficient `noisy`, to the tolerance of this file."""
    exact, size = sum(terms), sum(term.abs() for term in terms)
    unit = 2.0**-53 if found.dtype == torch.float64 else 2.0**-24
    rounding = torch.finfo(found.dtype).eps / 2
    tolerance = (
        rounding * exact.abs()
        + (len(terms) + 2) * unit * size
        + torch.as_tensor(noisy).abs() * 2.0**-22 * (LARGEST_RADIUS)
    )
    if found.dtype == torch.float16:
        tolerance = tolerance + 2.0**-25  # half of the smallest number it has
    excess = ((found.cpu().double() - exact).abs() - tolerance).max()
    assert excess <= 0, f"off by {float(excess):.2e} more than rounding explains"


# Numbers: bit for bit where they are integers.


@pytest.mark.parametrize("per_sample", [False, True], ids=["one stream", "per sample"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_signs_are_the_bits_of_philox(device: torch.device, shape: tuple[int, ...], per_sample: bool) -> None:
    """Random bits as they are, so equal on every processor."""
    where, _ = Data(device, shape, torch.float32).noise(per_sample)
    made = philox.streams(where.seeds.cpu(), where.row, where.draws.cpu() + where.draw, shape[0])
    expected = philox.signs(made, torch.Size(shape[1:]).numel()).view(shape)
    assert torch.equal(draws.rademacher(shape, torch.float32, where).cpu(), expected)
    assert torch.equal(draws.rademacher(shape, torch.bfloat16, where).cpu().float(), expected)


@each_dtype
@pytest.mark.parametrize("shape", [*SHAPES, (3, 100_003)], ids=str)
def test_normals_are_those_of_philox(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """To 2^-22 of the radius of their pair, and one rounding of half types."""
    data = Data(device, shape, dtype)
    for per_sample in (False, True):
        where, z = data.noise(per_sample)
        n = z[0].numel()
        # by quads of the draw, which are rows of four: (r₀ cos, r₁ cos, r₀ sin, r₁ sin)
        made = philox.streams(where.seeds.cpu(), where.row, where.draws.cpu() + where.draw, shape[0])
        begin, count = made.row * n, made.rows * n
        quads = philox.normals(made._replace(row=begin // 4, rows=-(-(begin % 4 + count) // 4)), 4).double()
        radii = quads.view(len(made.seeds), -1, 2, 2).norm(dim=2, keepdim=True).expand(-1, -1, 2, 2).flatten(1)
        radius = radii[:, begin % 4 :][:, :count].reshape(shape)
        found = draws.normal(shape, dtype, where).cpu().double()
        rounding = 0.0 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps / 2
        assert ((found - z).abs() <= 2.0**-22 * radius + rounding * z.abs() + 2.0**-25).all()


# The ops: every dtype, layout, number of terms.


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("terms", [1, 2, 5, 7])
def test_lincomb(device: torch.device, terms: int, layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    data = Data(device, (3, 6, 5, 4), dtype)
    xs = [layout(data.tensor()) for _ in range(terms)]
    factors = [data.factor(k % 2 == 0) for k in range(terms)]
    exact = [wide(c, x) * x.cpu().double() for c, x in zip(factors, xs, strict=True)]
    pairs = list(zip(factors, xs, strict=True))
    check(ops.lincomb(pairs), exact)
    for per_sample in (False, True):
        where, z = data.noise(per_sample)
        std = data.factor(not per_sample)
        found = ops.lincomb(pairs, (std, where))
        assert found.dtype == dtype and found.shape == data.shape
        check(found, [*exact, wide(std, z) * z], wide(std, z))


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("measured", [False, True], ids=["D", "measured"])
def test_langevin(device: torch.device, measured: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The step size of a sample is off by the n + 10 roundings of its sums of squares at most."""
    data = Data(device, shape, dtype)
    x, eps, sigma, snr = data.tensor(), data.tensor(), data.factor(), 0.16
    where, z = data.noise()
    wide_eps, n = eps.cpu().double(), x[0].numel()
    size = z.flatten(1).square().sum(1) if measured else torch.tensor(float(n), dtype=torch.float64)
    norm = wide_eps.flatten(1).square().sum(1)
    ratio = (2 * snr**2 * (size + 64) / (norm + 64)).clamp(max=1.0)
    drift, kick = -wide(ratio * sigma.cpu(), x) * wide_eps, wide((2 * ratio).sqrt() * sigma.cpu(), x)
    found = ops.langevin(x, eps, sigma, snr, where, measured=measured)
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    relative = (n + 10) * unit + (n * 2.0**-21 * LARGEST_RADIUS**2 / (size + 64).min() if measured else 0)
    rounding = torch.finfo(dtype).eps / 2
    exact, sizes = x.cpu().double() + drift + kick * z, x.cpu().double().abs() + drift.abs() + (kick * z).abs()
    allowed = rounding * exact.abs() + (5 * unit + relative) * sizes + kick * 2.0**-22 * LARGEST_RADIUS + 2.0**-25
    assert ((found.cpu().double() - exact).abs() <= allowed).all()


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dsm_loss_and_its_gradient(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    data = Data(device, shape, dtype)
    prediction, weight = data.tensor().requires_grad_(), data.factor()
    where, z = data.noise()
    n = prediction[0].numel()
    loss = ops.dsm_loss(prediction, where, weight)
    (gradient,) = torch.autograd.grad(loss, prediction, torch.ones_like(loss))
    exact = prediction.detach().cpu().double()
    difference, size = exact - z, exact.abs() + z.abs()
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    # of the difference; the square doubles it, and a mean adds its roundings
    error = 5 * unit * size + 2.0**-22 * LARGEST_RADIUS
    if dtype in (torch.float16, torch.bfloat16) and device.type == "cpu":
        error = error + torch.finfo(dtype).eps * size  # the reference subtracts a target of this dtype
    scale = wide(weight, prediction)
    exact = (scale * difference.square()).flatten(1).mean(1)
    allowed = (scale * (2 * difference.abs() + error) * error).flatten(1).mean(1) + (n + 4) * unit * exact
    assert ((loss.detach().cpu().double() - exact).abs() <= allowed).all()
    rounding = torch.finfo(dtype).eps / 2 + 8 * unit
    slope = 2 * scale / n
    bound = slope * error + rounding * (slope * difference).abs() + 2.0**-25
    assert ((gradient.cpu().double() - slope * difference).abs() <= bound).all()


def test_gradients(device: torch.device) -> None:
    """The gradients of every op, with noise drawn again in the backward pass, are those of differences."""
    data = Data(device, (2, 3), torch.float64)
    x, y = data.tensor().requires_grad_(), data.tensor().requires_grad_()
    a, b = data.factor().requires_grad_(), data.factor(False).requires_grad_()
    where, _ = data.noise()
    for function in (
        lambda x, y, a, b: library.lincomb([x, y], [a, b], b, where),
        lambda x, y, a, b: library.langevin(x, y, a, 0.16, True, where),
        lambda x, y, a, b: library.dsm_loss(x, a, None, where) + library.dsm_loss(x, b, y, None),
    ):
        assert torch.autograd.gradcheck(function, (x, y, a, b), nondet_tol=0.0)


@needs_gpu
def test_opcheck(required: None) -> None:
    """Schema, shapes without values, autograd and tracing, as torch's own tool asks them."""
    data = Data(CUDA, (3, 4), torch.float32)
    x, y, a = data.tensor().requires_grad_(), data.tensor(), data.factor()
    where, _ = data.noise()
    torch.library.opcheck(OPS.lincomb.default, ([x, y], [a, a], a, *where))
    torch.library.opcheck(OPS.lincomb.default, ([x, y], [a, a], None, None, None, 0, 0))
    torch.library.opcheck(OPS.langevin.default, (x, y, a, 0.16, False, *where))
    torch.library.opcheck(OPS.dsm_loss.default, (x, a, None, *where))
    torch.library.opcheck(OPS.dsm_loss.default, (x, a, y, None, None, 0, 0))
    torch.library.opcheck(OPS.normal.default, ((3, 4), torch.float32, *where))
    torch.library.opcheck(OPS.rademacher.default, ((3, 4), torch.float32, *where))


# What only a GPU can be asked.


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_batches(shape: tuple[int, ...], dtype: torch.dtype, required: None) -> None:
    """Several groups of four for each thread, and samples by the hundred thousand."""
    data = Data(CUDA, shape, dtype)
    x, a, (where, z) = data.tensor(), data.factor(), data.noise()
    check(ops.lincomb(((a, x),), (0.5, where)), [wide(a, x) * x.cpu().double(), 0.5 * z], 0.5)
    loss = ops.dsm_loss(x, where, a)
    exact = a.cpu() * (x.cpu().double() - z).square().flatten(1).mean(1)
    # pairwise sums in float32: far below n roundings, and far above what a wrong element would do to one sample
    torch.testing.assert_close(loss.cpu().double(), exact, rtol=1e-4, atol=1e-6)


@needs_gpu
def test_the_kernels_run_and_not_the_reference(required: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = Driver.launch

    def watched(driver: Driver, name: str, *args: Any) -> None:
        seen.append(name)
        real(driver, name, *args)

    monkeypatch.setattr(Driver, "launch", watched)
    data = Data(CUDA, (3, 5), torch.float32)
    x, a, (where, _) = data.tensor(), data.factor(), data.noise()
    for number, call in enumerate(
        (
            lambda: ops.lincomb(((a, x),), (a, where)),
            lambda: ops.langevin(x, x, a, 0.16, where),
            lambda: ops.dsm_loss(x, where, a),
            lambda: Rng(0).normal((3, 5), device=CUDA),
            lambda: Rng(0).rademacher_like(x),
        ),
        1,
    ):
        before = len(seen)
        call()
        assert len(seen) > before, f"call {number} launched nothing"


@needs_gpu
def test_require_refuses_what_has_no_kernel(required: None) -> None:
    assert ops.enabled(CUDA, torch.float32)
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="required"):
        ops.lincomb(((1.0, x),))


@needs_gpu
@pytest.mark.parametrize("rng", [lambda: Rng(3), lambda: Rng(seeds=[3, 2**62, 5])], ids=["one", "per sample"])
def test_a_stream_is_the_same_on_both_devices(rng: Callable[[], Rng], required: None) -> None:
    here, there = rng(), rng()
    with switch.using("off"):
        expected = [here.normal((3, 7)), here.normal((3, 7))]
        signs = here.rademacher_like(expected[0])
    for one in expected:
        torch.testing.assert_close(there.normal((3, 7), device=CUDA).cpu(), one, rtol=0, atol=2.0**-22 * LARGEST_RADIUS)
    assert torch.equal(there.rademacher_like(expected[0].to(CUDA)).cpu(), signs)
    assert torch.equal(here.state_dict()["streams"], there.state_dict()["streams"])


@needs_gpu
def test_ops_run_on_the_current_stream(required: None) -> None:
    """The stream has half a second of other work first: on any other stream an op would read an unwritten tensor."""
    data = Data(CUDA, (64, 1024), torch.float32)
    x, stream = data.tensor(), torch.cuda.Stream()
    where, z = data.noise()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(10**9)
        late.copy_(x)
        found = ops.lincomb(((2.0, late),), (1.0, where))
    stream.synchronize()
    check(found, [2 * x.cpu().double(), z], 1.0)


@needs_gpu
def test_a_graph_replays_with_fresh_noise(required: None) -> None:
    """The position lies in device memory and moves on in the graph: replay k is draw k of the stream."""
    x, rng = torch.zeros(4, 1000, device=CUDA), Rng(9)
    captured, graph = rng.captured(CUDA), torch.cuda.CUDAGraph()
    ops.lincomb(((1.0, x),), (1.0, rng.noise(x)))  # loads the kernel; the second draw is the first of the graph
    captured.load(rng)
    with torch.cuda.graph(graph):
        out = ops.lincomb(((1.0, x),), (1.0, captured.noise(x)))
        captured.advance()
    for _ in range(3):
        graph.replay()
        assert torch.equal(out, ops.lincomb(((1.0, x),), (1.0, rng.noise(x))))


@needs_gpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_passes_through(dynamic: bool, required: None) -> None:
    """In one graph, without a break, and to the rounding of what Inductor fuses around the ops."""

    def step(x: Tensor, a: Tensor, seeds: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        where = Noise(seeds, draws, 3, 0)
        eps = torch.tanh(x)
        moved = ops.lincomb(((a, x), (-0.5, eps)), (0.3, where))
        moved = ops.langevin(moved, eps, a, 0.16, where)
        return moved, ops.dsm_loss(moved, where, a)

    data = Data(CUDA, (6, 130), torch.float32)
    x, a, (where, _) = data.tensor(), data.factor(), data.noise()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for found, expected in zip(
        compiled(x, a, where.seeds, where.draws), step(x, a, where.seeds, where.draws), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.7, -0.4]))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        """No matrix product, whose algorithm may differ in a capture: so results can be compared bit for bit."""
        out = torch.tanh(self.scale[0] * x + self.scale[1] * c_noise.view(-1, *[1] * (x.ndim - 1)))
        return out if cond is None else out + cond


STEPS: dict[str, Step] = {
    "pc": PredictorCorrector(ReverseDiffusion(), Langevin()),
    "pc measured": PredictorCorrector(Ancestral(), Langevin(measured=True)),
    "ddim": DDIM(0.5),
    "heun": Heun(),
    "churn": Churn(),
    "adams": Adams(3, 3, eta=1.0),
}
RNGS: dict[str, Callable[[int], Rng]] = {
    "one": lambda seed: Rng(seed),
    "per sample": lambda seed: Rng(seeds=[seed, 1, 2**40]),
    "share": lambda seed: Rng(seed).share(1, 2),
}


@needs_gpu
@pytest.mark.parametrize("make", RNGS.values(), ids=RNGS.keys())
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_a_sampler_in_a_graph_equals_the_loop(step: Step, make: Callable[[int], Rng], required: None) -> None:
    model = Preconditioned(Small(), VPSDE(), EDM()).to(CUDA)
    by_graph, by_loop = Sampler(step, steps=12, cuda_graph=True), Sampler(step, steps=12)
    one, other = make(1), make(1)
    for _ in range(3):
        found = by_graph(model, (3, 5, 7), rng=one)
        assert torch.equal(found, by_loop(model, (3, 5, 7), rng=other))
        assert torch.equal(one.state_dict()["streams"], other.state_dict()["streams"])
        with torch.no_grad():
            model.network.scale.mul_(1.1)  # type: ignore[union-attr]


@needs_gpu
def test_a_sampler_in_a_graph_with_a_condition_and_matrix_products(required: None) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(17, 64), nn.SiLU(), nn.Linear(64, 16))

    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
            out = self.layers(torch.cat([x, c_noise[:, None]], 1))
            return out if cond is None else out + cond

    model = Preconditioned(Conditional(), VPSDE(), EDM()).to(CUDA)
    step = PredictorCorrector(ReverseDiffusion(), Langevin())
    by_graph, by_loop = Sampler(step, steps=20, cuda_graph=True), Sampler(step, steps=20)
    for seed in range(2):
        cond = torch.randn(8, 16, device=CUDA)
        found = by_graph(model, (8, 16), cond=cond, rng=Rng(seed))
        expected = by_loop(model, (8, 16), cond=cond, rng=Rng(seed))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # products may be added up in another order


@needs_gpu
def test_a_network_that_reads_back_is_named_and_harms_nothing(required: None) -> None:
    class Reads(Small):
        def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
            return super().forward(x, c_noise, cond) * (2.0 if float(x.abs().max()) > 1 else 1.0)

    model = Preconditioned(Reads(), VPSDE(), EDM()).to(CUDA)
    with pytest.raises(RuntimeError, match=r"test_kernels_gpu.py:\d+, `return super.*reads a value back"):
        Sampler(Ancestral(), steps=3, cuda_graph=True)(model, (3, 5))
    good = Preconditioned(Small(), VPSDE(), EDM()).to(CUDA)
    found = Sampler(Ancestral(), steps=3, cuda_graph=True)(good, (3, 5), rng=Rng(0))
    assert torch.equal(found, Sampler(Ancestral(), steps=3)(good, (3, 5), rng=Rng(0)))


@needs_gpu
def test_without_kernels_a_graph_is_refused() -> None:
    model = Preconditioned(Small(), VPSDE(), EDM()).to(CUDA)
    with switch.using("off"), pytest.raises(RuntimeError, match="draw the noise inside the graph"):
        Sampler(Ancestral(), steps=3, cuda_graph=True)(model, (3, 5))
