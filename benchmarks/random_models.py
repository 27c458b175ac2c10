"""Pipelines of the real classes with random weights, as folders: for tests, benchmarks and rehearsals.

    python benchmarks/random_models.py sd_turbo FOLDER               # as stabilityai/sd-turbo, at full width, 5 GB
    python benchmarks/random_models.py sdxl_turbo FOLDER --width 32  # as stabilityai/sdxl-turbo, fit for a laptop
    python benchmarks/random_models.py lcm FOLDER --width 32         # as SimianLuo/LCM_Dreamshaper_v7
    python benchmarks/random_models.py sd35_turbo FOLDER --width 32  # as stabilityai/stable-diffusion-3.5-large-turbo
    python benchmarks/random_models.py flux_schnell FOLDER --width 32  # as black-forest-labs/FLUX.1-schnell
    python benchmarks/random_models.py sana_sprint FOLDER --width 32  # as Efficient-Large-Model/Sana_Sprint_1.6B_1024px
    python benchmarks/random_models.py zimage_turbo FOLDER --width 32  # as Tongyi-MAI/Z-Image-Turbo

`--width` (320) narrows every layer alike; numbers of blocks (of UNets), prediction type and scheduler stay. What these
models paint is noise.
"""

import argparse
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

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
        sample_size=image_size,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=min(32, first),
        **{"latent_channels": 4, **options},
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


def either(width, full, narrow):
    "A number of the published model, or of a narrow one"
    return full if width == full_width else narrow


def clip_words(width):
    "A narrow text tower knows the words of its tokenizer only"
    return dict(vocab_size=either(width, 49408, len(AutoTokenizer.from_pretrained(tokenizer_folder))))


def flow_autoencoder(width, image_size, scaling_factor, shift_factor):
    "16 channels, and no convolution between encoder, latents and decoder"
    plain = dict(use_quant_conv=False, use_post_quant_conv=False)
    numbers = dict(scaling_factor=scaling_factor, shift_factor=shift_factor)
    return autoencoder(width, image_size, latent_channels=16, **numbers, **plain)


def t5(width):
    "The encoder of T5 XXL, 4.8 G parameters, which outweighs most of what it serves"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    sizes = [("vocab_size", 32128), ("d_model", 4096), ("d_kv", 64), ("d_ff", 10240), ("num_layers", 24)]
    narrow = dict(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=37, num_layers=1)
    sizes = {name: either(width, full, narrow[name]) for name, full in sizes}
    heads = either(width, 64, 4)
    return tokenizer, T5EncoderModel(T5Config(num_heads=heads, feed_forward_proj="gated-gelu", **sizes)).eval()


def sd35_turbo(width, image_size):
    "Stable Diffusion 3.5 Large, distilled: a transformer of 8 G parameters, three text encoders"
    heads, head, joint = either(width, 38, 2), either(width, 64, 16), either(width, 4096, 32)
    words = clip_words(width)
    tokenizer, first = text_encoder(
        CLIPTextModelWithProjection, 768, 12, width, projection_dim=either(width, 768, 12), **words
    )
    tokenizer_2, second = text_encoder(
        CLIPTextModelWithProjection, 1280, 32, width, projection_dim=either(width, 1280, 20), **words
    )
    tokenizer_3, third = t5(width)
    network = SD3Transformer2DModel(
        sample_size=image_size // 8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=either(width, 38, 2),
        attention_head_dim=head,
        num_attention_heads=heads,
        joint_attention_dim=joint,
        caption_projection_dim=heads * head,
        pooled_projection_dim=first.config.projection_dim + second.config.projection_dim,
        pos_embed_max_size=either(width, 192, 96),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        network,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        flow_autoencoder(width, image_size, 1.5305, 0.0609),
        *(first, tokenizer, second, tokenizer_2, third, tokenizer_3),
    )


def flux_schnell(width, image_size):
    "FLUX.1, distilled: a transformer of 12 G parameters on latents in packets of 2×2"
    tokenizer, first = text_encoder(CLIPTextModel, 768, 12, width, **clip_words(width))
    tokenizer_2, second = t5(width)
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=either(width, 19, 1),
        num_single_layers=either(width, 38, 1),
        attention_head_dim=either(width, 128, 16),
        num_attention_heads=either(width, 24, 2),
        joint_attention_dim=second.config.d_model,
        pooled_projection_dim=first.config.hidden_size,
        guidance_embeds=False,
        axes_dims_rope=either(width, (16, 56, 56), (4, 6, 6)),
    )
    vae = flow_autoencoder(width, image_size, 0.3611, 0.1159)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return FluxPipeline(scheduler, vae, first, tokenizer, second, tokenizer_2, network)


def deep_autoencoder(width):
    "32 pixels to a latent at full width; a narrow one has two"
    full = dict(
        latent_channels=32,
        encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        encoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
        decoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
        encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
        decoder_layers_per_block=(3, 3, 3, 3, 3, 3),
    )
    narrow = dict(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
    )
    blocks = dict(downsample_block_type="conv", upsample_block_type="interpolate", decoder_act_fns="silu")
    return AutoencoderDC(**either(width, full, narrow), **blocks, decoder_norm_types="rms_norm", scaling_factor=0.41407)


def sana_sprint(width, image_size):
    "SANA 1.6B, distilled: linear attention, guidance as an input, a language model as its text encoder"
    tokenizer, vae = AutoTokenizer.from_pretrained(tokenizer_folder), deep_autoencoder(width)
    text = Gemma2Config(
        vocab_size=either(width, 256000, len(tokenizer)),
        hidden_size=either(width, 2304, 8),
        intermediate_size=either(width, 9216, 64),
        num_hidden_layers=either(width, 26, 1),
        num_attention_heads=either(width, 8, 2),
        num_key_value_heads=either(width, 4, 2),
        head_dim=either(width, 256, 16),
        attn_implementation="eager",
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    network = SanaTransformer2DModel(
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_attention_heads=either(width, 70, 2),
        attention_head_dim=either(width, 32, 8),
        num_layers=either(width, 20, 1),
        num_cross_attention_heads=either(width, 20, 2),
        cross_attention_head_dim=either(width, 112, 8),
        cross_attention_dim=either(width, 2240, 16),
        caption_channels=text.hidden_size,
        sample_size=image_size // 2 ** (len(vae.config.encoder_block_out_channels) - 1),
        patch_size=1,
        guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
        timestep_scale=1000.0,
    )
    return SanaSprintPipeline(tokenizer, Gemma2Model(text), vae, network, SCMScheduler())


def zimage_turbo(width, image_size):
    "Z-Image, distilled: one stream of text and image, a language model with a chat template as its text encoder"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} a{% endfor %}"
    text = Qwen3Config(
        vocab_size=either(width, 151936, len(tokenizer)),
        hidden_size=either(width, 2560, 16),
        intermediate_size=either(width, 9728, 16),
        num_hidden_layers=either(width, 36, 2),
        num_attention_heads=either(width, 32, 2),
        num_key_value_heads=either(width, 8, 2),
        head_dim=either(width, 128, 8),
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    network = ZImageTransformer2DModel(
        dim=either(width, 3840, 32),
        n_layers=either(width, 30, 2),
        n_refiner_layers=either(width, 2, 1),
        n_heads=either(width, 30, 2),
        n_kv_heads=either(width, 30, 2),
        cap_feat_dim=text.hidden_size,
        axes_dims=either(width, [32, 48, 48], [8, 4, 4]),
        axes_lens=either(width, [1536, 512, 512], [1024, 32, 32]),
    )
    with torch.no_grad():  # diffusers leaves these as they come
        network.x_pad_token.normal_(std=0.02), network.cap_pad_token.normal_(std=0.02)
    vae = flow_autoencoder(width, image_size, 0.3611, 0.1159)
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae, Qwen3Model(text), tokenizer, network)


kinds = {
    "sd_turbo": sd_turbo,
    "sdxl_turbo": sdxl_turbo,
    "lcm": lcm,
    "sd35_turbo": sd35_turbo,
    "flux_schnell": flux_schnell,
    "sana_sprint": sana_sprint,
    "zimage_turbo": zimage_turbo,
}


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
