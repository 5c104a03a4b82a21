"""Checkpoints of k-diffusion say here what a plain reading of the papers says of them."""

from __future__ import annotations

import copy
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from scoresde.cli import importing
from scoresde.interop import ForeignFileError, Imported, read

SIGMA = torch.tensor([0.03, 0.6, 4.0])
# float32 keeps 6e-8 of a number; some twenty layers keep 1e-5 of the largest
ALLOWED = 1e-5
HDIT: dict[str, Any] = {
    "type": "image_transformer_v2",
    "input_channels": 2,
    "input_size": [8, 16],
    "patch_size": [1, 2],
    "widths": [8, 16, 8],
    "depths": [2, 1, 1],
    "d_ffs": [12, 8, 8],
    "self_attns": [
        {"type": "shifted-window", "d_head": 8, "window_size": 4},
        {"type": "none"},
        {"type": "global", "d_head": 8},
    ],
    "mapping_width": 8,
    "mapping_depth": 1,
    "mapping_d_ff": 12,
    "sigma_data": 0.5,
}
V1: dict[str, Any] = {
    "type": "image_transformer_v1",
    "input_channels": 2,
    "input_size": [4, 8],
    "patch_size": [1, 2],
    "width": 128,
    "depth": 2,
    "d_ff": 24,
    "sigma_data": 0.5,
}


def perceptron(name: str, width: int, hidden: int, norm: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    named = {f"{name}.{end}": shape for end, shape in norm.items()}
    return named | {f"{name}.up_proj.weight": (2 * hidden, width), f"{name}.down_proj.weight": (width, hidden)}


def shapes(model: dict[str, Any], classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a transformer's tensors."""
    second = model["type"].endswith("v2")
    width = model["mapping_width"] if second else model["width"]
    found: dict[str, tuple[int, ...]] = {
        "time_emb.weight": (width // 2, 1),
        "aug_emb.weight": (width // 2, 9),
        "time_in_proj.weight": (width, width),
        "aug_in_proj.weight": (width, width),
        "mapping.in_norm.scale": (width,),
        "mapping.out_norm.scale": (width,),
    }
    if classes:
        found["class_emb.weight"] = (classes + 1, width)
    inner = model["mapping_d_ff"] if second else model["d_ff"]
    for k in range(model["mapping_depth"] if second else 2):
        found |= perceptron(f"mapping.blocks.{k}", width, inner, {"norm.scale": (width,)})
    volume = math.prod(model["patch_size"]) * model["input_channels"]
    widths = model["widths"] if second else [width]
    found |= {"out_norm.scale": (widths[0],)}
    ends = ("patch_in.proj", "patch_out.proj") if second else ("in_proj", "out_proj")
    found |= {f"{ends[0]}.weight": (widths[0], volume), f"{ends[1]}.weight": (volume, widths[0])}
    for name, level, w, d_ff in blocks(model):
        norm = {"norm.linear.weight": (w, width)}
        found |= perceptron(f"{name}.ff", w, d_ff, norm)
        spec = model["self_attns"][level] if second else {"type": "global", "d_head": 64}
        if spec["type"] != "none":
            heads, start = w // spec["d_head"], f"{name}.self_attn"
            found |= {f"{start}.qkv_proj.weight": (3 * w, w), f"{start}.out_proj.weight": (w, w)}
            found[f"{start}.norm.linear.weight"] = (w, width)
            found[f"{start}.scale" if second else f"{start}.qk_norm.scale"] = (heads,)
            for end in ("freqs",) if second else ("freqs_h", "freqs_w"):
                found[f"{start}.pos_emb.{end}"] = (heads, spec["d_head"] // (8 if second else 4))
    for level in range(len(widths) - 1):
        found[f"merges.{level}.proj.weight"] = (widths[level + 1], 4 * widths[level])
        found[f"splits.{level}.proj.weight"] = (4 * widths[level], widths[level + 1])
        found[f"splits.{level}.fac"] = (1,)
    return found


def blocks(model: dict[str, Any]) -> list[tuple[str, int, int, int]]:
    """(name, level, width, inner width) of every block."""
    if model["type"].endswith("v1"):
        return [(f"blocks.{k}", 0, model["width"], model["d_ff"]) for k in range(model["depth"])]
    last = len(model["widths"]) - 1
    return [
        (f"{way}.{k}", level, model["widths"][level], model["d_ffs"][level])
        for level in range(last + 1)
        for way in (["mid_level"] if level == last else [f"down_levels.{level}", f"up_levels.{level}"])
        for k in range(model["depths"][level])
    ]


def random_tensors(model: dict[str, Any], classes: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)

    def one(name: str, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=random)
        if "scale" in name or "freqs" in name or name.endswith("fac"):
            return 1 + 0.3 * values.clamp(-2, 2)
        return values if name.endswith("emb.weight") else values / math.sqrt(shape[-1])

    return {name: one(name, shape) for name, shape in shapes(model, classes).items()}


def write(path: Path, tensors: dict[str, Tensor], model: dict[str, Any], classes: int = 0) -> Path:
    config = {"model": model, "dataset": {"type": "imagefolder", "num_classes": classes}}
    save_file(tensors, path, metadata={"config": json.dumps(config)})
    return path


def denoised(imported: Imported, x: Tensor, cond: Tensor | None) -> Tensor:
    denoiser = imported.denoiser()
    return denoiser(x, denoiser.sde.time(-2 * SIGMA.double().log()), cond).x0


def check(imported: Imported, inner: Any, x: Tensor, cond: Tensor | None) -> None:
    """D = σ_d²/(σ² + σ_d²) x + σ σ_d/√(σ² + σ_d²) F(x/√(σ² + σ_d²), ln σ / 4), with σ_d = ½, and F itself."""
    s = SIGMA.double().reshape(-1, 1, 1, 1)
    total, noise = s**2 + 0.25, SIGMA.double().log() / 4
    bare = inner(x / total.sqrt(), noise)
    ours = imported.build_network()((x / total.sqrt()).float(), noise.float(), cond)
    truth = 0.25 / total * x + 0.5 * s / total.sqrt() * bare
    for found, expected in ((ours, bare), (denoised(imported, x, cond), truth)):
        assert float((found.double() - expected).abs().max() / expected.abs().max()) < ALLOWED


class Transformer:
    """Either transformer in float64, token by token in places of the unshifted picture."""

    def __init__(self, tensors: dict[str, Tensor], model: dict[str, Any], labels: Tensor | None):
        self.w = {name: value.double() for name, value in tensors.items()}
        self.model, self.labels, self.second = model, labels, model["type"].endswith("v2")

    def norm(self, h: Tensor, scale: Tensor) -> Tensor:
        return h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * scale

    def modulated(self, h: Tensor, name: str, emb: Tensor) -> Tensor:
        return self.norm(h, (emb @ self.w[f"{name}.norm.linear.weight"].T + 1)[:, None, None])

    def gated(self, h: Tensor, name: str) -> Tensor:
        a, b = (h @ self.w[f"{name}.up_proj.weight"].T).chunk(2, -1)
        return a * b * 0.5 * (1 + torch.erf(b / math.sqrt(2))) @ self.w[f"{name}.down_proj.weight"].T

    def emb(self, noise: Tensor) -> Tensor:
        angle = 2 * math.pi * noise[:, None] * self.w["time_emb.weight"][:, 0]
        emb = torch.cat([angle.cos(), angle.sin()], 1) @ self.w["time_in_proj.weight"].T
        none = torch.cat([torch.ones(len(angle[0])), torch.zeros(len(angle[0]))]).double()
        emb = emb + self.w["aug_in_proj.weight"] @ none
        if self.labels is not None:
            emb = emb + self.w["class_emb.weight"][self.labels]
        emb = self.norm(emb, self.w["mapping.in_norm.scale"])
        for k in range(self.model["mapping_depth"] if self.second else 2):
            name = f"mapping.blocks.{k}"
            emb = emb + self.gated(self.norm(emb, self.w[f"{name}.norm.scale"]), name)
        return self.norm(emb, self.w["mapping.out_norm.scale"])

    def places(self, height: int, width: int) -> Tensor:
        aspect = 1.0 if self.second else self.model["patch_size"][0] / self.model["patch_size"][1]
        most = max(height * aspect, width)
        rows = torch.tensor([(2 * i + 1 - height) / most * aspect for i in range(height)]).double()
        columns = torch.tensor([(2 * j + 1 - width) / most for j in range(width)]).double()
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)

    def attention(self, h: Tensor, name: str, spec: dict[str, Any], index: int, emb: Tensor) -> Tensor:
        name += ".self_attn"
        height, width, d = h.shape[1], h.shape[2], spec["d_head"]
        q, k, v = (self.modulated(h, name, emb) @ self.w[f"{name}.qkv_proj.weight"].T).chunk(3, -1)
        out = []
        for head in range(h.shape[-1] // d):
            parts = [part[..., head * d : (head + 1) * d].flatten(1, 2) for part in (q, k, v)]
            if self.second:
                theta = [self.w[f"{name}.pos_emb.freqs"][head]] * 2
                count, gain = 1, self.w[f"{name}.scale"][head].sqrt()
            else:
                theta = [self.w[f"{name}.pos_emb.freqs_{axis}"][head].exp() for axis in "hw"]
                count, gain = d, (self.w[f"{name}.qk_norm.scale"][head] / 2).exp() / math.sqrt(d)
            place = self.places(height, width).flatten(0, 1)
            angle = torch.cat([place[:, axis, None] * theta[axis] for axis in (0, 1)], -1)
            n = angle.shape[-1]
            pairs = [(i, n + i) if self.second else (2 * i, 2 * i + 1) for i in range(n)]
            for at in (0, 1):
                length = (parts[at].pow(2).sum(-1, keepdim=True) / count + 1e-6).sqrt()
                scaled = gain * parts[at] / length
                parts[at] = scaled.clone()
                for i, (one, other) in enumerate(pairs):
                    turn = torch.polar(torch.ones(len(angle)).double(), angle[:, i])
                    both = torch.complex(scaled[..., one], scaled[..., other]) * turn
                    parts[at][..., one], parts[at][..., other] = both.real, both.imag
            logits = parts[0] @ parts[1].mT
            if spec["type"] == "shifted-window":
                side, shift = spec["window_size"], spec["window_size"] // 2 * (index % 2)
                window = [(i + shift) // side * 1000 + (j + shift) // side for i in range(height) for j in range(width)]
                labels = torch.tensor(window)
                logits = logits.masked_fill(labels[:, None] != labels, -torch.inf)
            out.append(logits.softmax(-1) @ parts[2])
        return torch.cat(out, -1).unflatten(1, (height, width)) @ self.w[f"{name}.out_proj.weight"].T

    def block(self, h: Tensor, name: str, spec: dict[str, Any], emb: Tensor) -> Tensor:
        if spec["type"] != "none":
            h = h + self.attention(h, name, spec, int(name.rpartition(".")[2]), emb)
        return h + self.gated(self.modulated(h, f"{name}.ff", emb), f"{name}.ff")

    def level(self, h: Tensor, name: str, level: int, emb: Tensor) -> Tensor:
        specs = self.model["self_attns"] if self.second else [{"type": "global", "d_head": 64}]
        for k in range(self.model["depths"][level] if self.second else self.model["depth"]):
            h = self.block(h, f"{name}.{k}", specs[level], emb)
        return h

    def __call__(self, x: Tensor, noise: Tensor) -> Tensor:
        emb, patch, kept = self.emb(noise), tuple(self.model["patch_size"]), []
        ends = ("patch_in.proj", "patch_out.proj") if self.second else ("in_proj", "out_proj")
        folded = F.unfold(x, patch, stride=patch)  # channels, rows, columns
        h = folded.mT.unflatten(1, (x.shape[2] // patch[0], -1))
        volume = h.shape[-1]
        order = torch.arange(volume).reshape(x.shape[1], *patch)
        order = (order.permute(1, 2, 0) if self.second else order).flatten()
        h = h[..., order] @ self.w[f"{ends[0]}.weight"].T
        levels = len(self.model["widths"]) if self.second else 1
        for at in range(levels - 1):
            h = self.level(h, f"down_levels.{at}", at, emb)
            kept.append(h)
            h = torch.cat([h[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1) @ self.w[f"merges.{at}.proj.weight"].T
        h = self.level(h, "mid_level" if self.second else "blocks", levels - 1, emb)
        for at in reversed(range(levels - 1)):
            wide = torch.zeros_like(kept[at])
            quarters = iter((h @ self.w[f"splits.{at}.proj.weight"].T).chunk(4, -1))
            for i in (0, 1):
                for j in (0, 1):
                    wide[:, i::2, j::2] = next(quarters)
            share = self.w[f"splits.{at}.fac"]
            h = self.level((1 - share) * kept[at] + share * wide, f"up_levels.{at}", at, emb)
        out = self.norm(h, self.w["out_norm.scale"]) @ self.w[f"{ends[1]}.weight"].T
        back = torch.empty_like(out)
        back[..., order] = out
        return F.fold(back.flatten(1, 2).mT, x.shape[2:], patch, stride=patch)


@pytest.mark.parametrize("model", [HDIT, V1], ids=["hdit", "v1"])
@pytest.mark.parametrize("classes", [0, 2])
def test_transformers_agree_with_their_formula(tmp_path: Path, model: dict[str, Any], classes: int) -> None:
    tensors = random_tensors(model, classes)
    imported = read(write(tmp_path / "net.safetensors", tensors, model, classes))
    labels = torch.tensor([0, 1, 2]) if classes else None  # 2 says nothing
    x = torch.randn(3, 2, *model["input_size"], generator=torch.Generator().manual_seed(1)).double()
    check(imported, Transformer(tensors, model, labels), x, labels)
    if classes:  # no condition is the one that says nothing
        network, last = imported.build_network(), torch.full((3,), classes)
        assert torch.equal(network(x.float(), SIGMA, None), network(x.float(), SIGMA, last))


def test_what_a_file_lacks_or_claims_is_refused_in_words(tmp_path: Path) -> None:
    tensors, path = random_tensors(HDIT), tmp_path / "net.safetensors"

    def with_attention(**spec: Any) -> dict[str, Any]:
        changed = copy.deepcopy(HDIT)
        changed["self_attns"][0] = spec
        return changed

    huge = {"input_size": [4096, 4096]}
    cases: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
        (tensors, with_attention(type="neighborhood", d_head=8), "needs the compiled kernels of NATTEN"),
        (tensors, HDIT | {"self_attns": None}, "needs the compiled kernels of NATTEN"),
        (tensors, with_attention(type="cosine"), "type=cosine is not known here"),
        (tensors, with_attention(type="shifted-window", d_head=8, window_size=3), "Windows of 3 do not divide"),
        (tensors, with_attention(type="shifted-window", d_head=8, window_size=4, extra=1), "argument extra is not"),
        (tensors, HDIT | {"type": "image_v3"}, "type=image_v3 is not known here"),
        (tensors, HDIT | {"has_variance": True}, "has_variance=True is not known here"),
        (tensors, HDIT | {"widths": [8, 1 << 30, 8]}, "does not hold the network that it says"),
        (tensors, HDIT | {"widths": [8, 16]}, "widths and depths have one number, ≥ 1, per level"),
        (tensors, HDIT | {"depths": [2, 1, 1 << 30]}, r"has no tensor mid_level\.1\."),
        (tensors, HDIT | {"mapping_width": 16}, "mapping_width is 8 by its tensors; the configuration says 16"),
        (tensors, HDIT | huge, "no tensor bears the size of the picture out"),
        (tensors, HDIT | {"input_size": [1 << 40, 8]}, "input_size is two sides of 1 to 4096 pixels"),
        (tensors, HDIT | {"input_size": [6, 16]}, "does not hold the network that it says"),
        (tensors, HDIT | {"sigma_data": -1}, "sigma_data is a number, > 0 and finite"),
        (tensors, HDIT | {"surprise": 1}, "the argument surprise is not known here"),
        ({n: v for n, v in tensors.items() if n != "splits.1.fac"}, HDIT, r"has no tensor splits\.1\.fac"),
        (tensors | {"mid_level.0.extra": torch.zeros(1)}, HDIT, "has 1 tensors that its network does not need"),
        (tensors | {"splits.0.fac": torch.zeros(2)}, HDIT, "does not hold the network that it says"),
        (random_tensors(HDIT, 2), HDIT, "does not need: class_emb"),
    ]
    for given, model, message in cases:
        with pytest.raises(ForeignFileError, match=message):
            read(write(path, given, model)).denoiser()


def test_damaged_files_are_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    cases: list[tuple[dict[str, str] | None, str]] = [
        (None, "has no configuration of k-diffusion"),
        ({"config": "[1]"}, "its configuration is a list"),
        ({"config": "{"}, "its configuration is no JSON"),
        ({"config": "[" * 100_000}, "its configuration is no JSON"),
        ({"config": " " * (1 << 21)}, "characters is none"),
        ({"config": '{"model": 3}'}, "has no configuration of k-diffusion"),
    ]
    for metadata, message in cases:
        save_file({"a": torch.zeros(1)}, path, metadata=metadata)
        with pytest.raises(ForeignFileError, match=message):
            read(path)
    claim = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    path.write_bytes(struct.pack("<Q", len(claim)) + claim + b"0" * 64)
    with pytest.raises(ForeignFileError, match="is no whole safetensors file"):
        read(path)


def test_a_checkpoint_becomes_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "net.safetensors", random_tensors(V1, 2), V1, 2)
    monkeypatch.setattr("sys.argv", ["scoresde-import", str(path), f"out={tmp_path / 'run'}"])
    importing.main()
    said = capsys.readouterr().out
    assert "k-diffusion checkpoint, image_transformer_v1" in said and "2 classes" in said
    assert (tmp_path / "run" / "config.yaml").is_file()
