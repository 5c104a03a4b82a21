"""Text encoders: padding and batch-mates change nothing, order does, and the whole denoiser hears a sentence."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scoresde import EDM, VPSDE, AdaptiveODE, ClassifierFree, DenoisingLoss, Preconditioned, Rng, Sampler
from scoresde.diffusion.conditions import join, nothing
from scoresde.nn import MLP, DiT, FrozenText, TextTransformer, UNet

TEXT = torch.tensor([[3, 1, 2, -1, -1], [4, -1, -1, -1, -1], [1, 2, 3, 4, 0], [-1, -1, -1, -1, -1]])


def told(text: Tensor, kind: str) -> Tensor:
    """(B,) what samples are about: +1 where token 1 comes before token 2, else −1; for networks that learn more slowly
    +1 where token 1 is there.
    """
    if kind != "mlp":
        return 2.0 * (text == 1).any(1) - 1
    places = [[row.index(k) for k in (1, 2)] for row in text.tolist()]
    return torch.tensor([1.0 if first < second else -1.0 for first, second in places])


def network(kind: str, text: TextTransformer | FrozenText, **more) -> torch.nn.Module:
    if kind == "mlp":
        return MLP((2,), width=32, depth=1, text=text, **more)
    if kind == "unet":
        return UNet((1, 2, 2), width=16, multipliers=(1,), blocks=1, text=text, **more)
    return DiT((1, 4, 4), width=16, depth=1, heads=2, text=text, **more)


def shaken(kind: str, text: TextTransformer | FrozenText) -> torch.nn.Module:
    """A network whose output is not zero."""
    made = network(kind, text, cond_dropout=0.5).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("kind", ["mlp", "unet", "dit"])
def test_padding_and_batch_mates_change_nothing(kind: str) -> None:
    torch.manual_seed(0)
    net = shaken(kind, TextTransformer(5, width=8, depth=2, heads=2)).double().requires_grad_(False)
    x, noise = torch.randn(4, *net.event_shape, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    together = net(x, noise, {"text": TEXT}).detach()
    for k, row in enumerate(TEXT):
        alone = row[row >= 0][None] if k < 3 else row[None, :1]
        torch.testing.assert_close(net(x[k : k + 1], noise[k : k + 1], alone)[0], together[k], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net(x[3:], noise[3:], None), together[3:])  # an empty sentence is none
    assert float((net(x, noise, {"text": TEXT.flip(0)}) - together).abs().flatten(1).max(1).values.min()) > 1e-3
    swapped = TEXT[:1, [1, 0, 2, 3, 4]]  # order is heard
    assert float((net(x[:1], noise[:1], swapped) - together[:1]).abs().max()) > 1e-6
    assert torch.equal(net.null({"text": TEXT})["text"], torch.full((1, 5), -1))


@pytest.mark.parametrize("kind", ["mlp", "unet", "dit"])
def test_training_hears_words(kind: str) -> None:
    """Samples at +1 or −1 by the order of two words, or by which is there: after training x̂_0 at much noise has the
    sign that was told, guidance leads away from a sentence, and a sample that is encoded under one sentence comes back
    under it and becomes the other under the other."""
    torch.manual_seed(0)
    net = network(kind, TextTransformer(5, width=16, depth=1, heads=2), cond_dropout=0.1)
    model = Preconditioned(net, VPSDE(), EDM())
    loss, optimizer = DenoisingLoss(model), torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(150):
        text = torch.stack([torch.randperm(3 if kind == "mlp" else 4)[:3] for _ in range(64)])
        x0 = told(text, kind).reshape(-1, *[1] * len(net.event_shape)) * torch.ones(len(text), *net.event_shape)
        optimizer.zero_grad()
        loss(x0, {"text": text}, rng=Rng(step)).mean().backward()
        optimizer.step()
    model.eval()
    text = torch.tensor([[0, 1, 2], [2, 0, 1]] if kind == "mlp" else [[0, 1, 2], [2, 0, 3]])
    x = torch.zeros(2, *net.event_shape)
    with torch.no_grad():
        found = model(x, torch.tensor(1.0), {"text": text})
        assert float((found.x0.flatten(1).mean(1) * told(text, kind)).min()) > 0.5
        plain = model(x, torch.tensor(1.0), {"text": torch.tensor([[2, 1, -1]] * 2)})
        negative = ClassifierFree(model, 3.0, null={"text": torch.tensor([[2, 1]])})  # of another length
        guided = negative(x, torch.tensor(1.0), {"text": text})
    torch.testing.assert_close(guided.x0, 3 * found.x0 - 2 * plain.x0, rtol=1e-4, atol=1e-4)
    flow = AdaptiveODE(rtol=1e-5, atol=1e-5)
    x0 = told(text, kind).reshape(-1, *[1] * (x.ndim - 1)) + 0.1 * torch.randn(x.shape)
    decode = Sampler(flow, steps=1, denoise=False)
    latent = flow.encode(model, x0, cond={"text": text})
    torch.testing.assert_close(decode(model, latent, cond={"text": text}), x0, rtol=0, atol=1e-3)
    other = decode(model, latent, cond={"text": text.flip(0)})
    assert float((other.flatten(1).mean(1) * told(text, kind)).max()) < 0


def test_conditions_join_texts_of_two_lengths() -> None:
    both = join({"text": torch.tensor([[1, 2, 3]])}, {"text": torch.tensor([[4]])})
    assert both["text"].tolist() == [[1, 2, 3], [4, -1, -1]]
    assert nothing(torch.tensor([[1, 2]]), 7).tolist() == [[-1, -1]] and nothing(torch.tensor([1]), 7).tolist() == [7]


def test_what_is_no_text_is_refused() -> None:
    net = network("unet", TextTransformer(5, width=8, depth=1, heads=2))
    x, noise = torch.zeros(2, 1, 2, 2), torch.zeros(2)
    for text, message in (
        (torch.zeros(2, 3), r"A text is integers of shape \(2, L\)"),
        (torch.zeros(3, 3, dtype=torch.long), r"A text is integers of shape \(2, L\)"),
        (torch.full((2, 3), 5), r"Tokens are in 0 … 4, or -1 behind the end; got 5 to 5"),
        (torch.full((2, 3), -2), r"got -2 to -2"),
    ):
        with pytest.raises(ValueError, match=message):
            net(x, noise, {"text": text})
    with pytest.raises(ValueError, match=r"This network is unconditional: .*cond_tokens or text"):
        UNet((1, 2, 2), width=8, multipliers=(1,), blocks=1)(x, noise, {"text": torch.zeros(2, 3, dtype=torch.long)})
    with pytest.raises(ValueError, match="there can be no others: take cond_tokens=0"):
        network("unet", TextTransformer(5, width=8, heads=2), cond_tokens=3)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_frozen_encoder_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    """Tokens and summary as the package makes them of the padded batch, from a cache that copies share; nothing of it
    is trained or saved."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "clip":
        config = transformers.CLIPTextConfig(
            vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, eos_token_id=6
        )
        theirs = transformers.CLIPTextModel(config).eval()
    else:
        config = transformers.T5Config(vocab_size=7, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        theirs = transformers.T5EncoderModel(config).eval()
    theirs.save_pretrained(tmp_path)
    text, there = torch.tensor([[1, 6, 0], [1, 4, 6]]), torch.tensor([[True, True, False], [True, True, True]])
    own = FrozenText(str(tmp_path), vocabulary=7)
    with torch.no_grad():
        expected = theirs(input_ids=text, attention_mask=there.long())
    tokens, summary = own(text, there)
    torch.testing.assert_close(tokens, expected.last_hidden_state)
    pooled = expected.get("pooler_output")
    if pooled is None:
        pooled = torch.stack([row[mask].mean(0) for row, mask in zip(expected.last_hidden_state, there, strict=True)])
    torch.testing.assert_close(summary, pooled)
    assert len(own._frozen.made) == 2 and not own.state_dict() and not list(own.parameters())
    net = copy.deepcopy(shaken("unet", own))
    assert net.conditioning.text._frozen is own._frozen
    assert net(torch.zeros(2, 1, 2, 2), torch.zeros(2), torch.where(there, text, -1)).isfinite().all()
    with pytest.raises(ValueError, match="knows 7 tokens, and the tokenizer of the captions has 9"):
        FrozenText(str(tmp_path), vocabulary=9)
    with pytest.raises(ValueError, match="holds no text encoder"):
        FrozenText(str(tmp_path / "nothing"))
