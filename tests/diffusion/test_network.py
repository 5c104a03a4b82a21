"""Networks as people bring them: wrapped, of other dtypes and signatures, and with more in what they return."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from scoresde import DDIM, EDM, VPSDE, ClassifierFree, DenoisingLoss, Preconditioned, Rng, Sampler, ScoreFunction
from scoresde.nn import MLP, UNet

X, T, LABEL = Rng(0).normal((4, 2)), torch.tensor(0.4), torch.tensor([0, 1, 2, 0])


class Plain(nn.Module):
    """(x, c)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.label = nn.Linear(3, 2), nn.Embedding(4, 2)

    def say(self, x: Tensor, c: Tensor, cond: Tensor | None = None) -> Tensor:
        y = self.linear(torch.cat([x, c[:, None]], 1))
        return y if cond is None else y + self.label(cond)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.say(x, c)


class Optional(Plain):
    def forward(self, x: Tensor, c: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.say(x, c, cond)

    def null(self, cond: Tensor) -> Tensor:
        return torch.tensor([3])


class Required(Plain):
    def forward(self, x: Tensor, c: Tensor, cond: Tensor | None) -> Tensor:
        return self.say(x, c, cond)


class ByName(Plain):
    def forward(self, x: Tensor, c: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return self.say(x, c, cond)


class Open(Plain):
    def forward(self, x: Tensor, c: Tensor, **more: Any) -> Tensor:
        return self.say(x, c, **more)


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "itself": lambda net: net,
    "compile": lambda net: torch.compile(net, backend="eager"),
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "both": lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
    "partial": functools.partial,
    "method": lambda net: net.forward,
    "*args": lambda net: lambda *args: net(*args),
}


def model(network: Any) -> Preconditioned:
    return Preconditioned(network, VPSDE(), EDM())


@pytest.mark.parametrize("kind", [Plain, Optional, Required, ByName, Open])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_network_is_called_as_the_one_inside(wrapper: str, kind: type[Plain]) -> None:
    """With a condition and without one, as the signature of what is inside asks for."""
    net = kind()
    if wrapper == "*args" and kind in (Required, ByName):
        return  # of which nobody can know how many they are
    wrapped = model(WRAPPERS[wrapper](net))
    assert torch.equal(wrapped(X, T).x0, model(lambda x, c: net.say(x, c))(X, T).x0)
    if wrapper == "*args":
        return
    assert len(list(wrapped.parameters())) == 3
    if kind is Plain:
        with pytest.raises(ValueError, match=r"the network takes \(x, c_noise\) only"):
            wrapped(X, T, LABEL)
    else:
        assert torch.equal(wrapped(X, T, LABEL).x0, model(lambda x, c, cond: net.say(x, c, cond))(X, T, LABEL).x0)


def test_the_null_condition_is_that_of_the_network_inside() -> None:
    net = Optional()
    right = ClassifierFree(model(net), 2.0)(X, T, LABEL).x0
    for wrap in WRAPPERS.values():
        if wrap is not WRAPPERS["*args"] and wrap is not WRAPPERS["method"]:
            torch.testing.assert_close(ClassifierFree(model(wrap(net)), 2.0)(X, T, LABEL).x0, right)


def test_a_partial_keeps_its_arguments() -> None:
    def network(scale: float, x: Tensor, c: Tensor, *, shift: float) -> Tensor:
        return scale * x + shift

    found = model(functools.partial(network, 2.0, shift=1.0))(X, T).x0
    assert torch.equal(found, model(lambda x, c: 2 * x + 1)(X, T).x0)


@pytest.mark.parametrize("pack", [
    lambda y: (y,), lambda y: [y], lambda y: {"sample": y, "other": 1}, lambda y: OrderedDict(logits=y),
    lambda y: SimpleNamespace(sample=y, other=1),
], ids=["tuple", "list", "mapping", "one entry", "object"])  # fmt: skip
def test_the_one_tensor_of_an_output_is_found(pack: Callable[[Tensor], Any]) -> None:
    right = model(lambda x, c: torch.tanh(x))(X, T).x0
    assert torch.equal(model(lambda x, c: pack(torch.tanh(x)))(X, T).x0, right)


@pytest.mark.parametrize(("output", "said"), [
    ((X, X), "a tuple of 2"), ({"a": X, "b": X}, "a dict with 'a', 'b'"), (None, "a NoneType"),
    (X.long(), "torch.int64"), (X.to(torch.complex64), "torch.complex64"),
    (SimpleNamespace(sample=2), "SimpleNamespace"),
])  # fmt: skip
def test_an_output_with_more_in_it_is_refused_with_the_cure(output: Any, said: str) -> None:
    for denoiser in (model(lambda x, c: output), ScoreFunction(lambda x, t: output, VPSDE())):
        with pytest.raises(TypeError, match=rf"returned .*{said}.*lambda x, c: network\(x, c\)\[0\]"):
            denoiser(X, T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("build", [
    lambda: MLP((2,), width=16, depth=1, classes=3, cond_dim=2),
    lambda: UNet((2, 4), width=8, multipliers=(1, 2), blocks=1, attention=(2,), classes=3, cond_dim=2),
], ids=["mlp", "unet"])  # fmt: skip
def test_weights_of_another_dtype_are_called_in_it(build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """Samples are float32 or wider. Weights of 0.1 make outputs below 1, and each of three steps hands on their
    rounding, 2^-8 in bfloat16 a layer: some 25 of those in all."""
    torch.manual_seed(0)
    net = build()
    for parameter in net.parameters():
        parameter.data.normal_(std=0.1)
    shape = (4, *net.event_shape)  # type: ignore[misc]
    cond = {"label": LABEL, "vector": Rng(1).normal((4, 2))}
    run = lambda network: Sampler(DDIM(), steps=3)(model(network), shape, cond=cond, rng=Rng(0))  # noqa: E731
    found, right = run(copy.deepcopy(net).to(dtype)), run(net)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found, right.to(found.dtype), atol=0.1, rtol=0)
    x0 = Rng(0).normal(shape).to(dtype)
    assert DenoisingLoss(model(copy.deepcopy(net).to(dtype)))(x0, cond).isfinite().all()


def test_a_network_that_mixes_dtypes_is_told_so() -> None:
    with pytest.raises(TypeError, match=r"weights of torch.bfloat16.*c_noise.to\(x.dtype\)"):
        model(Plain().bfloat16())(X, T)
    wrong = nn.Linear(5, 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # other errors are the network's own
        model(lambda x, c: wrong(x))(X, T)


def test_copies_know_the_dtype_of_their_own_weights() -> None:
    one = model(MLP((2,), width=8, depth=1))
    other = copy.deepcopy(one).double()
    for each, dtype in (
        (one, torch.float32),
        (other, torch.float64),
        (pickle.loads(pickle.dumps(other)), torch.float64),
    ):
        seen = []
        each.network.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].dtype))
        each(X, T)
        assert seen == [dtype]
    nn.utils.parametrizations.weight_norm(one.network.conditioning.inner)
    one.double()
    assert one(X.double(), T).x0.dtype == torch.float64


@pytest.mark.parametrize("strict", [False, True])
def test_a_denoiser_is_exported(strict: bool) -> None:
    """And saved and loaded; a program knows the rates of its times, though it has no SDE."""
    denoiser = model(MLP((2,), width=8, depth=1)).eval()
    t, batch = torch.tensor([0.1, 0.3, 0.5, 0.9]), torch.export.Dim("batch")
    program = torch.export.export(denoiser, (X, t), dynamic_shapes=({0: batch}, {0: batch}), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x, times = torch.cat([X, X]), torch.cat([t, t])
    right = denoiser(x, times)
    for found in (program.module()(x, times), torch.export.load(file).module()(x, times)):
        for name in ("x0", "eps", "score", "velocity"):
            torch.testing.assert_close(getattr(found, name), getattr(right, name))


def test_a_prediction_goes_through_vmap() -> None:
    denoiser = model(MLP((2,), width=8, depth=1)).eval()
    found = torch.vmap(lambda x: denoiser(x[None], T))(X)
    torch.testing.assert_close(found.x0[:, 0], denoiser(X, T).x0)
    assert found.scales.sde is denoiser.sde
