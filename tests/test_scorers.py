"The standard rewards against the originals' own layouts, on tiny random networks in local folders."

import math
import re
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import LocalEntryNotFoundError
from random_pipelines import WORDS, random_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertTokenizer, BlipConfig, BlipTextModel, BlipVisionModel, CLIPConfig, CLIPModel

from sdpo_nb import hub, scorers as module
from sdpo_nb.hub import clip_normalize, clip_pixels, pinned_commits
from sdpo_nb.rewards import Reward, checked, get_reward, register_reward, rewards
from sdpo_nb.scorers import (
    Aesthetic,
    CLIPScore,
    HPSv2,
    ImageReward,
    PickScore,
    blip_large,
    open_clip_to_transformers,
    scorers,
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
    "open_clip's CLIP: the text at the top level, the picture's tower under `visual`; the end marker is the last number"

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


def tiny_clip(tokenizer):
    text = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, hidden_act="gelu")
    text |= dict(vocab_size=len(tokenizer), max_position_embeddings=10)
    text |= dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    seen = dict(hidden_size=48, intermediate_size=192, num_hidden_layers=2, num_attention_heads=3, hidden_act="gelu")
    seen |= dict(image_size=28, patch_size=14, projection_dim=24)
    return CLIPConfig(text_config=text, vision_config=seen, projection_dim=24)


def tiny_blip(vocabulary):
    seen = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, layer_norm_eps=1e-6)
    seen |= dict(image_size=32, patch_size=16)
    text = dict(
        hidden_size=24, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, encoder_hidden_size=32
    )
    text |= dict(vocab_size=vocabulary, max_position_embeddings=40, bos_token_id=2, sep_token_id=3)
    return BlipConfig(vision_config=seen, text_config=text)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Folders in the layouts that are published, and the networks that they hold"
    root, of = tmp_path_factory.mktemp("scorers"), SimpleNamespace()
    of.root, words = root, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        of.tokenizer = random_tokenizer(root / "vocabulary")
        of.config = tiny_clip(of.tokenizer)
        for name in ("clip", "hps"):
            of.tokenizer.save_pretrained(root / name)
            of.config.save_pretrained(root / name)
        of.clip, of.head = randomise(CLIPModel(of.config), 1), randomise(Head(24), 3)
        of.open_clip = randomise(OpenClip(len(of.tokenizer)), 2)
        of.clip.save_pretrained(root / "clip")
        torch.save(of.head.state_dict(), root / "clip" / "aesthetic-model.pth")
        torch.save(of.open_clip.state_dict(), root / "hps" / "HPS_v2_compressed.pt")
        torch.save({"state_dict": of.open_clip.state_dict()}, root / "hps" / "HPS_v2.1_compressed.pt")
        (root / "imagereward").mkdir()
        (root / "imagereward" / "vocab.txt").write_text("\n".join(words))
        tiny_blip(len(words) + 2).save_pretrained(root / "imagereward")
        of.imagereward = randomise(OriginalImageReward(len(words) + 2), 4)
        torch.save(of.imagereward.state_dict(), root / "imagereward" / "ImageReward.pt")
    of.bert = BertTokenizer.from_pretrained(root / "imagereward")
    return of


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
# the others are slow: what they share is in the notebook, and what is special about each
EACH = [name if name == "imagereward" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


def near(scores, expected, size=1.0):
    "Up to float32's rounding of what a score is made of: cosines of unit vectors, times `size`, or a layer's outputs"
    assert scores.shape == expected.shape
    assert (scores - expected).abs().max() <= 1e-4 * max(size, expected.abs().max().item())


# Agreement with the originals


@pytest.mark.parametrize("version, name", [("2.0", "hpsv2"), ("2.1", "hpsv2.1")])
def test_hpsv2_against_open_clip(made, version, name):
    images = pictures(5, 40, 60)
    reward = HPSv2(made.root / "hps", version=version)
    ends = made.tokenizer(PROMPTS, padding="max_length", max_length=10, return_tensors="pt")
    tokens = ends.input_ids * ends.attention_mask  # open_clip pads with 0
    expected = made.open_clip(clip_normalize(clip_pixels(images, 28)), tokens)
    assert reward.name == name and expected.std() > 0.05
    near(reward(images, PROMPTS), expected)


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
    near(ImageReward(made.root / "imagereward")(images, prompts), expected)
    raw = ImageReward(made.root / "imagereward", scale="raw")(images, prompts)
    near(raw, expected * 1.0333394966054072 + 0.16717362830052426)


def test_a_head_in_a_file_of_its_own(made):
    reward = Aesthetic(made.root / "clip", made.root / "clip")
    same = Aesthetic(made.root / "clip", made.root / "clip" / "aesthetic-model.pth")
    assert torch.equal(same(pictures(), PROMPTS), reward(pictures(), PROMPTS))


def test_clipscore_puts_words_in_front(made):
    texts = ["a dog " + prompt for prompt in PROMPTS]
    tokens = made.tokenizer(texts, padding=True, return_tensors="pt")
    logits = made.clip(**tokens, pixel_values=clip_normalize(clip_pixels(pictures(), 28))).logits_per_image.diagonal()
    cosines = logits / made.clip.logit_scale.exp()
    prefixed = partial(CLIPScore, made.root / "clip", prefix="a dog ")
    near(prefixed(scale="cosine")(pictures(), PROMPTS), cosines)
    near(prefixed()(pictures(), PROMPTS), 2.5 * cosines.clamp(min=0), size=2.5)
    assert (cosines < 0).any() and (cosines > 0).any()


def test_clipscore_begins_with_the_authors_words(made):
    assert CLIPScore(made.root / "clip").prefix == "A photo depicts "


def test_published_sizes():
    "ViT-H/14 has 986 million parameters, BLIP's two halves together 445 million"
    with torch.device("meta"):
        clip, config = CLIPModel(CLIPConfig(**vit_h14)), BlipConfig(**blip_large)
        blip = BlipVisionModel(config.vision_config), BlipTextModel(config.text_config, add_pooling_layer=False)
    assert round(sum(p.numel() for p in clip.parameters()) / 1e6) == 986
    assert round(sum(p.numel() for part in blip for p in part.parameters()) / 1e6) == 445
    assert clip.logit_scale.shape == () and clip.visual_projection.weight.shape == (1024, 1280)
    assert clip.text_projection.weight.shape == (1024, 1024)


# What all of them share


@pytest.mark.parametrize("name", EACH)
def test_every_scorer_keeps_the_protocol(builders, name):
    before = torch.get_rng_state()
    reward = get_reward(name, **builders[name])
    assert torch.equal(torch.get_rng_state(), before)  # loading draws no random numbers
    assert isinstance(reward, Reward) and reward.name == name
    assert not reward.network.training and not any(p.requires_grad for p in reward.network.parameters())
    scores = checked(reward, pictures().bfloat16().float(), PROMPTS)
    assert scores.shape == (5,) and scores.dtype == torch.float32 and scores.std() > 0
    near(checked(get_reward(name, **builders[name], chunk=2), pictures().bfloat16(), PROMPTS), scores)


@pytest.mark.parametrize("name", EACH)
def test_pictures_arrive_in_chunks(builders, name):
    reward, seen = get_reward(name, **builders[name], chunk=2), []
    tower = reward.network.vision_model if hasattr(reward.network, "vision_model") else next(reward.network.children())
    tower.register_forward_pre_hook(
        lambda _, args, options: seen.append(len(args[0] if args else options["pixel_values"])), with_kwargs=True
    )
    reward(pictures(), PROMPTS)
    assert seen == [2, 2, 1]


@pytest.mark.parametrize("name", EACH[1:])
def test_each_prompt_is_tokenised_once(builders, name):
    reward, asked = get_reward(name, **builders[name], chunk=2), []
    tokenizer = reward.tokenizer
    reward.tokenizer = lambda texts, **options: asked.extend(texts) or tokenizer(texts, **options)
    for _ in range(2):
        reward(pictures(), PROMPTS)
    assert len(asked) == 4 and len(set(asked)) == 4


@pytest.mark.parametrize("name", EACH)
def test_a_score_does_not_depend_on_the_company(builders, name):
    together = get_reward(name, **builders[name])(pictures(), PROMPTS)
    alone = torch.cat([get_reward(name, **builders[name])(pictures()[i : i + 1], PROMPTS[i : i + 1]) for i in range(5)])
    near(together, alone)


@pytest.mark.parametrize("name", EACH)
def test_gradients_reach_the_pictures(builders, name):
    images = pictures().requires_grad_()
    get_reward(name, **builders[name])(images, PROMPTS).sum().backward()
    assert images.grad.abs().sum() > 0


def test_a_given_device_is_used_and_scores_come_back(builders):
    reward = get_reward("pickscore", **builders["pickscore"], device="cpu")
    assert torch.device(reward.device).type == "cpu" and reward(pictures(), PROMPTS).device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", EACH)
def test_on_a_gpu(builders, name):
    expected = get_reward(name, **builders[name])(pictures(), PROMPTS)
    for images, options in ((pictures().cuda(), {}), (pictures(), dict(device="cuda"))):
        scores = get_reward(name, **builders[name], **options)(images, PROMPTS)
        assert scores.device == images.device
        torch.testing.assert_close(scores.cpu(), expected, rtol=0, atol=1e-2)


# The registry


def test_the_registry_lists_them():
    assert set(NAMES) == set(scorers) <= set(rewards)


@pytest.mark.slow
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
    near(
        checked(mixture, pictures(), PROMPTS),
        0.5 * parts["aesthetic"] + 0.5 * parts["pickscore"] - 2 * parts["hpsv2.1"],
    )
    assert (
        mixture.name == "0.5*aesthetic+0.5*pickscore-2*hpsv2.1" and get_reward(mixture.name).weights == mixture.weights
    )
    register_reward("mine", partial(PickScore, builders["pickscore"]["model"], scale="cosine"))
    near(
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


SETTINGS = [
    ("pickscore", "model"),
    ("hpsv2", "model"),
    ("hpsv2.1", "model"),
    ("imagereward", "model"),
    ("aesthetic", "model"),
    ("aesthetic", "head"),
    ("clipscore", "tokenizer"),
    ("hpsv2", "tokenizer"),
    ("imagereward", "tokenizer"),
]


@pytest.mark.parametrize("name, field", SETTINGS)
def test_paths_that_lead_nowhere(builders, name, field):
    with pytest.raises(OSError, match=f"^reward '{name}', {field}: './nowhere' is no folder or file here"):
        get_reward(name, **builders[name] | {field: "./nowhere"})


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


@pytest.mark.parametrize("name, field", SETTINGS)
def test_failures_of_the_hub_name_the_setting(builders, monkeypatch, name, field):
    "tests/test_hub.py tells the failures apart"

    def unreachable(*arguments, **options):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # nothing else that is asked goes out
    for place in ("sdpo_nb.hub.hf_hub_download", "transformers.utils.hub.hf_hub_download"):
        monkeypatch.setattr(place, unreachable)
    monkeypatch.setattr("transformers.utils.hub.snapshot_download", unreachable)
    with pytest.raises(OSError, match=f"^reward '{name}', {field}: .*'someone/model'") as caught:
        get_reward(name, **builders[name] | {field: "someone/model"})
    assert "\n" not in str(caught.value)


def test_revisions_reach_the_hub(builders, made, monkeypatch):
    asked = []

    def download(repository, file, revision):
        asked.append((repository, file, revision))
        return str(made.root / "hps" / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    HPSv2(version="2.1", revision="abc", tokenizer=made.root / "hps")
    HPSv2(tokenizer=made.root / "hps")
    HPSv2("someone/model", tokenizer=made.root / "hps")
    assert asked == [
        ("xswu/HPSv2", "HPS_v2.1_compressed.pt", "abc"),
        ("xswu/HPSv2", "HPS_v2_compressed.pt", pinned_commits["xswu/HPSv2"]),
        ("someone/model", "HPS_v2_compressed.pt", "main"),
    ]


def test_what_is_loaded_by_default_is_pinned():
    "Every hub id that the scorers name, and no other"
    source = Path(module.__file__).read_text(encoding="utf-8")
    named = Counter(re.findall(r'"([\w-]+/[\w.-]+)"', source))
    assert named.keys() == pinned_commits.keys()
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in pinned_commits.values())


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


def test_a_tokenizer_that_does_not_fit(made, tmp_path):
    "One without a vocabulary, or with too large a one"
    (tmp_path / "empty").mkdir()
    for kind in (PickScore, CLIPScore):
        with pytest.raises(OSError, match="reward '.*', tokenizer: "):
            kind(made.root / "clip", tokenizer=tmp_path / "empty")
    small = dict(made.config.text_config.to_dict(), vocab_size=20)
    config = CLIPConfig(text_config=small, vision_config=made.config.vision_config.to_dict(), projection_dim=24)
    CLIPModel(config).save_pretrained(tmp_path / "small")
    with pytest.raises(OSError, match="tokenizer: it has .* tokens and the network 20"):
        PickScore(tmp_path / "small", tokenizer=made.root / "clip")
