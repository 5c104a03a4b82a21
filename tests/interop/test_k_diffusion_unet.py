"""The U-Net of k-diffusion says here what a plain reading of its layers says of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from scoresde import nn
from scoresde.interop import ForeignFileError, read

SIGMA = torch.tensor([0.03, 0.6, 4.0])
MODEL: dict[str, Any] = {
    "type": "image_v1",
    "input_channels": 1,
    "input_size": [8, 16],
    "patch_size": 2,
    "mapping_out": 8,
    "depths": [2, 1],
    "channels": [8, 128],  # four groups and two heads
    "self_attn_depths": [False, True],
    "has_variance": True,
    "sigma_data": 0.5,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of its tensors."""
    found: dict[str, tuple[int, ...]] = {
        "timestep_embed.weight": (4, 1),
        "mapping_cond.weight": (8, 9),
        "u_net.d_blocks.1.0.kernel": (4, 4),
        "u_net.u_blocks.0.2.kernel": (4, 4),
    }

    def layer(name: str, *shape: int) -> None:
        found.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    def block(name: str, inputs: int, middle: int, outputs: int) -> None:
        layer(f"{name}.main.0.mapper", 2 * inputs, 8)
        layer(f"{name}.main.2", middle, inputs, 3, 3)
        layer(f"{name}.main.4.mapper", 2 * middle, 8)
        layer(f"{name}.main.6", outputs, middle, 3, 3)
        if inputs != outputs:
            found[f"{name}.skip.weight"] = (outputs, inputs, 1, 1)

    def attention(name: str, channels: int) -> None:
        layer(f"{name}.norm_in.mapper", 2 * channels, 8)
        layer(f"{name}.qkv_proj", 3 * channels, channels, 1, 1)
        layer(f"{name}.out_proj", channels, channels, 1, 1)

    layer("mapping.0", 8, 8)
    layer("mapping.2", 8, 8)
    layer("proj_in", 8, 4, 1, 1)
    layer("proj_out", 5, 8, 1, 1)
    block("u_net.d_blocks.0.1", 8, 8, 8)
    block("u_net.d_blocks.0.2", 8, 8, 8)
    block("u_net.d_blocks.1.1", 8, 128, 128)
    attention("u_net.d_blocks.1.2", 128)
    block("u_net.u_blocks.0.0", 128, 128, 8)
    attention("u_net.u_blocks.0.1", 8)
    block("u_net.u_blocks.1.0", 16, 8, 8)
    block("u_net.u_blocks.1.1", 8, 8, 8)
    return found


def random_tensors() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, generator=random) / (1 if name.startswith("time") else math.sqrt(math.prod(shape[1:])))
        for name, shape in shapes().items()
    }


def write(path: Path, tensors: dict[str, Tensor], model: dict[str, Any]) -> Path:
    start = "inner_model." if model.get("augment_wrapper", True) else ""
    named = {start + name: value for name, value in tensors.items()}
    save_file(named, path, metadata={"config": json.dumps({"model": model, "dataset": {"type": "imagefolder"}})})
    return path


class Reference:
    """The network in float64, by the names of the file."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.w = {name: value.double() for name, value in tensors.items()}

    def layer(self, h: Tensor, name: str) -> Tensor:
        weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        if weight.ndim == 2:
            return F.linear(h, weight, bias)
        return F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2)

    def norm(self, h: Tensor, name: str, emb: Tensor) -> Tensor:
        groups = max(1, h.shape[1] // 32)
        parts = h.unflatten(1, (groups, -1)).flatten(2)
        parts = (parts - parts.mean(-1, keepdim=True)) / (parts.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        scale, shift = self.layer(emb, f"{name}.mapper")[:, :, None, None].chunk(2, 1)
        return parts.reshape(h.shape) * (scale + 1) + shift

    def block(self, h: Tensor, name: str, emb: Tensor) -> Tensor:
        inner = self.layer(F.gelu(self.norm(h, f"{name}.main.0", emb)), f"{name}.main.2")
        inner = self.layer(F.gelu(self.norm(inner, f"{name}.main.4", emb)), f"{name}.main.6")
        skip = self.w.get(f"{name}.skip.weight")
        return inner + (h if skip is None else F.conv2d(h, skip))

    def attention(self, h: Tensor, name: str, emb: Tensor) -> Tensor:
        heads = max(1, h.shape[1] // 64)
        qkv = self.layer(self.norm(h, f"{name}.norm_in", emb), f"{name}.qkv_proj").flatten(2)
        q, k, v = (part.unflatten(1, (heads, -1)) for part in qkv.chunk(3, 1))
        weights = (torch.einsum("bhcq,bhck->bhqk", q, k) / math.sqrt(q.shape[2])).softmax(-1)
        answer = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(h.shape)
        return h + self.layer(answer, f"{name}.out_proj")

    def __call__(self, x: Tensor, noise: Tensor) -> Tensor:
        angle = 2 * math.pi * noise[:, None] * self.w["timestep_embed.weight"][:, 0]
        emb = torch.cat([angle.cos(), angle.sin()], 1)
        emb = F.gelu(self.layer(F.gelu(self.layer(emb, "mapping.0")), "mapping.2"))
        filtered = torch.outer(*[torch.tensor([1.0, 3.0, 3.0, 1.0]).double() / 8] * 2)
        h = self.layer(torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1), "proj_in")
        for k in (1, 2):
            h = self.block(h, f"u_net.d_blocks.0.{k}", emb)
        kept, c = h, h.shape[1]
        each = filtered.expand(c, 1, 4, 4)
        h = F.conv2d(F.pad(h, (1,) * 4, "reflect"), each, stride=2, groups=c)
        h = self.attention(self.block(h, "u_net.d_blocks.1.1", emb), "u_net.d_blocks.1.2", emb)
        h = self.attention(self.block(h, "u_net.u_blocks.0.0", emb), "u_net.u_blocks.0.1", emb)
        h = F.conv_transpose2d(F.pad(h, (1,) * 4, "reflect"), 4 * each, stride=2, padding=3, groups=c)
        h = torch.cat([h, kept], 1)
        for k in (0, 1):
            h = self.block(h, f"u_net.u_blocks.1.{k}", emb)
        h = self.layer(h, "proj_out")[:, :4]  # then the variance
        out = torch.empty_like(x)
        for at, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            out[:, 0, i::2, j::2] = h[:, at]
        return out


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_unet_agrees_with_its_formula(tmp_path: Path, wrapped: bool) -> None:
    tensors = random_tensors()
    if not wrapped:
        del tensors["mapping_cond.weight"]
    imported = read(write(tmp_path / "net.safetensors", tensors, MODEL | {"augment_wrapper": wrapped}))
    x = torch.randn(3, 1, 8, 16, generator=torch.Generator().manual_seed(1)).double()
    s = SIGMA.double().reshape(-1, 1, 1, 1)
    total, noise = s**2 + 0.25, SIGMA.double().log() / 4
    inner = Reference(tensors)(x / total.sqrt(), noise)
    truth = 0.25 / total * x + 0.5 * s / total.sqrt() * inner  # Karras et al. 2022, table 1
    denoiser = imported.denoiser()
    ours = imported.build_network()((x / total.sqrt()).float(), noise.float())
    whole = denoiser(x, denoiser.sde.time(-2 * SIGMA.double().log()), None).x0
    for found, expected in ((ours, inner), (whole, truth)):
        # float32 keeps 6e-8 of a number; some twenty layers keep 1e-5 of the largest
        assert float((found.double() - expected).abs().max() / expected.abs().max()) < 1e-5
    assert "the learned variance is left out" in imported.summary()


def test_what_its_file_lacks_or_claims_is_refused_in_words(tmp_path: Path) -> None:
    tensors = random_tensors()
    lacking = {name: value for name, value in tensors.items() if "u_blocks.1.1.main.6" not in name}
    cases: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
        (tensors, {"channels": [8, 1 << 20]}, "does not hold the network that it says"),
        (tensors, {"channels": [8]}, "channels and depths have one number, ≥ 1, per level"),
        (tensors, {"depths": [1 << 20, 1]}, r"has no tensor inner_model\.u_net\.d_blocks\.0\.3\.main\.0"),
        (tensors, {"self_attn_depths": [True]}, "self_attn_depths has true or false per level"),
        (tensors, {"self_attn_depths": [False, False]}, r"has no tensor inner_model\.u_net|does not need"),
        (tensors, {"input_size": [4096, 4096]}, "no tensor bears the size of the picture out"),
        (tensors, {"input_size": [6, 16]}, "multiples of 4, two or more"),
        (tensors, {"has_variance": False}, "does not hold the network that it says"),
        (tensors, {"skip_stages": 1}, "skip_stages=1 is not known here"),
        (tensors, {"cross_cond_dim": 8}, "cross_cond_dim=8 is not known here"),
        (tensors, {"mapping_out": 7}, "does not hold the network that it says"),
        (lacking, {}, r"has no tensor inner_model\.u_net\.u_blocks\.1\.1\.main\.6\.weight"),
        (tensors | {"u_net.d_blocks.0.9.weight": torch.zeros(1)}, {}, "has 1 tensors that its network does not need"),
    ]
    for given, changed, message in cases:
        with pytest.raises(ForeignFileError, match=message):
            read(write(tmp_path / "net.safetensors", given, MODEL | changed)).denoiser()


def test_a_fresh_one_is_zero_and_its_inputs_are_checked() -> None:
    network = nn.ModulatedUNet((1, 8, 8), widths=(8, 64), depths=(1, 1), attention=(1,), embedding_width=8)
    x = torch.ones(2, 1, 8, 8)
    assert not network(x, torch.zeros(2)).any()
    cases: list[tuple[Any, str]] = [((x[:, :, :4], torch.zeros(2)), "is for samples"), ((x, x, x), "unconditional")]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            network(*given)
    for wrong, message in (
        ({"widths": (8,)}, "one entry per level"),
        ({"widths": (8, 65)}, "2 groups, one for 32 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            nn.ModulatedUNet((1, 8, 8), **{"widths": (8, 64), "depths": (1, 1), "attention": (1,), **wrong})
