"""Pipelines of diffusers in the size of a test, with random weights that matter."""

from __future__ import annotations

import string
from pathlib import Path

import diffusers
import torch
import transformers

LENGTH = 16
LETTERS = string.ascii_lowercase + string.digits + ",."


def tokenizer(pad: str = "<|endoftext|>"):
    """CLIP's, that knows letters and digits and joins none."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad, model_max_length=LENGTH)


def encoder(tokens, kind=transformers.CLIPTextModel, width: int = 16):
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, projection_dim=8, bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
    )  # fmt: skip
    return shaken(kind(config))


def shaken(model):
    """With weights of a size that no norm hides."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5 * (parameter.ndim == 1), 0.15)
    return model.eval()


def autoencoder(channels: int = 4, **more):
    return shaken(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, layers_per_block=1,
            up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=2, latent_channels=channels, **more,
        )
    )  # fmt: skip


def unet(**more):
    usual = {
        "sample_size": 4, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16),
        "norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return shaken(diffusers.UNet2DConditionModel(**(usual | more)))


def scheduler(prediction: str = "epsilon"):
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False,
        set_alpha_to_one=False, prediction_type=prediction,
    )  # fmt: skip


def stable_diffusion(prediction: str = "epsilon", **more):
    """Of version 1, or with v and linear projections of version 2."""
    words = tokenizer()
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(), unet=unet(**more), scheduler=scheduler(prediction), text_encoder=encoder(words),
        tokenizer=words, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def xl(**more):
    """With two encoders, that pad by other tokens, and added conditions."""
    words, others = tokenizer(), tokenizer("a")
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "cross_attention_dim": 24}
    added |= {"projection_class_embeddings_input_dim": 8 + 6 * 4, "transformer_layers_per_block": (1, 2)}
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(), unet=unet(use_linear_projection=True, **added), scheduler=scheduler(),
        text_encoder=encoder(words, width=16), tokenizer=words,
        text_encoder_2=encoder(others, transformers.CLIPTextModelWithProjection, 8), tokenizer_2=others,
        add_watermarker=False, **more,
    )  # fmt: skip


def three(t5: bool = True):
    """Of flow matching, by a transformer, with two encoders of CLIP and one of T5 or none."""
    words = [tokenizer(), tokenizer()]
    clips = [encoder(each, transformers.CLIPTextModelWithProjection, 8) for each in words]
    long = None
    if t5:
        config = transformers.T5Config(
            vocab_size=len(words[0]), d_model=24, d_kv=4, d_ff=8, num_layers=1, num_heads=2, pad_token_id=0
        )
        long = shaken(transformers.T5EncoderModel(config))
    network = diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=8, pooled_projection_dim=16,
        pos_embed_max_size=4,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=shaken(network), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clips[0], tokenizer=words[0], text_encoder_2=clips[1], tokenizer_2=words[1], text_encoder_3=long,
        tokenizer_3=tokenizer("a") if t5 else None,
    )  # fmt: skip


def saved(pipe, folder: Path) -> Path:
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return folder
