"""The ops of torch.ops.scoresde and their front: against formulas in float64 and autograd, and as torch wants its ops.

On a CPU, so the reference runs; the kernels are held to the same formulas in test_kernel_source.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from scoresde import Rng, ops
from scoresde.noise import draws
from scoresde.ops import Noise, library

OPS = torch.ops.scoresde
B, EVENT, D = 4, (3, 5), 15
# Unit roundoffs: of one rounding to the type, and of the arithmetic, float32 or wider.
ROUNDING = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ARITHMETIC = {dtype: 2.0**-53 if dtype == torch.float64 else 2.0**-24 for dtype in ROUNDING}

each_dtype = pytest.mark.parametrize("dtype", ROUNDING, ids=lambda dtype: str(dtype)[6:])
each_coefficient = pytest.mark.parametrize("per_sample", [False, True], ids=["scalar", "per sample"])
each_noise = pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
each_size = pytest.mark.parametrize("measured", [False, True], ids=["D", "measured"])


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def factor(seed: int, per_sample: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    """Positive, of order 1."""
    return random(seed, *[B] * per_sample, dtype=dtype).abs() + 0.3


def found(per_sample: bool = False) -> Noise:
    """Draw 2^33 + 5 of a row behind others of one stream, or of four."""
    if per_sample:
        return Noise(torch.tensor([3, 2**40, 7, 5]), torch.tensor([2**33, 0, 1, 2]), 5, 0)
    return Noise(torch.tensor([2**40 + 3]), torch.tensor([2**33]), 5, 2)


def numbers(noise: Noise, dtype: torch.dtype = torch.float64, event: tuple[int, ...] = EVENT) -> Tensor:
    return draws.normal((B, *event), dtype, noise)


def calls(dtype: torch.dtype, per_sample: bool, drawn: bool, event: tuple[int, ...] = EVENT) -> dict[str, Any]:
    """(op, arguments) of every op that has gradients."""
    x = [random(k, B, *event, dtype=dtype) for k in range(4)]
    c = [factor(k, per_sample) for k in range(10, 16)]
    at = found(per_sample)
    none = (None, None, 0, 0)
    eps, flat = (None, tuple(at)) if drawn else (x[3], none)
    by_eps = () if drawn else (c[5],)
    return {
        "lincomb": (OPS.lincomb, (x[: 3 + len(by_eps)], [*c[:3], *by_eps], c[4] if drawn else None, *flat)),
        "langevin": (OPS.langevin, (x[0], x[1], c[0], 0.4, drawn, *at)),
        "dsm_loss": (OPS.dsm_loss, (x[0], c[0], eps, *flat)),
    }


NAMES = ("lincomb", "langevin", "dsm_loss")
each_op = pytest.mark.parametrize("name", NAMES)


def with_gradients(value: Any) -> Any:
    """A copy of the arguments, in which every real tensor requires a gradient."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(with_gradients, value))
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.clone().requires_grad_()
    return value


# ---- as torch wants its ops ----


WITHOUT_COMPILER = ("test_schema", "test_autograd_registration", "test_faketensor")


@each_dtype
@each_noise
@each_op
def test_opcheck(name: str, drawn: bool, dtype: torch.dtype) -> None:
    """Schema, fake tensors and gradients; in float32 gradients under torch.compile too, with shapes that vary."""
    op, args = calls(dtype, per_sample=drawn, drawn=drawn)[name]
    tests = "ALL" if dtype == torch.float32 else WITHOUT_COMPILER
    torch.library.opcheck(op, with_gradients(args), test_utils=tests)


@pytest.mark.parametrize("event", [(), (4,), (5,), (2, 3, 3)], ids=str)
@each_dtype
def test_opcheck_of_numbers(dtype: torch.dtype, event: tuple[int, ...]) -> None:
    for op in (OPS.normal, OPS.rademacher):
        torch.library.opcheck(op, ((B, *event), dtype, *found()), test_utils=WITHOUT_COMPILER)
    torch.library.opcheck(OPS.bits, ((B, *event), *found(per_sample=True)), test_utils=WITHOUT_COMPILER)


@each_op
@each_coefficient
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "strided", "expanded"])
def test_fake_tensors_have_the_shape_and_strides_of_real_ones(name: str, per_sample: bool, layout: str) -> None:
    change = {
        "contiguous": lambda x: x,
        "channels last": lambda x: x.to(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "strided": lambda x: x.repeat_interleave(2, 3)[..., ::2],
        "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    }[layout]
    real: list[Any] = []
    for fake in (False, True):
        op, args = calls(torch.float32, per_sample, drawn=True, event=(3, 4, 5))[name]
        args = torch.utils._pytree.tree_map_only(Tensor, lambda x: change(x) if x.ndim == 4 else x, args)
        if not fake:
            out = op(*args)
            real = [out] if isinstance(out, Tensor) else list(out)
            continue
        with FakeTensorMode() as mode:
            out = op(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, args))
        for expected, got in zip(real, [out] if isinstance(out, Tensor) else out, strict=True):
            assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())


# ---- values ----


@each_dtype
def test_noise_of_the_ops_is_that_of_an_rng(dtype: torch.dtype) -> None:
    for make in (lambda: Rng(5), lambda: Rng(5).share(1, 3), lambda: Rng(seeds=[1, 2, 3, 4])):
        rng, twin = make(), make()
        at = twin.captured("cpu")._position.find((B, *EVENT), torch.device("cpu"))
        assert torch.equal(draws.normal((B, *EVENT), dtype, at), rng.normal((B, *EVENT), dtype=dtype))
        later = at._replace(draw=1)
        assert torch.equal(
            draws.rademacher((B, 70), dtype, later), rng.rademacher_like(torch.zeros(B, 70, dtype=dtype))
        )
        assert torch.equal((draws.bits((B, 3), at._replace(draw=2)) >> 1 & (2**63 - 1)) % 9, rng.integers(9, (B, 3)))
    huge = Noise(torch.tensor([1]), torch.tensor([2**62]), 2**61, 0)
    same = Noise(torch.tensor([1]), torch.tensor([2**62 + 2**61 - 7]), 7, 0)
    assert torch.equal(draws.normal((2, 3), dtype, huge), draws.normal((2, 3), dtype, same))


COEFFICIENTS = {
    "numbers": lambda k: float(factor(k, False)),
    "tensors": lambda k: factor(k, False),
    "per sample": lambda k: factor(k, True),
    "float32": lambda k: factor(k, True, torch.float32),
}


def column(value: Tensor | float, like: Tensor) -> Tensor:
    """`value` in float64, as wide as `like`."""
    value = torch.as_tensor(value, dtype=torch.float64)
    return value.reshape(-1, *[1] * (like.ndim - 1)) if value.ndim else value


def check_sum(got: Tensor, terms: list[Tensor], dtype: torch.dtype, roundings: int) -> None:
    """`got` is Σ terms but for one rounding to its type and so many roundings of every term before."""
    exact, size = sum(terms), sum(term.abs() for term in terms)
    # the formula itself is rounded as often, in float64; 2^-25: half the spacing of the subnormal float16
    bound = ROUNDING[dtype] * exact.abs() + roundings * (ARITHMETIC[dtype] + 2.0**-53) * size
    assert got.dtype == dtype
    assert ((got.double() - exact).abs() <= bound + (2.0**-25 if dtype == torch.float16 else 0)).all()


@each_dtype
@pytest.mark.parametrize("kind", COEFFICIENTS)
@pytest.mark.parametrize("n", range(1, 7))
def test_lincomb_is_the_sum(n: int, kind: str, dtype: torch.dtype) -> None:
    xs, at, make = [random(k, B, *EVENT, dtype=dtype) for k in range(n)], found(True), COEFFICIENTS[kind]
    for noise, first in itertools.product(("none", "given", "drawn"), (make(10), 1, 1.0, 0.0)):
        cs, std = [first, *map(make, range(11, 10 + n))], make(20)
        z = random(30, B, *EVENT) if noise == "given" else numbers(at)
        pairs = [(c, x.double()) for c, x in zip(cs, xs, strict=True)] + ([] if noise == "none" else [(std, z)])
        kept = [x.clone() for x in xs]
        got = ops.lincomb(list(zip(cs, xs, strict=True)), {"none": None, "given": (std, z), "drawn": (std, at)}[noise])
        # a coefficient and a given z to float32, their product, and n sums
        check_sum(got, [column(c, x) * x for c, x in pairs], dtype, n + 3)
        assert all(
            torch.equal(x, before) and got.data_ptr() != x.data_ptr() for x, before in zip(xs, kept, strict=True)
        )


@each_dtype
@each_coefficient
def test_lincomb_takes_the_widest_type_of_its_terms(dtype: torch.dtype, per_sample: bool) -> None:
    x, y, c = random(0, B, *EVENT, dtype=dtype), random(1, B, *EVENT, dtype=torch.float32), factor(2, per_sample)
    for terms in (((c, x), (2.0, y)), ((2.0, y), (c, x)), ((1.0, x), (c, y))):
        got = ops.lincomb(terms, (c, found()))
        z = numbers(found())
        check_sum(
            got,
            [*(column(a, b) * b.double() for a, b in terms), column(c, z) * z],
            torch.promote_types(dtype, torch.float32),
            5,
        )


@each_dtype
@each_coefficient
@each_size
@each_noise
def test_langevin_is_the_rule(drawn: bool, measured: bool, per_sample: bool, dtype: torch.dtype) -> None:
    x, at, sigma, snr = random(0, B, *EVENT, dtype=dtype), found(per_sample), factor(2, per_sample), 0.8
    eps = (random(1, B, *EVENT) * torch.tensor([0.1, 1.0, 3.0, 10.0])[:, None, None]).to(dtype)
    z = numbers(at, torch.promote_types(dtype, torch.float32))
    got = ops.langevin(x, eps, sigma, snr, at if drawn else z, measured=measured)
    wide, z = eps.double(), z.double()
    size = z.flatten(1).square().sum(1) if measured else D
    free = 2 * snr**2 * (size + 64) / (wide.flatten(1).square().sum(1) + 64)
    assert bool((free < 1).any()) and bool((free > 1).any())  # samples on both sides of the cap
    h, s = column(sigma**2 * free.clamp(max=1), x), column(sigma, x)
    # ratios of two sums of D squares and 64: 2 (D + 2) roundings, and a dozen besides
    check_sum(got, [x.double(), -h / s * wide, (2 * h).sqrt() * z], dtype, 2 * D + 16)
    if drawn:
        assert torch.equal(got, library.langevin(x, eps, sigma, snr, measured, at))


@each_dtype
@each_coefficient
@each_noise
def test_the_loss_is_the_weighted_mean_square(drawn: bool, per_sample: bool, dtype: torch.dtype) -> None:
    prediction, w, at = random(1, B, *EVENT, dtype=dtype), factor(6, per_sample), found(per_sample)
    eps = numbers(at, torch.promote_types(dtype, torch.float32)) if drawn else random(8, B, *EVENT, dtype=dtype)
    noise, z = at if drawn else eps, eps.double()
    given, place = (None, at) if drawn else (eps, None)
    wide, u = torch.promote_types(dtype, torch.float32), ARITHMETIC[dtype] + 2.0**-53
    error, size = prediction.double() - z, prediction.double().abs() + z.abs()
    # an error is off by 5 roundings of its parts, a mean of D squares by D + 3 of its own
    bound = (2 * error.abs() * 5 * u * size + (5 * u * size) ** 2 + (D + 3) * u * error**2).flatten(1).mean(1)
    got = ops.dsm_loss(prediction, noise, w)
    assert got.dtype == wide and got.shape == (B,)
    assert ((got.double() - w * error.square().flatten(1).mean(1)).abs() <= w * bound).all()
    assert torch.equal(got, library.dsm_loss(prediction, w, given, place))


def test_numbers_are_the_same_as_tensors() -> None:
    """A step may give its coefficients as either: the sums differ by the rounding of a product at most."""
    xs = [random(k, B, *EVENT, dtype=torch.float32) for k in range(3)]
    one = ops.lincomb(((0.3, xs[0]), (0.7, xs[1])), (0.2, xs[2]))
    other = ops.lincomb([(torch.tensor(c), x) for c, x in ((0.3, xs[0]), (0.7, xs[1]))], (torch.tensor(0.2), xs[2]))
    assert ((one - other).abs() <= 3 * 2.0**-24 * sum(x.abs() for x in xs)).all()
    terms = [(factor(k, True), x) for k, x in enumerate(xs)]
    assert torch.equal(
        ops.lincomb(terms, (factor(9, True), found())),
        library.lincomb(xs, [c for c, _ in terms], factor(9, True), found()),
    )


def test_batches_of_nothing_and_events_of_one_number() -> None:
    none, one, at = torch.zeros(0, 3), torch.ones(()), found()
    assert ops.lincomb(((1.0, none),), (2.0, at)).shape == (0, 3)
    for measured in (False, True):
        assert ops.langevin(none, none, one, 0.1, at, measured=measured).shape == (0, 3)
    assert ops.dsm_loss(none, at, one).shape == (0,)
    for name, drawn in itertools.product(NAMES, (False, True)):
        op, args = calls(torch.float64, per_sample=False, drawn=drawn)[name]
        args = torch.utils._pytree.tree_map_only(Tensor, lambda x: x[:0] if x.ndim == 3 else x, args)
        args = with_gradients(args)
        out = op(*args)
        sum(x.sum() for x in (out if isinstance(out, tuple) else [out])).backward()
        leaves = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor) and x.requires_grad]
        assert all(x.grad.shape == x.shape and not x.grad.any() for x in leaves)
    x, c = random(0, B).requires_grad_(), factor(1, True).requires_grad_()
    assert gradcheck(lambda x, c: library.lincomb([x, x], [c, c], c, at), (x, c))


# ---- gradients ----


def check_gradients(name: str, args: tuple[Any, ...]) -> None:
    """First and second derivatives by everything real, against differences in float64."""
    leaves, spec = torch.utils._pytree.tree_flatten(with_gradients(args))

    def f(*reals: Tensor) -> Any:
        left = iter(reals)
        filled = [next(left) if isinstance(x, Tensor) and x.requires_grad else x for x in leaves]
        return getattr(OPS, name)(*torch.utils._pytree.tree_unflatten(filled, spec))

    reals = tuple(x for x in leaves if isinstance(x, Tensor) and x.requires_grad)
    assert gradcheck(f, reals, fast_mode=False)
    assert gradgradcheck(f, reals, fast_mode=True)


@each_op
@each_coefficient
@each_noise
def test_gradients(name: str, per_sample: bool, drawn: bool) -> None:
    check_gradients(name, calls(torch.float64, per_sample, drawn, event=(3,))[name][1])


@each_coefficient
@each_size
@pytest.mark.parametrize("snr", [0.2, 0.8, 4.0], ids=["free", "both", "capped"])
def test_gradients_of_langevin(per_sample: bool, measured: bool, snr: float) -> None:
    """h depends on ‖ε̂‖² where it is not capped."""
    eps = random(1, B, 3) * torch.tensor([0.5, 1.0, 4.0, 10.0])[:, None]
    args = (random(0, B, 3), eps, factor(2, per_sample), snr, measured, *found(per_sample))
    check_gradients("langevin", args)
    if snr == 0.8:
        size = numbers(found(per_sample), event=(3,)).square().sum(1) if measured else 3
        free = 2 * snr**2 * (size + 64) / (eps.square().sum(1) + 64)
        assert bool((free < 0.99).any()) and bool((free > 1.01).any()) and not ((free - 1).abs() < 0.01).any()


@each_op
@each_dtype
def test_gradients_are_those_of_plain_torch(name: str, dtype: torch.dtype) -> None:
    """Hand-written against autograd through the reference, in every type; half types to a few of their roundings."""
    args, plain = (with_gradients(calls(dtype, per_sample=True, drawn=True)[name][1]) for _ in range(2))
    x, at = plain, Noise(*args[-4:])
    if name == "lincomb":
        expected = ops.lincomb(list(zip(x[1], x[0], strict=True)), (x[2], at))
    elif name == "langevin":
        expected = ops.langevin(x[0], x[1], x[2], x[3], at, measured=x[4])
    else:
        expected = ops.dsm_loss(x[0], at, x[1])
    got = getattr(OPS, name)(*args)
    for out in (got, expected):
        parts = out if isinstance(out, tuple) else (out,)
        sum((part.double() * random(40 + k, *part.shape)).sum() for k, part in enumerate(parts)).backward()
    leaves = [torch.utils._pytree.tree_leaves(each) for each in (args, plain)]
    compared = 0
    for mine, theirs in zip(*leaves, strict=True):
        if isinstance(mine, Tensor) and mine.requires_grad:
            assert mine.grad.dtype == mine.dtype and mine.grad.shape == mine.shape
            # each way rounds twice at most to the type (what is summed, and the sum), D + 8 times in its arithmetic:
            # D terms, each of a few products
            bound = 4 * ROUNDING[dtype] + 2 * (D + 8) * ARITHMETIC[dtype]
            assert (mine.grad.double() - theirs.grad.double()).norm() <= bound * theirs.grad.double().norm()
            compared += 1
    assert compared >= 2


@each_op
def test_noise_is_not_kept_for_the_backward_pass(name: str) -> None:
    args = with_gradients(calls(torch.float32, per_sample=True, drawn=True)[name][1])
    given = {x.data_ptr() for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        getattr(OPS, name)(*args)
    assert kept and all(x.data_ptr() in given for x in kept)


# ---- what it costs ----


class Passes(TorchDispatchMode):
    """Counts ops that read or write a whole batch, and the batches they allocate."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.ops, self.allocated = size, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        known = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)}
        if any(x.numel() == self.size for x in tensors) and not func.is_view:
            self.ops.append(func.overloadpacket.__name__)
            new = isinstance(out, Tensor) and out.numel() == self.size
            self.allocated += new and out.untyped_storage().data_ptr() not in known
        return out


@each_coefficient
@pytest.mark.parametrize("n", range(1, 6))
def test_a_sum_is_one_op_for_each_term_and_one_allocation(n: int, per_sample: bool) -> None:
    xs = [random(k, B, *EVENT, dtype=torch.float32) for k in range(n + 1)]
    cs = [factor(k, per_sample) if per_sample else float(factor(k, False)) for k in range(n + 1)]
    terms, noise = list(zip(cs, xs, strict=True))[:n], (cs[n], xs[n])
    with Passes(B * D) as count:
        ops.lincomb(terms, noise)
    assert len(count.ops) == n + 1 and count.allocated == 1
    with Passes(B * D) as count:  # a term with factor 1 needs none
        ops.lincomb([(1.0, xs[0]), *terms[1:]], noise)
    assert len(count.ops) == n and count.allocated == 1


def test_a_corrector_and_a_loss_make_one_temporary() -> None:
    x, eps, z = (random(k, B, *EVENT, dtype=torch.float32) for k in range(3))
    for measured, squares in ((False, 1), (True, 2)):
        with Passes(B * D) as count:
            ops.langevin(x, eps, factor(1, True), 0.1, z, measured=measured)
        assert count.ops == ["pow", "sum"] * squares + ["addcmul", "addcmul_"]
        assert count.allocated == 1 + squares  # one at a time
    with Passes(B * D) as count:
        ops.dsm_loss(eps, z, factor(1, True))
    assert count.ops == ["sub", "pow", "mean"] and count.allocated == 2


# ---- torch.compile ----


def test_compiled_code_draws_and_is_compiled_once_more_at_most() -> None:
    """One graph; the same numbers; the second call learns that the number of the draw changes, others know it."""

    def step(rng: Rng, x: Tensor, sigma: Tensor, network: Tensor) -> tuple[Tensor, ...]:
        eps = x * network
        x = ops.lincomb(((0.5, x), (sigma, eps)), (1.0, rng.noise(x)))
        x = ops.langevin(x, eps, sigma, 0.16, rng.noise(x), measured=True)
        loss = ops.dsm_loss(eps, rng.normal_like(x), sigma)
        drawn = (
            library.dsm_loss(eps, sigma, None, found(True)) + library.lincomb([eps], [sigma], sigma, found())[:, 0, 0]
        )
        return x, loss, drawn, rng.uniform((B,)), rng.rademacher_like(x), rng.integers(9, (B,))

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, rng, twin = torch.compile(step, fullgraph=True, backend=counter), Rng(3), Rng(3)
    for k in range(5):
        x, sigma, network = random(k, B, *EVENT, dtype=torch.float32), factor(k, True).float(), torch.full((), 0.5)
        results, gradients = [], []
        for f, source in ((compiled, rng), (step, twin)):
            weight = network.clone().requires_grad_()
            out = f(source, x, sigma, weight)
            sum(part.sum() for part in out[:3]).backward()
            results.append(out)
            gradients.append(weight.grad)
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)
        # float32 sums in another order: of B · 2 · D terms of order 1
        assert abs(float(gradients[0] - gradients[1])) <= B * 2 * D * 2.0**-24 * (1 + abs(float(gradients[1])))
        assert rng.state_dict()["streams"].tolist() == twin.state_dict()["streams"].tolist()
    assert counter.frame_count <= 2
    torch._dynamo.reset()
