"""The transformer beside what it is made of: convolutions, PyTorch's own attention, and the published counts."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import scoresde as S
from scoresde.nn import DiT
from scoresde.nn.transformer import patches, positions, unpatched

SIZES = {
    "S": (384, 12, 6, 32_865_056),
    "B": (768, 12, 12, 130_315_808),
    "L": (1024, 24, 16, 457_840_672),
    "XL": (1152, 28, 16, 674_834_720),
}


@pytest.mark.parametrize(("width", "depth", "heads", "published"), SIZES.values(), ids=SIZES)
def test_the_published_sizes_have_the_published_parameters(width, depth, heads, published):
    # Peebles & Xie (2023): latents 4×32×32, patches of 2, 1,000 classes and the null, ε̂ and the variance
    with torch.device("meta"):
        network = DiT((4, 32, 32), width=width, depth=depth, heads=heads, outputs=2, classes=1000)
    assert sum(parameter.numel() for parameter in network.parameters()) == published


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 4), (3, 4, 8, 4)])
def test_patches_are_those_of_a_strided_convolution_and_come_back(shape):
    x = torch.randn(2, *shape, dtype=torch.float64)
    dims = len(shape) - 1
    weight = torch.randn(5, 3, *[2] * dims, dtype=torch.float64)
    convolved = (F.conv1d, F.conv2d, F.conv3d)[dims - 1](x, weight, stride=2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches(x, 2) @ weight.flatten(1).T, convolved, rtol=0, atol=1e-12)
    last = patches(x, 2).unflatten(2, (3, -1)).transpose(2, 3).flatten(2)  # channels last, as the outlet has them
    assert torch.equal(unpatched(last, x.shape, 2), x)


def test_no_two_places_share_a_position_and_equal_steps_are_equally_far():
    p = positions((4, 3, 2), 24).double()
    assert p.shape == (24, 24)
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(p, 2))
    # |p(k) − p(j)|² = Σ 2 − 2 cos((k − j) ω), a function of k − j; float32 waves, 24 of them
    steps = (positions((9,), 8).double().diff(dim=0)).norm(dim=1)
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=0, atol=1e-6)


def test_a_block_is_torchs_own_transformer_layer_between_the_modulations():
    torch.manual_seed(0)
    block = DiT((1, 8), width=8, depth=1, heads=2).double().blocks[0]
    h, emb = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    torch.nn.init.normal_(block.modulation.weight)
    shift, scale, gate, shift2, scale2, gate2 = block.modulation(emb)[:, None].chunk(6, -1)
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    attention.load_state_dict({
        "in_proj_weight": block.qkv.weight, "in_proj_bias": block.qkv.bias,
        "out_proj.weight": block.proj.weight, "out_proj.bias": block.proj.bias,
    })  # fmt: skip
    seen = F.layer_norm(h, (8,), eps=1e-6) * (1 + scale) + shift
    expected = h + gate * attention(seen, seen, seen, need_weights=False)[0]
    seen = F.layer_norm(expected, (8,), eps=1e-6) * (1 + scale2) + shift2
    expected = expected + gate2 * block.outer(F.gelu(block.inner(seen), approximate="tanh"))
    torch.testing.assert_close(block(h, emb, None, None), expected, rtol=0, atol=1e-12)


def test_padding_tokens_change_nothing():
    network = _awake(DiT((1, 8), width=8, depth=2, heads=2, cond_tokens=3))
    x, c, tokens = torch.randn(2, 1, 8).double(), torch.zeros(2).double(), torch.randn(2, 4, 3).double()
    padded = torch.cat([tokens, torch.full((2, 2, 3), torch.nan, dtype=torch.float64)], 1)
    torch.testing.assert_close(network(x, c, padded), network(x, c, tokens), rtol=0, atol=1e-12)
    assert not torch.allclose(network(x, c, tokens), network(x, c, tokens[:, :2]))


def test_two_outputs_have_twice_the_channels_and_skips_matter():
    x, c = torch.randn(2, 1, 8).double(), torch.zeros(2).double()
    assert _awake(DiT((1, 8), width=8, depth=2, heads=2, outputs=2))(x, c).shape == (2, 2, 8)
    network = _awake(DiT((1, 8), width=8, depth=3, heads=2, skips=True))
    assert [block.skip is not None for block in network.blocks] == [False, False, True]
    before = network(x, c)
    network.blocks[2].skip.weight.data[:, 8:] = 0  # what came early
    assert not torch.allclose(before, network(x, c))


@pytest.mark.parametrize("shape", [(1, 8), (1, 6, 4), (1, 4, 2, 6)])
def test_a_local_perceptron_sees_the_patches_next_to_it_and_no_token(shape):
    """Without attention what is far from a change stays as it was; the convolution is torch's own of the patches."""
    network = _awake(DiT(shape, width=12, depth=1, heads=2, local=True, cond_tokens=3))
    block = network.blocks[0]
    h = torch.randn(2, block.near.places + 2, 48, dtype=torch.float64)
    own = h[:, : block.near.places].mT.reshape(2, 48, *block.near.grid)
    expected = own + block.near.conv(own)
    found = block.near(h)
    torch.testing.assert_close(found[:, : block.near.places].mT.reshape(expected.shape), expected, rtol=0, atol=1e-12)
    assert torch.equal(found[:, block.near.places :], h[:, block.near.places :])
    block.proj.weight.data.zero_()
    x, c = torch.randn(1, *shape).double(), torch.zeros(1).double()
    moved = x.clone()
    moved.flatten(1)[0, 0] += 1
    changed = (network(moved, c) != network(x, c)).reshape(shape)[0]
    assert changed.flatten()[0] and changed.any() and not changed.flatten()[-1]


def test_half_precision_is_near_and_a_compiled_one_the_same():
    """bfloat16 keeps 8 bits: its outputs, of order 1, are off by a few of 2⁻⁸; what is compiled by round-off."""
    network = _awake(DiT((2, 8, 8), width=16, depth=3, heads=2, skips=True, classes=3, outputs=2)).float()
    x, t, y = torch.randn(3, 2, 8, 8), torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0, 2, 3])
    whole = S.Split(network, S.VPSDE(), S.Eps())(x, t, y)
    half = S.Split(network, S.VPSDE(), S.Eps(), autocast="bfloat16")(x, t, y)
    assert half.eps.dtype == torch.float32 and not torch.equal(half.eps, whole.eps)
    for found, expected in ((half.eps, whole.eps), (half.share, whole.share)):
        assert float((found - expected).square().mean().sqrt()) < 4 * 2**-8 * float(expected.square().mean().sqrt())
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    again = S.Split(compiled, S.VPSDE(), S.Eps())(x, t, y)
    torch.testing.assert_close(again.eps, whole.eps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.share, whole.share, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"event_shape": (1, 9)}, r"Patches of 2 do not divide the sizes \[9\].*a patch that divides 9"),
        ({"event_shape": (1, 9, 4)}, "pad or crop"),
        ({"event_shape": (4,)}, r"event_shape is \(C, L\)"),
        ({"event_shape": (1, 8), "width": 9}, "divisible by heads=6"),
        ({"event_shape": (1, 8), "depth": 0}, "depth"),
        ({"event_shape": (1, 8, 8), "cond_image": (1, 8)}, "another number of sizes"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        DiT(**arguments)


def _awake(network: DiT) -> DiT:
    """In float64, its zero layers drawn at random."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.double().eval().parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.2, generator=generator)
    return network
