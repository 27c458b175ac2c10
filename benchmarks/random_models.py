"""Pipelines of the real classes with random weights, as folders: for tests, benchmarks and rehearsals.

    python benchmarks/random_models.py sd_turbo FOLDER               # as stabilityai/sd-turbo, at full width, 5 GB
    python benchmarks/random_models.py sdxl_turbo FOLDER --width 32  # as stabilityai/sdxl-turbo, fit for a laptop
    python benchmarks/random_models.py lcm FOLDER --width 32         # as SimianLuo/LCM_Dreamshaper_v7

`--width` (320) narrows every layer alike; numbers of blocks, prediction type and scheduler stay. What these models
paint is noise.
"""

import argparse
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import sdpo_nb

tokenizer_folder = Path(sdpo_nb.__file__).parent / "assets" / "tiny" / "tokenizer"
full_width = 320
betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def autoencoder(width, image_size, **options):
    "Four levels, 8 pixels to a latent"
    first = max(8, 128 * width // full_width // 8 * 8)
    return AutoencoderKL(
        block_out_channels=tuple(first * k for k in (1, 2, 4, 4)),
        layers_per_block=2,
        latent_channels=4,
        sample_size=image_size,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=min(32, first),
        **options,
    )


def text_encoder(kind, full_hidden, layers, width, **options):
    "A CLIP text tower; narrow ones are shallow too"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    hidden = full_hidden * width // full_width
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return tokenizer, kind(
        CLIPTextConfig(
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers if width == full_width else 2,
            num_attention_heads=max(1, hidden // 64),
            hidden_act="gelu",
            **ids,
            **options,
        )
    )


def unet(width, image_size, channels, **options):
    return UNet2DConditionModel(
        sample_size=image_size // 8,
        block_out_channels=tuple(width * k for k in channels),
        norm_num_groups=min(32, width),
        **options,
    )


def turbo_scheduler(kind):
    "That of the published files, with what they say to other samplers and this one does not read"
    scheduler = kind(timestep_spacing="trailing", **betas)
    scheduler.register_to_config(clip_sample=False, set_alpha_to_one=False)
    return scheduler


def sd_turbo(width, image_size):
    "Stable Diffusion 2.1, distilled: 866 M parameters in the UNet at full width"
    tokenizer, text = text_encoder(CLIPTextModel, 1024, 23, width)
    network = unet(
        width,
        image_size,
        (1, 2, 4, 4),
        attention_head_dim=tuple(max(1, width * k // 64) for k in (1, 2, 4, 4)),
        cross_attention_dim=text.config.hidden_size,
        use_linear_projection=True,
    )
    return StableDiffusionPipeline(
        autoencoder(width, image_size),
        text,
        tokenizer,
        network,
        turbo_scheduler(EulerDiscreteScheduler),
        None,
        None,
        requires_safety_checker=False,
    )


def sdxl_turbo(width, image_size):
    "SDXL, distilled: two text encoders, sizes and pooled text as added conditions; a UNet of 2.6 G parameters"
    tokenizer, first = text_encoder(CLIPTextModel, 768, 12, width)
    pooled = 1280 * width // full_width
    tokenizer_2, second = text_encoder(CLIPTextModelWithProjection, 1280, 32, width, projection_dim=pooled)
    network = unet(
        width,
        image_size,
        (1, 2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=tuple(max(1, width * k // 64) for k in (1, 2, 4)),
        transformer_layers_per_block=(1, 2, 10 if width == full_width else 2),
        cross_attention_dim=first.config.hidden_size + second.config.hidden_size,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=pooled + 6 * 256,
    )
    vae = autoencoder(width, image_size, scaling_factor=0.13025, force_upcast=True)
    return StableDiffusionXLPipeline(
        vae, first, second, tokenizer, tokenizer_2, network, turbo_scheduler(EulerAncestralDiscreteScheduler)
    )


def lcm(width, image_size):
    "Stable Diffusion 1.5, consistency-distilled with the guidance scale as an input"
    tokenizer, text = text_encoder(CLIPTextModel, 768, 12, width)
    network = unet(
        width,
        image_size,
        (1, 2, 4, 4),
        attention_head_dim=8,
        cross_attention_dim=text.config.hidden_size,
        time_cond_proj_dim=256,
    )
    scheduler = LCMScheduler(clip_sample=False, set_alpha_to_one=True, original_inference_steps=50, **betas)
    return LatentConsistencyModelPipeline(
        autoencoder(width, image_size), text, tokenizer, network, scheduler, None, None, requires_safety_checker=False
    )


kinds = {"sd_turbo": sd_turbo, "sdxl_turbo": sdxl_turbo, "lcm": lcm}


def make(kind: str, folder, width=full_width, image_size=512, seed=0) -> Path:
    "Write a pipeline with random weights, unless it is there"
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        torch.manual_seed(seed)
        kinds[kind](width, image_size).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("folder")
    parser.add_argument("--width", type=int, default=full_width)
    parser.add_argument("--image_size", type=int, default=512)
    given = parser.parse_args()
    print(make(given.kind, given.folder, given.width, given.image_size))
