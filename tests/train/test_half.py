"""Halves on a CPU: attention and group norm in a training step, against float64 and the kernels that they go round."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_training import training
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from scoresde.train.half import fast_half
from scoresde.train.trainer import Trainer

CPU = torch.device("cpu")
ATTENTION, GROUP_NORM = F.scaled_dot_product_attention, F.group_norm


class Kernels(TorchDispatchMode):
    """Collects the dtypes in which the fused attention kernels run."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "flash_attention_for_cpu" in str(func):
            self.dtypes.append(("backward" if "backward" in str(func) else "forward", args[0].dtype))
        return func(*args, **(kwargs or {}))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def untouched() -> bool:
    return F.scaled_dot_product_attention is ATTENTION and F.group_norm is GROUP_NORM


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [None, "bool", "half"])
def test_attention_of_halves_is_rounded_once(dtype: torch.dtype, masked: str | None) -> None:
    """Only the results are rounded to b bits, an error of 2^-b of each, b = 8 or 11; what float32 adds before that in
    64 products of numbers below 5 is under 64 · 5 · 2^-24 = 2e-5. PyTorch's kernel rounds the probabilities too.
    """
    given = [normal(2, 3, 64, 8, seed=seed).to(dtype).requires_grad_() for seed in range(3)]
    mask = None if masked is None else normal(64, 64, seed=4) < 1
    if masked == "half":
        mask = torch.zeros(64, 64, dtype=dtype).masked_fill(~mask, -30000.0)
    with fast_half(CPU), Kernels() as kernels:
        answer = F.scaled_dot_product_attention(*given, attn_mask=mask)
        answer.backward(normal(2, 3, 64, 8, seed=3).to(dtype))
    assert answer.dtype == dtype and {each for _, each in kernels.dtypes} == {torch.float32}
    q, k, v = exact = [each.detach().double().requires_grad_() for each in given]
    logits = q @ k.transpose(-1, -2) / 8**0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if masked == "bool" else logits + mask
    oracle = logits.softmax(-1) @ v
    oracle.backward(normal(2, 3, 64, 8, seed=3).to(dtype).double())
    once = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(answer.double(), oracle, rtol=once, atol=2e-5)
    for mine, right in zip(given, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), right.grad, rtol=once, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_and_own_functions_are_left_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    given, x = [normal(2, 3, 64, 8, seed=seed).to(dtype) for seed in range(3)], normal(2, 8, 4, 4).to(dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    plain = ATTENTION(*given), GROUP_NORM(last, 4)
    with fast_half(CPU):
        same = F.scaled_dot_product_attention(*given), F.group_norm(last, 4)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(plain, same, strict=True))
    with fast_half(torch.device("meta")):
        assert untouched()
    monkeypatch.setattr(F, "scaled_dot_product_attention", own := lambda *_, **__: None)
    with fast_half(CPU):
        assert F.scaled_dot_product_attention is own and F.group_norm is GROUP_NORM
    assert F.scaled_dot_product_attention is own


def test_group_norm_of_halves_in_channels_last_is_that_of_the_contiguous_layout() -> None:
    x, upstream = normal(2, 8, 4, 4).bfloat16(), normal(2, 8, 4, 4, seed=1).bfloat16()
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        given, norm = x.clone(memory_format=layout).requires_grad_(), nn.GroupNorm(4, 8)
        with fast_half(CPU):
            out = norm(given)
        out.backward(upstream)
        assert out.is_contiguous(memory_format=layout)
        results.append((out, given.grad, norm.weight.grad, norm.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Foreign(nn.Module):
    """A network that knows nothing of this library: one attention by name, one in a layer, one that runs twice."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails, self.inlet = fails, nn.Linear(3, 48)
        self.layer = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True)
        self.again = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True)
        self.outlet = nn.Linear(16, 2)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any = None) -> Tensor:
        tokens = self.inlet(torch.cat([x, c_noise[:, None]], 1))[:, None].repeat(1, 5, 1)
        h = F.scaled_dot_product_attention(*tokens.unflatten(2, (3, 1, 16)).permute(2, 0, 3, 1, 4))[:, 0]
        h = checkpoint(self.again, self.layer(h), use_reentrant=False)
        if self.fails:
            raise ArithmeticError
        return self.outlet(h.mean(1))


@contextlib.contextmanager
def trained(network: nn.Module) -> Iterator[Kernels]:
    run = training(autocast="bfloat16", network=network)
    run.loss.train()
    with Kernels() as kernels:
        Trainer(images=100, batch_size=8, accumulate=2).step(run)
    yield kernels


def test_a_step_of_a_foreign_network_attends_in_float32_forward_and_backward() -> None:
    with trained(Foreign()) as kernels:
        # three forward and one again, in each of two batches
        assert kernels.dtypes.count(("forward", torch.float32)) == 8
        assert kernels.dtypes.count(("backward", torch.float32)) == 6 == len(kernels.dtypes) - 8
    assert untouched()


def test_a_step_that_fails_leaves_nothing_behind() -> None:
    with pytest.raises(ArithmeticError), trained(Foreign(fails=True)):
        pass
    assert untouched()


def test_compiled_networks_keep_their_graph_whole() -> None:
    network = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True)
    compiled, graphs = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True), []
    compiled.load_state_dict(network.state_dict())

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled.compile(backend=backend, fullgraph=True)
    with fast_half(CPU), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(normal(2, 5, 16)), network(normal(2, 5, 16)), rtol=0, atol=0)
    (graph,) = graphs
    (node,) = [node for node in graph.graph.nodes if node.target is ATTENTION]
    assert [each.meta["example_value"].dtype for each in node.args[:3]] == [torch.float32] * 3
