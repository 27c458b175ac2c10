"Tiny, randomly initialised, real diffusers pipelines, built offline, and what tests of several rooms do with them."

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = "a the red blue circle square on background cat dog".split()

# The numbers every Stable Diffusion model shares, with SD-Turbo's trailing spacing.
SCHEDULER = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
    timestep_spacing="trailing",
)


def random_tokenizer(folder: Path, model_max_length: int = 10) -> CLIPTokenizer:
    "A CLIP tokenizer of letters and a few whole words; the files it is read from are written to `folder`."
    pieces, merges = {}, {}
    for letter in map(chr, range(ord("a"), ord("z") + 1)):
        pieces.setdefault(letter)
        pieces.setdefault(letter + "</w>")
    for word in WORDS:  # byte-pair merges grow a word from the left: c a -> ca, ca t</w> -> cat</w>
        left = word[0]
        for position, letter in enumerate(word[1:], start=2):
            right = letter + ("</w>" if position == len(word) else "")
            merges.setdefault(f"{left} {right}")
            left += right
            pieces.setdefault(left)
    for special in ("<|startoftext|>", "<|endoftext|>"):
        pieces.setdefault(special)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=model_max_length)


def random_unet(width: int = 16, sample_size: int = 8) -> UNet2DConditionModel:
    "A conditional UNet of two levels with attention in the lower one and in the middle."
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(width, 2 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=8,
    )


def random_vae() -> AutoencoderKL:
    "An autoencoder that turns 4×8×8 latents into 16×16 pictures."
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
        scaling_factor=0.3,
    )


def random_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    "A one-layer CLIP text encoder that fits the tokenizer."
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def random_stable_diffusion(
    folder, *, prediction_type: str = "epsilon", seed: int = 0, **scheduler_config
) -> StableDiffusionPipeline:
    "A random `StableDiffusionPipeline`, also saved in `folder` in the diffusers layout."
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = random_tokenizer(folder / "tokenizer")
        pipeline = StableDiffusionPipeline(
            unet=random_unet(),
            vae=random_vae(),
            text_encoder=random_text_encoder(tokenizer),
            tokenizer=tokenizer,
            scheduler=DDIMScheduler(**(SCHEDULER | dict(prediction_type=prediction_type) | scheduler_config)),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


def nudged(policy, size=0.3):
    "The policy with a LoRA that really changes its output."
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return policy


def stock_pipeline(folder, **scheduler):
    "What a user has: diffusers alone, with DDIM where the scheduler's settings are given."
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if scheduler:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **scheduler)
    return pipeline


def stock_images(pipeline, prompts, seeds, num_steps, **arguments):
    "Pictures of a stock pipeline, without guidance."
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = dict(num_inference_steps=num_steps, guidance_scale=0.0, generator=generators, output_type="pt")
    return pipeline(prompts, **options, **arguments).images


# A block's place among the numbered ones of the original programs, for one layer in a block; then names inside it.
ORIGINAL_UNET = [
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{2 * int(m[1]) + 2}.0.op"),
    (r"^down_blocks\.(\d)\.(r|a)\w+\.0\.", lambda m: f"input_blocks.{2 * int(m[1]) + 1}.{'ra'.index(m[2])}."),
    (r"^up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"output_blocks.{2 * int(m[1]) + 1}.2."),
    (r"^up_blocks\.(\d)\.(r|a)\w+\.(\d)\.", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[3])}.{'ra'.index(m[2])}."),
    (r"^mid_block\.(r|a)\w+\.(\d)\.", lambda m: f"middle_block.{1 if m[1] == 'a' else 2 * int(m[2])}."),
    (r"\.norm1\.(?=\w+$)(?<!s\.0\.norm1\.)", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
    (r"^(\w+\.\d+(?:\.\d)?)\.norm2\.", r"\1.out_layers.0."),
]
ORIGINAL_VAE = [
    (r"conv_norm_out", "norm_out"),
    (r"encoder\.down_blocks\.(\d)\.resnets\.", r"encoder.down.\1.block."),
    (r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"decoder\.up_blocks\.(\d)\.resnets\.", lambda m: f"decoder.up.{1 - int(m[1])}.block."),
    (r"decoder\.up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"decoder.up.{1 - int(m[1])}.upsample."),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0\.", "proj_out."),
]


def single_file(pipeline, path):
    "The weights of a `random_stable_diffusion` in one file, under the names of the original program."

    def renamed(network, rules, prefix):
        for key, tensor in network.state_dict().items():
            for pattern, name in rules:
                key = re.sub(pattern, name, key)
            yield prefix + key, tensor.contiguous()

    parts = [
        (pipeline.unet, ORIGINAL_UNET, "model.diffusion_model."),
        (pipeline.vae, ORIGINAL_VAE, "first_stage_model."),
    ]
    parts.append((pipeline.text_encoder, [(r"^text_model\.", "")], "cond_stage_model.transformer.text_model."))
    save_file({key: tensor for part in parts for key, tensor in renamed(*part)}, path)
    return path
