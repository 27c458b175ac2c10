"The standard rewards against independent forward passes in the originals' own layouts, on tiny random networks in local folders."

import math
import pickle
import re
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertTokenizer, BlipConfig, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from random_pipelines import WORDS, random_tokenizer

from sdpo_nb import scorers as module
from sdpo_nb.rewards import Reward, checked, get_reward, register_reward, rewards
from sdpo_nb.scorers import (
    Aesthetic,
    CLIPScore,
    HPSv2,
    ImageReward,
    PickScore,
    blip_large,
    clip_mean,
    clip_normalize,
    clip_pixels,
    clip_std,
    open_clip_to_transformers,
    pinned_commits,
    scorers,
    to_bytes,
    vit_h14,
)

PROMPTS = ["a red circle", "a cat on a blue square", "a red circle", "", "the dog"]


def pictures(batch=5, height=40, width=40, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def randomise(network, seed=0):
    "Numbers of a size that makes every part matter, biases and normalisations included"
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = (
            parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator)
            if parameter.ndim
            else parameter.data
        )
    return network.eval().requires_grad_(False)


# The originals, written from what their published modules compute


class OpenClipBlock(nn.Module):
    "open_clip's residual attention block"

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), nn.MultiheadAttention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x, mask=None):  # [tokens, batch, width]
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class OpenClipTransformer(nn.Module):
    def __init__(self, width, heads, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(OpenClipBlock(width, heads) for _ in range(layers))

    def forward(self, x, mask=None):
        x = x.permute(1, 0, 2)
        for block in self.resblocks:
            x = block(x, mask)
        return x.permute(1, 0, 2)


class OpenClipVision(nn.Module):
    def __init__(self, size, patch, width, heads, layers, space):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding, self.positional_embedding = (
            nn.Parameter(torch.zeros(width)),
            nn.Parameter(torch.zeros((size // patch) ** 2 + 1, width)),
        )
        self.ln_pre, self.transformer, self.ln_post = (
            nn.LayerNorm(width),
            OpenClipTransformer(width, heads, layers),
            nn.LayerNorm(width),
        )
        self.proj = nn.Parameter(torch.zeros(width, space))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_embedding + x.new_zeros(len(x), 1, x.shape[-1]), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x)))[:, 0] @ self.proj


class OpenClip(nn.Module):
    "open_clip's CLIP: the text lies at the top level, the picture's tower under `visual`; the end marker has the highest number"

    def __init__(self, vocabulary, context=10, width=32, heads=4, layers=3, space=24):
        super().__init__()
        self.visual = OpenClipVision(28, 14, 48, 3, 2, space)
        self.token_embedding, self.positional_embedding = (
            nn.Embedding(vocabulary, width),
            nn.Parameter(torch.zeros(context, width)),
        )
        self.transformer, self.ln_final = OpenClipTransformer(width, heads, layers), nn.LayerNorm(width)
        self.text_projection, self.logit_scale = (
            nn.Parameter(torch.zeros(width, space)),
            nn.Parameter(torch.tensor(math.log(80.0))),
        )

    def encode_text(self, tokens):  # always padded to the context, as open_clip does
        mask = torch.full((tokens.shape[1],) * 2, -torch.inf).triu_(1)
        x = self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding, mask))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection

    def forward(self, pixels, tokens):
        return (F.normalize(self.visual(pixels), dim=-1) * F.normalize(self.encode_text(tokens), dim=-1)).sum(-1)


class TimmBlock(nn.Module):
    "A block of the vision transformer in timm's layout"

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        (batch, tokens, width), y = x.shape, self.norm1(x)
        q, k, v = self.attn.qkv(y).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.attn.proj(attended)
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class TimmVision(nn.Module):
    def __init__(self, size=32, patch=16, width=32, heads=4, layers=3):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        self.cls_token, self.pos_embed = (
            nn.Parameter(torch.zeros(1, 1, width)),
            nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width)),
        )
        self.blocks, self.norm = (
            nn.ModuleList(TimmBlock(width, heads) for _ in range(layers)),
            nn.LayerNorm(width, eps=1e-6),
        )

    def forward(self, pixels):
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class BertAttention(nn.Module):
    "Attention with its output layer, in BERT's layout; keys and values from what is looked at"

    def __init__(self, width, heads, seen):
        super().__init__()
        self.heads, self.self, self.output = heads, nn.Module(), nn.Module()
        self.self.query, self.self.key, self.self.value = (
            nn.Linear(width, width),
            nn.Linear(seen, width),
            nn.Linear(seen, width),
        )
        self.output.dense, self.output.LayerNorm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x, seen, bias=0.0):
        def split(y):
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.self.query(x)), split(self.self.key(seen)), split(self.self.value(seen))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
        return self.output.LayerNorm(self.output.dense((weights @ v).transpose(1, 2).flatten(2)) + x)


class MedBert(nn.Module):
    "BERT that looks at a picture in every layer; padding gets -10000 before the softmax"

    def __init__(self, vocabulary, width=24, heads=3, layers=2, seen=32):
        super().__init__()
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.word_embeddings, self.embeddings.position_embeddings = (
            nn.Embedding(vocabulary, width),
            nn.Embedding(40, width),
        )
        self.embeddings.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.embeddings.register_buffer("position_ids", torch.arange(40)[None])
        self.encoder.layer = nn.ModuleList()
        for _ in range(layers):
            layer = nn.Module()
            layer.attention, layer.crossattention = (
                BertAttention(width, heads, width),
                BertAttention(width, heads, seen),
            )
            layer.intermediate, layer.output = nn.Module(), nn.Module()
            layer.intermediate.dense, layer.output.dense = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            layer.output.LayerNorm = nn.LayerNorm(width, eps=1e-12)
            self.encoder.layer.append(layer)

    def forward(self, tokens, mask, seen):
        e, bias = self.embeddings, (1.0 - mask[:, None, None].float()) * -10000.0
        x = e.LayerNorm(e.word_embeddings(tokens) + e.position_embeddings(e.position_ids[:, : tokens.shape[1]]))
        for layer in self.encoder.layer:
            x = layer.crossattention(layer.attention(x, x, bias), seen)
            x = layer.output.LayerNorm(layer.output.dense(F.gelu(layer.intermediate.dense(x))) + x)
        return x


class Head(nn.Module):
    "The linear head with its dropouts"

    def __init__(self, width, hidden=(16, 12, 8, 4)):
        super().__init__()
        a, b, c, d = hidden
        self.layers = nn.Sequential(
            nn.Linear(width, a),
            nn.Dropout(0.2),
            nn.Linear(a, b),
            nn.Dropout(0.2),
            nn.Linear(b, c),
            nn.Dropout(0.1),
            nn.Linear(c, d),
            nn.Linear(d, 1),
        )

    def forward(self, x):
        return self.layers(x)


class OriginalImageReward(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.blip, self.mlp = nn.Module(), Head(24)
        self.blip.visual_encoder, self.blip.text_encoder = TimmVision(), MedBert(vocabulary)
        self.blip.vision_proj, self.blip.text_proj = nn.Linear(32, 8), nn.Linear(24, 8)  # in the checkpoint, not used

    def forward(self, pixels, tokens, mask):
        return (
            self.mlp(self.blip.text_encoder(tokens, mask, self.blip.visual_encoder(pixels))[:, 0])[:, 0]
            - 0.16717362830052426
        ) / 1.0333394966054072


# Tiny folders


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Folders in the layouts that are published, and the networks that they hold"
    root = tmp_path_factory.mktemp("scorers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = random_tokenizer(root / "vocabulary")
        config = CLIPConfig(
            text_config=dict(
                hidden_size=32,
                intermediate_size=128,
                num_hidden_layers=3,
                num_attention_heads=4,
                vocab_size=len(tokenizer),
                max_position_embeddings=10,
                hidden_act="gelu",
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            ),
            vision_config=dict(
                hidden_size=48,
                intermediate_size=192,
                num_hidden_layers=2,
                num_attention_heads=3,
                image_size=28,
                patch_size=14,
                hidden_act="gelu",
                projection_dim=24,
            ),
            projection_dim=24,
        )
        for name in ("clip", "hps"):
            tokenizer.save_pretrained(root / name)
            config.save_pretrained(root / name)
        clip, open_clip, head = (
            randomise(CLIPModel(config), 1),
            randomise(OpenClip(len(tokenizer)), 2),
            randomise(Head(24), 3),
        )
        clip.save_pretrained(root / "clip")
        torch.save(head.state_dict(), root / "clip" / "aesthetic-model.pth")
        torch.save(open_clip.state_dict(), root / "hps" / "HPS_v2_compressed.pt")
        torch.save({"state_dict": open_clip.state_dict()}, root / "hps" / "HPS_v2.1_compressed.pt")

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        (root / "imagereward").mkdir()
        (root / "imagereward" / "vocab.txt").write_text("\n".join(words))
        BlipConfig(
            vision_config=dict(
                hidden_size=32,
                intermediate_size=128,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=32,
                patch_size=16,
                layer_norm_eps=1e-6,
            ),
            text_config=dict(
                hidden_size=24,
                encoder_hidden_size=32,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=3,
                vocab_size=len(words) + 2,
                max_position_embeddings=40,
                bos_token_id=2,
                sep_token_id=3,
            ),
        ).save_pretrained(root / "imagereward")
        original = randomise(OriginalImageReward(len(words) + 2), 4)
        torch.save(original.state_dict(), root / "imagereward" / "ImageReward.pt")
    return SimpleNamespace(
        root=root,
        clip=clip,
        open_clip=open_clip,
        head=head,
        imagereward=original,
        tokenizer=tokenizer,
        config=config,
        bert=BertTokenizer.from_pretrained(root / "imagereward"),
    )


@pytest.fixture
def builders(made):
    "The registered names with their tiny folders"
    root = made.root
    return {
        "aesthetic": dict(model=root / "clip", head=root / "clip"),
        "imagereward": dict(model=root / "imagereward"),
        "hpsv2": dict(model=root / "hps"),
        "hpsv2.1": dict(model=root / "hps"),
        "pickscore": dict(model=root / "clip"),
        "clipscore": dict(model=root / "clip"),
    }


@pytest.fixture(autouse=True)
def same_registry(monkeypatch):
    monkeypatch.setattr("sdpo_nb.rewards.rewards", dict(rewards))


NAMES = ["aesthetic", "imagereward", "hpsv2", "hpsv2.1", "pickscore", "clipscore"]


# Preprocessing


def by_pil(images, size):
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    arrays = [Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy()) for image in images]
    return processor(images=arrays, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize(
    "height, width, size",
    [
        (512, 512, 224),
        (224, 224, 224),
        (32, 32, 224),
        (512, 768, 224),
        (768, 512, 224),
        (300, 511, 224),
        (225, 777, 224),
        (100, 70, 28),
    ],
)
def test_pictures_are_shrunk_as_pil_does(height, width, size):
    "Within 1 of 255 levels; two ties in a row, which PIL's integers round the other way, may make it 2 at one value in ten thousand"
    images = (255 * pictures(1, height, width)).round() / 255
    smooth = (255 * F.interpolate(pictures(1, 9, 9), (height, width), mode="bicubic").clamp(0, 1)).round() / 255
    for images in (images, smooth):
        mine, theirs = clip_normalize(clip_pixels(images, size)), by_pil(images, size)
        difference = ((mine - theirs) * 255 * torch.tensor(clip_std).view(3, 1, 1)).round().abs()
        assert mine.shape == (1, 3, size, size)
        assert (
            difference.max() <= 2
            and (difference == 2).float().mean() < 1e-4
            and (difference == 1).float().mean() < 0.03
        )


def test_without_the_filter_it_would_be_far_off():
    images = (255 * pictures(1, 512, 512)).round() / 255
    plain = clip_normalize((255 * F.interpolate(images, (224, 224), mode="bicubic").clamp(0, 1)).round() / 255)
    assert ((plain - by_pil(images, 224)).abs().amax() * 255 * min(clip_std)) > 40


def test_pixels_are_bytes_and_cut_off():
    pixels = clip_pixels(3 * pictures(2, 50, 70) - 1, 28)
    assert pixels.min() >= 0 and pixels.max() <= 1 and torch.equal(pixels, (pixels * 255).round() / 255)
    assert clip_pixels(pictures().bfloat16(), 28).dtype == torch.float32
    torch.testing.assert_close(clip_normalize(torch.tensor(clip_mean).view(1, 3, 1, 1)), torch.zeros(1, 3, 1, 1))


def test_the_gradient_passes_the_rounding():
    values = torch.tensor([0.1003, 0.5, 0.77], requires_grad=True)
    to_bytes(values).sum().backward()
    assert values.grad.tolist() == [1.0, 1.0, 1.0]


# Agreement with the originals


@pytest.mark.parametrize("version, name", [("2.0", "hpsv2"), ("2.1", "hpsv2.1")])
def test_hpsv2_against_open_clip(made, version, name):
    images = pictures(5, 40, 60)
    reward = HPSv2(made.root / "hps", version=version)
    ends = made.tokenizer(PROMPTS, padding="max_length", max_length=10, return_tensors="pt")
    tokens = ends.input_ids * ends.attention_mask  # open_clip pads with 0
    expected = made.open_clip(clip_normalize(clip_pixels(images, 28)), tokens)
    assert reward.name == name and expected.std() > 0.05
    torch.testing.assert_close(reward(images, PROMPTS), expected, rtol=0, atol=1e-5)


def test_every_tensor_of_open_clip_finds_its_place(made):
    mapped, wanted = open_clip_to_transformers(made.open_clip.state_dict()), made.clip.state_dict()
    assert {name: tensor.shape for name, tensor in mapped.items()} == {
        name: tensor.shape for name, tensor in wanted.items()
    }
    assert sum(tensor.numel() for tensor in mapped.values()) == sum(p.numel() for p in made.open_clip.parameters())


def test_half_precision_checkpoints_and_safetensors_and_a_file_itself(made, tmp_path):
    half = {name: tensor.half() for name, tensor in made.open_clip.state_dict().items()}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((made.root / "hps" / name).read_bytes())
    save_file({name: tensor.contiguous() for name, tensor in half.items()}, tmp_path / "HPS_v2_compressed.safetensors")
    reward = HPSv2(tmp_path)
    assert {p.dtype for p in reward.network.parameters()} == {torch.float32}
    torch.testing.assert_close(
        reward(pictures(), PROMPTS), HPSv2(made.root / "hps")(pictures(), PROMPTS), rtol=0, atol=2e-2
    )
    assert torch.equal(
        HPSv2(str(tmp_path / "HPS_v2_compressed.safetensors"))(pictures(), PROMPTS), reward(pictures(), PROMPTS)
    )


def test_imagereward_against_the_original(made):
    images, prompts = (
        pictures(5, 50, 32),
        ["a red circle", "a cat on a blue square", "", "the dog and a dog", " ".join(["a red dog"] * 20)],
    )
    read = made.bert(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    expected = made.imagereward(clip_normalize(clip_pixels(images, 32)), read.input_ids, read.attention_mask)
    assert expected.std() > 0.01
    torch.testing.assert_close(ImageReward(made.root / "imagereward")(images, prompts), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        ImageReward(made.root / "imagereward", scale="raw")(images, prompts),
        expected * 1.0333394966054072 + 0.16717362830052426,
        rtol=0,
        atol=1e-5,
    )


def test_imagereward_reads_35_tokens(made):
    reward, long = ImageReward(made.root / "imagereward"), " ".join(["a red dog"] * 11)
    assert torch.equal(reward(pictures(1), [long]), reward(pictures(1), [long + " on a blue circle"]))
    assert not torch.equal(reward(pictures(1), [long]), reward(pictures(1), [long[:-3] + "cat"]))


def test_aesthetic_against_the_original(made):
    images = pictures(5, 28, 28)
    embeddings = made.clip.get_image_features(clip_normalize(clip_pixels(images, 28))).pooler_output.numpy()
    expected = made.head(torch.from_numpy(embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)))[:, 0]
    reward = Aesthetic(made.root / "clip", made.root / "clip")
    torch.testing.assert_close(reward(images, PROMPTS), expected, rtol=0, atol=1e-5)
    assert torch.equal(reward(images, PROMPTS), reward(images, ["x"] * 5))
    assert torch.equal(
        Aesthetic(made.root / "clip", made.root / "clip" / "aesthetic-model.pth")(images, PROMPTS),
        reward(images, PROMPTS),
    )


def test_pickscore_and_clipscore_against_clips_own_logits(made):
    images = pictures()

    def logits(texts):
        tokens = made.tokenizer(texts, padding=True, return_tensors="pt")
        return made.clip(**tokens, pixel_values=clip_normalize(clip_pixels(images, 28))).logits_per_image.diagonal()

    factor = made.clip.logit_scale.exp()
    torch.testing.assert_close(
        PickScore(made.root / "clip")(images, PROMPTS), logits(PROMPTS), rtol=0, atol=2e-4
    )  # 1e-5 of the factor 14
    torch.testing.assert_close(
        PickScore(made.root / "clip", scale="cosine")(images, PROMPTS), logits(PROMPTS) / factor, rtol=0, atol=1e-5
    )
    cosines = logits(["a dog " + prompt for prompt in PROMPTS]) / factor
    torch.testing.assert_close(
        CLIPScore(made.root / "clip", prefix="a dog ", scale="cosine")(images, PROMPTS), cosines, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        CLIPScore(made.root / "clip", prefix="a dog ")(images, PROMPTS), 2.5 * cosines.clamp(min=0), rtol=0, atol=3e-5
    )
    assert (cosines < 0).any() and (cosines > 0).any()


def test_clipscore_begins_with_the_authors_words(made):
    assert CLIPScore(made.root / "clip").prefix == "A photo depicts "


def test_published_sizes():
    "ViT-H/14 has 986 million parameters, BLIP's two halves together 445 million"
    with torch.device("meta"):
        clip, config = CLIPModel(CLIPConfig(**vit_h14)), BlipConfig(**blip_large)
        blip = (
            module.BlipVisionModel(config.vision_config),
            module.BlipTextModel(config.text_config, add_pooling_layer=False),
        )
    assert (
        round(sum(p.numel() for p in clip.parameters()) / 1e6) == 986
        and round(sum(p.numel() for part in blip for p in part.parameters()) / 1e6) == 445
    )
    assert (
        clip.logit_scale.shape == ()
        and clip.visual_projection.weight.shape == (1024, 1280)
        and clip.text_projection.weight.shape == (1024, 1024)
    )


# What all of them share


@pytest.mark.parametrize("name", NAMES)
def test_every_scorer_keeps_the_protocol(builders, name):
    before = torch.get_rng_state()
    reward = get_reward(name, **builders[name])
    assert torch.equal(torch.get_rng_state(), before)  # loading draws no random numbers
    assert isinstance(reward, Reward) and reward.name == name
    assert not reward.network.training and not any(p.requires_grad for p in reward.network.parameters())
    scores = checked(reward, pictures().bfloat16().float(), PROMPTS)
    assert scores.shape == (5,) and scores.dtype == torch.float32 and scores.std() > 0
    torch.testing.assert_close(
        checked(get_reward(name, **builders[name], chunk=2), pictures().bfloat16(), PROMPTS), scores, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("name", NAMES)
def test_pictures_arrive_in_chunks(builders, name):
    reward, seen = get_reward(name, **builders[name], chunk=2), []
    tower = reward.network.vision_model if hasattr(reward.network, "vision_model") else next(reward.network.children())
    tower.register_forward_pre_hook(
        lambda _, args, options: seen.append(len(args[0] if args else options["pixel_values"])), with_kwargs=True
    )
    reward(pictures(), PROMPTS)
    assert seen == [2, 2, 1]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "aesthetic"])
def test_each_prompt_is_tokenised_once(builders, name):
    reward, asked = get_reward(name, **builders[name], chunk=2), []
    tokenizer = reward.tokenizer
    reward.tokenizer = lambda texts, **options: asked.extend(texts) or tokenizer(texts, **options)
    for _ in range(2):
        reward(pictures(), PROMPTS)
    assert len(asked) == 4 and len(set(asked)) == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_score_does_not_depend_on_the_company(builders, name):
    together = get_reward(name, **builders[name])(pictures(), PROMPTS)
    alone = torch.cat([get_reward(name, **builders[name])(pictures()[i : i + 1], PROMPTS[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_pictures(builders, name):
    images = pictures().requires_grad_()
    get_reward(name, **builders[name])(images, PROMPTS).sum().backward()
    assert images.grad.abs().sum() > 0


def test_a_given_device_is_used_and_scores_come_back(builders):
    reward = get_reward("pickscore", **builders["pickscore"], device="cpu")
    assert torch.device(reward.device).type == "cpu" and reward(pictures(), PROMPTS).device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(builders, name):
    expected = get_reward(name, **builders[name])(pictures(), PROMPTS)
    for images, options in ((pictures().cuda(), {}), (pictures(), dict(device="cuda"))):
        scores = get_reward(name, **builders[name], **options)(images, PROMPTS)
        assert scores.device == images.device
        torch.testing.assert_close(scores.cpu(), expected, rtol=0, atol=1e-2)


# The registry


def test_the_registry_lists_them():
    assert set(NAMES) == set(scorers) <= set(rewards)


def test_nothing_is_loaded_before_it_is_asked_for():
    import subprocess
    import sys

    code = "import sys, sdpo_nb.rewards as r; assert 'pickscore' in r.rewards and 'sdpo_nb.scorers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_mixtures_of_them(builders, monkeypatch):
    "With local folders as the defaults, and with variants under names of their own"
    monkeypatch.setattr(
        module, "scorers", {name: partial(scorers[name], **options) for name, options in builders.items()}
    )
    mixture = get_reward("0.5*aesthetic+0.5*pickscore-2*hpsv2.1")
    parts = {
        name: get_reward(name, **builders[name])(pictures(), PROMPTS) for name in ("aesthetic", "pickscore", "hpsv2.1")
    }
    torch.testing.assert_close(
        checked(mixture, pictures(), PROMPTS),
        0.5 * parts["aesthetic"] + 0.5 * parts["pickscore"] - 2 * parts["hpsv2.1"],
    )
    assert (
        mixture.name == "0.5*aesthetic+0.5*pickscore-2*hpsv2.1" and get_reward(mixture.name).weights == mixture.weights
    )
    register_reward("mine", partial(PickScore, builders["pickscore"]["model"], scale="cosine"))
    torch.testing.assert_close(
        get_reward("2*mine")(pictures(), PROMPTS),
        2 * PickScore(builders["pickscore"]["model"], scale="cosine")(pictures(), PROMPTS),
    )


# One sentence for everything that goes wrong


@pytest.mark.parametrize(
    "name, options, sentence",
    [
        (
            "pickscore",
            dict(scale="percent"),
            "reward 'pickscore', scale='percent' is not known: choose 'official' or 'cosine'",
        ),
        ("clipscore", dict(scale=1), "reward 'clipscore', scale=1 is not known"),
        ("imagereward", dict(scale="cosine"), "choose 'official' or 'raw'"),
        ("hpsv2", dict(version="3"), "version='3' is not known: choose '2.0' or '2.1'"),
        ("aesthetic", dict(chunk=0), "reward 'aesthetic', chunk=0 is no number of pictures"),
        ("pickscore", dict(models="x"), "unexpected keyword argument 'models'"),
    ],
)
def test_wrong_options(builders, name, options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        get_reward(name, **builders[name] | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["nowhere", "./nowhere", "/nowhere/at/all", "~/nowhere", "some/folder/deep"])
@pytest.mark.parametrize(
    "name, field",
    [
        ("pickscore", "model"),
        ("hpsv2", "model"),
        ("imagereward", "model"),
        ("aesthetic", "head"),
        ("clipscore", "tokenizer"),
    ],
)
def test_paths_that_lead_nowhere(builders, name, field, place):
    with pytest.raises(
        OSError, match=f"reward '{name}', {field}: '{place}' is no folder or file here and no hub id: give a path"
    ):
        get_reward(name, **builders[name] | {field: place})


@pytest.mark.parametrize(
    "name, field, file",
    [
        ("hpsv2", "model", "HPS_v2_compressed.pt"),
        ("hpsv2.1", "model", "HPS_v2.1_compressed.pt"),
        ("imagereward", "model", "ImageReward.pt"),
        ("aesthetic", "head", "aesthetic-model.pth"),
    ],
)
def test_a_folder_without_the_file(builders, tmp_path, name, field, file):
    with pytest.raises(
        OSError, match=f"reward '{name}', {field}: the folder .* holds no .* or {file}: copy the file there"
    ):
        get_reward(name, **builders[name] | {field: tmp_path})


class ConnectError(Exception):
    "What the hub's HTTP client raises without a network."


def answer(status):
    return SimpleNamespace(status_code=status, headers={}, request=None, url="https://huggingface.co")


FAILURES = [
    (lambda: GatedRepoError("403", response=answer(403)), "its licence must be accepted"),
    (lambda: RepositoryNotFoundError("404", response=answer(404)), "the hub has no such model"),
    (lambda: RevisionNotFoundError("404", response=answer(404)), "has no revision 'v9': give 'main'"),
    (lambda: RemoteEntryNotFoundError("404 Client Error.", response=answer(404)), "lacks a file that is needed"),
    (lambda: LocalEntryNotFoundError("offline"), "the hub cannot be reached"),
    (lambda: ConnectError("offline"), "the hub cannot be reached"),
]


@pytest.mark.parametrize("failure, message", FAILURES, ids=["gated", "unknown", "revision", "file", "cache", "network"])
@pytest.mark.parametrize(
    "name, field, revision",
    [("hpsv2", "model", "revision"), ("imagereward", "model", "revision"), ("aesthetic", "head", "head_revision")],
)
def test_hub_failures_with_raw_weights(builders, monkeypatch, name, field, revision, failure, message):
    def unreachable(*arguments, **options):
        raise failure()

    monkeypatch.setattr(module, "hf_hub_download", unreachable)
    with pytest.raises(OSError, match=f"^reward '{name}', {field}: .*'someone/model'.*{message}") as caught:
        get_reward(name, **builders[name] | {field: "someone/model", revision: "v9"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("failure, message", FAILURES, ids=["gated", "unknown", "revision", "file", "cache", "network"])
@pytest.mark.parametrize(
    "name, field",
    [("pickscore", "model"), ("aesthetic", "model"), ("clipscore", "tokenizer"), ("imagereward", "tokenizer")],
)
def test_hub_failures_with_transformers(builders, monkeypatch, name, field, failure, message):
    def unreachable(*arguments, **options):
        raise failure()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # nothing else that is asked goes out
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", unreachable)
    monkeypatch.setattr("transformers.utils.hub.snapshot_download", unreachable)
    revision = "revision" if field == "model" else "tokenizer_revision"
    with pytest.raises(OSError, match=f"^reward '{name}', {field}: .*'someone/model'") as caught:
        get_reward(name, **builders[name] | {field: "someone/model", revision: "v9"})
    assert "\n" not in str(caught.value)


def test_revisions_reach_the_hub(builders, made, monkeypatch):
    asked = []

    def download(repository, file, revision):
        asked.append((repository, file, revision))
        return str(made.root / "hps" / file)

    monkeypatch.setattr(module, "hf_hub_download", download)
    HPSv2(version="2.1", revision="abc", tokenizer=made.root / "hps")
    HPSv2(tokenizer=made.root / "hps")
    HPSv2("someone/model", tokenizer=made.root / "hps")
    assert asked == [
        ("xswu/HPSv2", "HPS_v2.1_compressed.pt", "abc"),
        ("xswu/HPSv2", "HPS_v2_compressed.pt", pinned_commits["xswu/HPSv2"]),
        ("someone/model", "HPS_v2_compressed.pt", "main"),
    ]


def test_what_is_loaded_by_default_is_pinned():
    "Every hub id that the code names, and no other"
    named = Counter(re.findall(r'"([\w-]+/[\w.-]+)"', Path(module.__file__).read_text(encoding="utf-8")))
    assert (
        named.keys() == pinned_commits.keys()
        and min(named.values()) > 1
        and all(re.fullmatch("[0-9a-f]{40}", commit) for commit in pinned_commits.values())
    )


@pytest.mark.parametrize(
    "lost", ["visual.transformer.resblocks.1.attn.in_proj_weight", "logit_scale", "text_projection"]
)
def test_incomplete_open_clip_weights(made, tmp_path, lost):
    state = made.open_clip.state_dict()
    del state[lost]
    made.config.save_pretrained(tmp_path)
    torch.save({"state_dict": state}, tmp_path / "HPS_v2_compressed.pt")
    with pytest.raises(
        OSError, match="reward 'hpsv2', model: the weights in .* lack . of the network's tensors, the first being"
    ):
        HPSv2(tmp_path, tokenizer=made.root / "hps")


@pytest.mark.parametrize(
    "lost, sentence",
    [
        ("blip.visual_encoder.pos_embed", "lack 1 .*'embeddings.position_embedding'"),
        ("mlp.layers.6.bias", "lacks layers.6"),
        ("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight", "lack 1 .*crossattention.self.key.weight"),
    ],
)
def test_incomplete_imagereward_weights(made, tmp_path, lost, sentence):
    state = made.imagereward.state_dict()
    del state[lost]
    torch.save(state, tmp_path / "ImageReward.pt")
    (tmp_path / "config.json").write_bytes((made.root / "imagereward" / "config.json").read_bytes())
    with pytest.raises(OSError, match=f"reward 'imagereward', model: .*{sentence}"):
        ImageReward(tmp_path, tokenizer=made.root / "imagereward")


def test_incomplete_transformers_weights(made, tmp_path):
    made.config.save_pretrained(tmp_path)
    save_file(
        {
            name: tensor
            for name, tensor in load_file(made.root / "clip" / "model.safetensors").items()
            if "layers.0" not in name
        },
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    for kind in (partial(PickScore, tokenizer=made.root / "clip"), partial(Aesthetic, head=made.root / "clip")):
        with pytest.raises(OSError, match="the weights in .* lack"):
            kind(tmp_path)


def test_weights_of_another_size_or_with_more_layers(made, tmp_path):
    state = made.open_clip.state_dict()
    made.config.save_pretrained(tmp_path)
    torch.save(state | {"visual.proj": torch.zeros(48, 20)}, tmp_path / "HPS_v2_compressed.pt")
    with pytest.raises(
        OSError, match=r"have the shape \[20, 48\] for 'visual_projection.weight', where the network has \[24, 48\]"
    ):
        HPSv2(tmp_path, tokenizer=made.root / "hps")
    more = {
        name.replace("resblocks.1", "resblocks.2"): tensor
        for name, tensor in state.items()
        if name.startswith("visual.transformer.resblocks.1")
    }
    torch.save(state | more, tmp_path / "HPS_v2_compressed.pt")
    with pytest.raises(OSError, match="have more layers than the network"):
        HPSv2(tmp_path, tokenizer=made.root / "hps")
    torch.save(Head(20).state_dict(), tmp_path / "aesthetic-model.pth")
    with pytest.raises(OSError, match="reads 20 numbers and gets 24"):
        Aesthetic(made.root / "clip", tmp_path)


class Surprise:
    def __reduce__(self):
        return (print, ("code was run",))


@pytest.mark.parametrize(
    "content, sentence",
    [
        (lambda: pickle.dumps({"state_dict": Surprise()}), "holds more than tensors"),
        (lambda: b"", "is damaged|is no PyTorch file"),
        (lambda: b"<html>not found</html>", "is no PyTorch file"),
    ],
    ids=["code", "empty", "html"],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_that_could_run_code_and_rubbish(made, tmp_path, capsys, content, sentence):
    (tmp_path / "HPS_v2_compressed.pt").write_bytes(content())
    with pytest.raises(OSError, match=f"reward 'hpsv2', model: .*({sentence})") as caught:
        HPSv2(tmp_path, tokenizer=made.root / "hps")
    assert "code was run" not in capsys.readouterr().out and "\n" not in str(caught.value)


def test_a_torch_file_with_code_inside_is_not_opened(made, tmp_path, capsys):
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "more": Surprise()}, tmp_path / "ImageReward.pt")
    with pytest.raises(OSError, match="holds more than tensors"):
        ImageReward(tmp_path)
    assert "code was run" not in capsys.readouterr().out


def test_files_that_are_no_weights(made, tmp_path):
    torch.save([1, 2], tmp_path / "ImageReward.pt")
    with pytest.raises(OSError, match="is no dictionary of tensors"):
        ImageReward(tmp_path)
    whole = (made.root / "imagereward" / "ImageReward.pt").read_bytes()
    (tmp_path / "ImageReward.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="reward 'imagereward', model: .*is damaged"):
        ImageReward(tmp_path)
    (tmp_path / "ImageReward.safetensors").write_bytes(b"rubbish")
    with pytest.raises(OSError, match="is damaged"):
        ImageReward(tmp_path)


def test_a_damaged_safetensors_file_of_transformers(made, tmp_path):
    made.config.save_pretrained(tmp_path)
    whole = (made.root / "clip" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="reward 'pickscore', model: .*is damaged"):
        PickScore(tmp_path, tokenizer=made.root / "clip")


def test_tokenizers(made, tmp_path):
    "A folder without one falls back to the published one; one without a vocabulary, or with too large a one, is refused"
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="reward 'pickscore', tokenizer: "):
        PickScore(made.root / "clip", tokenizer=tmp_path / "empty")
    with pytest.raises(OSError, match="reward 'clipscore', tokenizer: "):
        CLIPScore(made.root / "clip", tokenizer=tmp_path / "empty")
    small = dict(made.config.text_config.to_dict(), vocab_size=20)
    CLIPModel(
        CLIPConfig(text_config=small, vision_config=made.config.vision_config.to_dict(), projection_dim=24)
    ).save_pretrained(tmp_path / "small")
    with pytest.raises(OSError, match="tokenizer: it has .* tokens and the network 20"):
        PickScore(tmp_path / "small", tokenizer=made.root / "clip")
