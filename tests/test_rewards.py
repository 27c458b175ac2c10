"Rewards: the protocol and its checks, the registry, mixtures, and the networks on randomly initialised weights."

import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).parent))
from random_pipelines import random_tokenizer

import sdpo_nb.rewards as module
from sdpo_nb.rewards import (
    FunctionReward,
    MixedReward,
    Reward,
    checked,
    colorfulness,
    get_reward,
    jpeg_kilobytes,
    load_network,
    load_text_encoder,
    networks,
    parse_mixture,
    place_reward,
    register_reward,
    rewards,
    warmth,
    world_sized,
)

without_weights = ["jpeg_compressibility", "jpeg_incompressibility", "colorfulness", "warmth"]
with_weights = ["shapes_aesthetic", "shapes_alignment"]


def noise(batch=3, size=32, seed=0):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def random_assets(tmp_path_factory):
    "A folder like the package's `assets`, its weights drawn at random"
    folder = tmp_path_factory.mktemp("assets")
    (folder / "networks").mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, kind in networks.items():
            save_file(kind().state_dict(), folder / "networks" / f"{name}.safetensors")
        tokenizer = random_tokenizer(folder / "tiny" / "tokenizer")
        tokenizer.save_pretrained(folder / "tiny" / "tokenizer")
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=4,
                max_position_embeddings=10,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        ).save_pretrained(folder / "tiny" / "text_encoder")
    return folder


@pytest.fixture
def assets(random_assets, monkeypatch):
    monkeypatch.setattr(module, "assets", random_assets)
    return random_assets


@pytest.fixture
def broken_assets(random_assets, tmp_path, monkeypatch):
    "A copy that a test may damage"
    copy = Path(shutil.copytree(random_assets, tmp_path / "assets"))
    monkeypatch.setattr(module, "assets", copy)
    return copy


@pytest.fixture(autouse=True)
def same_registry(monkeypatch):
    "What a test registers is gone after it"
    monkeypatch.setattr(module, "rewards", dict(rewards))


# The protocol


@pytest.mark.parametrize("name", without_weights + with_weights)
@pytest.mark.parametrize("size", [32, 48, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_reward_keeps_the_protocol(assets, name, size, dtype):
    reward, images = get_reward(name), noise(size=size).to(dtype)
    assert isinstance(reward, Reward) and reward.name == name
    scores = reward(images, ["a red circle", "a blue square", ""])
    assert scores.shape == (3,) and scores.dtype == torch.float32 and scores.isfinite().all()
    assert torch.equal(checked(reward, images, ["a red circle", "a blue square", ""]), scores)


@pytest.mark.parametrize("name", without_weights + with_weights)
def test_a_score_does_not_depend_on_the_rest_of_the_batch(assets, name):
    images, prompts = noise(5), ["a red circle", "a blue square on a cat background", "a dog", "", "the red dog"]
    together = get_reward(name)(images, prompts)
    alone = torch.cat([get_reward(name)(images[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "output, sentence",
    [
        ([1.0, 2.0, 3.0], "a result of type list, not a tensor"),
        ((torch.ones(3), {}), "a result of type tuple, not a tensor"),
        (torch.ones(3, 1), r"shape \[3, 1\] instead of \[3\]"),
        (torch.tensor(1.0), r"shape \[\] instead of \[3\]"),
        (torch.ones(3, dtype=torch.long), "torch.int64 scores"),
        (torch.tensor([1.0, math.inf, math.nan]), r"inf for image 1 \(prompt 'b'; 2 of 3"),
        (torch.full((3,), 1e300, dtype=torch.float64), "inf for image 0"),
    ],
)
def test_checked_names_the_reward_and_what_is_wrong_with_its_output(output, sentence):
    reward = FunctionReward(lambda images, prompts: output, "suspicious")
    with pytest.raises(ValueError, match=f"^reward 'suspicious' returned {sentence}.*: "):
        checked(reward, noise(), list("abc"))


@pytest.mark.parametrize(
    "images, prompts, sentence",
    [
        (noise() * 2 - 1, list("abc"), "images range from -1"),
        (noise() * 255, list("abc"), "images range from"),
        (torch.full((3, 3, 8, 8), math.nan), list("abc"), "images range from nan"),
        ((noise() * 255).byte(), list("abc"), "of torch.uint8"),
        (noise()[0], list("abc"), r"images is \[3, 32, 32\]"),
        (noise()[:0], [], r"images is \[0, 3, 32, 32\]"),
        ("picture.png", ["a"], "images is str"),
        (noise(), ["a"], "prompts is 1 texts for 3 images"),
        (noise(), "abc", "prompts is one string for 3 images"),
    ],
)
def test_checked_says_what_is_wrong_with_its_input(images, prompts, sentence):
    with pytest.raises(ValueError, match=sentence):
        checked(get_reward("warmth"), images, prompts)


def test_checked_detaches():
    images = noise().requires_grad_()
    assert not checked(get_reward("warmth"), images, list("abc")).requires_grad


# The registry


def test_registering_as_decorator_and_as_function():
    @register_reward("dark")
    def dark(images, prompts):
        return -images.mean((1, 2, 3))

    assert register_reward("darker", dark) is dark
    images = noise()
    for name in ("dark", "darker"):
        assert get_reward(name).name == name
        assert torch.equal(get_reward(name)(images, list("abc")), dark(images, list("abc")))


def test_sources_that_make_rewards():
    images = noise()

    def constant(images, prompts, level=1.0):
        return torch.full((len(images),), float(level))

    register_reward("maker", lambda level=1.0: lambda images, prompts: constant(images, prompts, level))

    def required_maker(level):
        return lambda images, prompts: constant(images, prompts, level)

    register_reward("required_maker", required_maker)

    @register_reward("kind")
    class Kind:
        def __init__(self, level=1.0):
            self.level = level

        def __call__(self, images, prompts):
            return constant(images, prompts, self.level)

    register_reward("plain", constant)

    class Net(torch.nn.Module):
        def forward(self, images, prompts):
            return images.mean((1, 2, 3))

    register_reward("net", Net())
    for name in ("maker", "required_maker", "kind", "plain"):
        reward = get_reward(name, level=3)
        assert reward.name == name and isinstance(reward, Reward)
        assert checked(reward, images, list("abc")).tolist() == [3.0] * 3
    assert checked(get_reward("net"), images, list("abc")).shape == (3,)
    with pytest.raises(ValueError, match="unexpected keyword argument 'lvl'"):
        get_reward("kind", lvl=2)
    with pytest.raises(ValueError, match="reward 'required_maker' cannot be called"):
        get_reward("required_maker")


def test_callables_pass_through():
    ready = get_reward("warmth")
    assert get_reward(ready) is ready
    assert get_reward(warmth).name == "warmth"
    assert get_reward(lambda images, prompts: images.mean((1, 2, 3))).name == "lambda"
    assert torch.equal(get_reward("-warmth")(noise(), list("abc")), -ready(noise(), list("abc")))
    assert get_reward(get_reward("jpeg_compressibility").function, quality=20)(noise(), list("abc")).max() < 0


@pytest.mark.parametrize(
    "asked, sentence",
    [
        ("warmht", r"reward 'warmht' is not known \(nearest: 'warmth'\): choose one of .*colorfulness.*warmth"),
        ("shapes-aesthetic", "nearest: 'shapes_aesthetic'"),
        ("", "reward '' is not known"),
        (None, "reward=None is of type NoneType"),
        (3, "reward=3 is of type int"),
        ("0.5*warmht+warmth", "reward 'warmht' is not known"),
        ("0.5*warmth+", "cannot be read from '\\+' on"),
        ("0.5*warmth warmth", "cannot be read from 'warmth' on"),
        ("inf*warmth", r"cannot be read from '\*warmth' on"),
        ("1e999*warmth", "the weight of reward 'warmth' is inf"),
        ({}, "a mixture without rewards"),
        ({"warmth": math.nan}, "the weight of reward 'warmth' is nan"),
        ({"warmth": "1"}, "the weight of reward 'warmth' is '1'"),
        ({"warmht": 1}, "nearest: 'warmth'"),
    ],
)
def test_get_reward_refuses_in_one_sentence(asked, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        get_reward(asked)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["two words", "a+b", "", "0.5*warmth", 3, warmth])
def test_names_that_a_mixture_could_not_hold_are_refused(name):
    with pytest.raises(ValueError, match="cannot name a reward"):
        register_reward(name, warmth)


def test_a_source_must_be_callable():
    with pytest.raises(ValueError, match="the source of reward 'five' is of type int"):
        register_reward("five", 5)


# Mixtures


@pytest.mark.parametrize(
    "text, weights",
    [
        ("0.7*a+0.3*b", dict(a=0.7, b=0.3)),
        (" 2 * a - b ", dict(a=2.0, b=-1.0)),
        ("-a+1e-2*b", dict(a=-1.0, b=0.01)),
        ("a+a", dict(a=2.0)),
        (".5*a_2+1.*b", dict(a_2=0.5, b=1.0)),
    ],
)
def test_mixtures_are_read(text, weights):
    assert parse_mixture(text) == weights


def test_a_mixture_is_the_weighted_sum_and_shows_its_parts():
    images, prompts = noise(), list("abc")
    by_text, by_weights = get_reward("0.7*warmth-0.3*colorfulness"), get_reward({"warmth": 0.7, "colorfulness": -0.3})
    expected = 0.7 * warmth(images, prompts) - 0.3 * colorfulness(images, prompts)
    for mixture in (by_text, by_weights):
        assert isinstance(mixture, MixedReward) and isinstance(mixture, Reward)
        torch.testing.assert_close(checked(mixture, images, prompts), expected)
        assert torch.equal(mixture.parts(images, prompts)["warmth"], warmth(images, prompts))
    assert get_reward(by_text.name).weights == by_text.weights


def test_a_mixture_names_the_component_that_fails():
    register_reward("broken", lambda images, prompts: torch.full((len(images),), math.nan))
    with pytest.raises(ValueError, match="reward 'broken' returned nan"):
        get_reward("warmth+0*broken")(noise(), list("abc"))


def test_options_are_for_single_rewards():
    with pytest.raises(ValueError, match="options belong to single rewards"):
        get_reward("warmth+colorfulness", quality=3)


# What is measured


def test_jpeg_sizes_are_those_of_files(tmp_path):
    from PIL import Image

    image = noise(1)
    Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "picture.jpg", quality=95)
    assert jpeg_kilobytes(image).item() == pytest.approx((tmp_path / "picture.jpg").stat().st_size / 1000)
    assert jpeg_kilobytes(image, 30) < jpeg_kilobytes(image)
    with pytest.raises(ValueError, match="quality=0 is no JPEG quality"):
        jpeg_kilobytes(image, 0)


def test_colorfulness_against_numpy():
    import numpy as np

    images = noise(4, 20)
    for image, score in zip(images.numpy() * 255, colorfulness(images, [""] * 4).tolist()):
        rg, yb = image[0] - image[1], (image[0] + image[1]) / 2 - image[2]
        assert score == pytest.approx(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()), rel=1e-4)


def test_warmth_is_red_minus_blue():
    images = torch.zeros(2, 3, 8, 8)
    images[0, 0], images[1, 2] = 1, 0.5
    assert warmth(images, ["", ""]).tolist() == [1.0, -0.5]


# Networks


def test_loading_draws_no_random_numbers_and_freezes(assets):
    before = torch.get_rng_state()
    reward = get_reward("shapes_alignment")
    oracle = load_network("oracle")
    assert torch.equal(torch.get_rng_state(), before)
    for net in (oracle, reward.model, reward.text_encoder):
        assert not net.training and not any(p.requires_grad for p in net.parameters())
    saved = load_file(assets / "networks" / "oracle.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in oracle.state_dict().items())


def test_half_precision_files_give_float32_networks(broken_assets):
    file = broken_assets / "networks" / "aesthetic.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, file)
    assert {p.dtype for p in load_network("aesthetic").parameters()} == {torch.float32}


def test_alignment_is_ten_cosines(assets):
    reward, images, prompts = get_reward("shapes_alignment"), noise(), ["a red circle", "a red square", "a red circle"]
    tokens = reward.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        text = reward.model.embed_text(reward.text_encoder(tokens).pooler_output)
        expected = 10 * torch.nn.functional.cosine_similarity(reward.model.embed_images(images), text)
    torch.testing.assert_close(reward(images, prompts), expected)


def test_pictures_are_squeezed_with_anti_aliasing():
    "A chessboard of single pixels is grey from afar; without the filter a pattern would appear"
    board = ((torch.arange(62)[:, None] + torch.arange(62)) % 2).float().expand(1, 3, -1, -1)
    assert (world_sized(board) - 0.5).abs().max() < 0.05
    assert torch.equal(world_sized(noise()), noise())


def test_each_caption_is_embedded_once(assets):
    reward, seen = get_reward("shapes_alignment"), []
    reward.text_encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    for _ in range(2):
        reward(noise(4), ["a red circle", "a red square", "a red circle ", ""])
    reward(noise(2), ["a red circle", "a blue dog"])
    assert seen == [1, 1, 1]


def test_an_empty_caption_scores_zero(assets):
    assert get_reward("shapes_alignment")(noise(2), ["", "  "]).tolist() == [0.0, 0.0]


def test_gradients_reach_the_pictures(assets):
    for name in with_weights:
        images = noise(2).requires_grad_()
        get_reward(name)(images, ["a red circle", "a dog"]).sum().backward()
        assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("name", list(networks))
def test_missing_and_damaged_weights_say_so(broken_assets, name):
    file = broken_assets / "networks" / f"{name}.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(OSError, match=f"weights of the {name} network in .* are damaged.*: reinstall sdpo_nb"):
        load_network(name)
    save_file({"something": torch.zeros(2)}, file)
    with pytest.raises(OSError, match="are damaged or of another version"):
        load_network(name)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"weights of the {name} network are missing at .*: reinstall sdpo_nb"):
        load_network(name)


def test_a_damaged_text_encoder_says_so(broken_assets):
    weights = broken_assets / "tiny" / "text_encoder" / "model.safetensors"
    whole = load_file(weights)
    save_file(dict(list(whole.items())[1:]), weights, metadata={"format": "pt"})
    with pytest.raises(OSError, match="text encoder in .* is damaged .*without"):
        load_text_encoder()
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(OSError, match="text encoder in .* is damaged"):
        load_text_encoder()
    for file in weights.parent.iterdir():
        file.unlink()
    weights.parent.rmdir()
    with pytest.raises(FileNotFoundError, match="text_encoder is missing"):
        get_reward("shapes_alignment")


def test_unknown_networks_are_named():
    with pytest.raises(ValueError, match="network 'orakle' is not known: choose one of oracle"):
        load_network("orakle")


def test_a_caption_scores_the_same_whatever_it_came_with():
    "To the last bit, with the shipped networks: a resumed run meets its captions in other batches than an unbroken one"
    from sdpo_nb.shapes import all_captions

    captions = all_captions()
    alone, together = get_reward("shapes_alignment"), get_reward("shapes_alignment")
    one_by_one = torch.cat([alone.embed_captions([caption]) for caption in captions])
    assert torch.equal(one_by_one, together.embed_captions(captions))


def test_a_model_that_scores_can_live_elsewhere():
    class Model:
        name, device = "model", None

        def __call__(self, images, prompts):
            return images.mean((1, 2, 3))

    register_reward("on_a_device", Model)
    mixture, alone = get_reward("on_a_device+0.1*warmth"), get_reward("on_a_device")
    place_reward(mixture, "cuda:1")
    place_reward(alone, "cpu")
    assert mixture.rewards["on_a_device"].device == "cuda:1" and alone.device == "cpu"
    with pytest.raises(ValueError, match="reward_device is 'cuda:1', but the reward 'warmth' runs no model"):
        place_reward(get_reward("warmth"), "cuda:1")
