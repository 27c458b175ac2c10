"""The judge begins as the CLIP it came from, learns from comparisons, and comes back from its files as it was."""

import json

import pytest
import sdpo_nb.preference as preference
import torch
from huggingface_hub import _CACHED_NO_EXIST
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from random_pipelines import random_tokenizer
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from sdpo_nb.hub import clip_normalize, clip_pixels
from sdpo_nb.models import load_policy
from sdpo_nb.preference import (
    PreferencePairs,
    StepAwarePreference,
    StepModulation,
    bradley_terry_loss,
    build_preference,
    fit,
    get_preference,
    load_preference,
    make_preference_pairs,
    modulation_file,
    predicted_pictures,
    preference_accuracy,
    preference_command,
    save_preference,
    score_pairs,
    train_preference_model,
    train_tiny_preference,
)
from sdpo_nb.rewards import assets

PROMPTS = ["a red circle", "a cat"]
SMALL = dict(image_size=16, patch_size=4, hidden_size=32, intermediate_size=64)
SMALL |= dict(num_hidden_layers=2, num_attention_heads=2)
CLIP_H = dict(image_size=56, patch_size=14, hidden_size=80, intermediate_size=320, hidden_act="gelu")
CLIP_H |= dict(num_hidden_layers=3, num_attention_heads=5)  # CLIP-H: 224, 14, 1280, 5120, 32, 16


def redness(images, prompts):
    return (images[:, 0] - images[:, 2]).mean((1, 2))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return random_tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def policy(pipeline):
    return load_policy(pipeline, device="cpu")


def random_clip(tokenizer, vision=SMALL, seed=0):
    "A CLIP model with random weights, large enough ones that nothing is nearly constant"
    marks = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=24)
    text |= dict(vocab_size=len(tokenizer), max_position_embeddings=10, **marks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CLIPConfig(text_config=text, vision_config={**vision, "projection_dim": 24}, projection_dim=24)
        return CLIPModel(config).eval()


@pytest.fixture
def judge(tokenizer):
    "Its modulations do something"
    judge = StepAwarePreference(random_clip(tokenizer), tokenizer).eval().requires_grad_(False)
    for number, (_, last) in enumerate(judge.modulation.blocks):
        last.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    return judge


def pictures(count, size=16, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def close(first, second, tolerance=1e-5):
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


# --- the loss


def test_scores_far_apart_do_not_overflow():
    far = torch.tensor([1000.0]), torch.tensor([-1000.0])
    assert bradley_terry_loss(*far) < 1e-6 and bradley_terry_loss(*far[::-1]).isfinite()


@pytest.mark.parametrize("target", [None, [1.0, 1.0, 0.0]])
def test_comparisons_that_do_not_count(target):
    "Weights say how often a comparison counts: whole numbers are copies, fractions keep their mean"
    first, second = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 1.5])
    target = None if target is None else torch.tensor(target)
    copies = torch.tensor([0, 2, 2, 2])
    pick = lambda x: None if x is None else x[copies]
    repeated = bradley_terry_loss(pick(first), pick(second), pick(target))
    for scale in (1, 0.01):
        close(bradley_terry_loss(first, second, target, scale * torch.tensor([1.0, 0.0, 3.0])), repeated)


def test_fitting_needs_an_update():
    with pytest.raises(ValueError, match="iterations is 0; give at least one update."):
        fit([torch.zeros(1, requires_grad=True)], None, 0, 1e-3)


# --- the network


@pytest.mark.parametrize("conditioned", [True, False])
@torch.no_grad()
def test_it_begins_as_a_clip_of_any_shape(tokenizer, conditioned):
    "The notebook has the same for the shipped judge's own shape"
    clip, images, prompts = random_clip(tokenizer, CLIP_H), pictures(3, 56), ["a cat", "a red circle", ""]
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    words = dict(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    expected = clip(**words, pixel_values=clip_normalize(images))
    model, timesteps = StepAwarePreference(clip, tokenizer, conditioned).eval(), torch.tensor([0, 500, 999])
    assert torch.equal(model.embed_images(images, timesteps), expected.image_embeds)
    close(model(images, timesteps, prompts), expected.logits_per_image.diagonal())


def test_the_tiny_one_begins_with_the_text_encoder_of_its_policy(tiny_folder):
    policy = load_policy("tiny", device="cpu")
    first, second, other = (build_preference(policy, seed=seed).clip for seed in (0, 0, 1))
    theirs, ours = policy.pipeline.text_encoder.state_dict(), first.text_model.state_dict()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name.removeprefix("text_model.")], tensor)
    image = [model.vision_model.embeddings.patch_embedding.weight for model in (first, second, other)]
    assert torch.equal(*image[:2]) and not torch.equal(*image[1:])
    assert str(tiny_folder) not in json.dumps(first.config.to_dict())


def test_time_reaches_every_block_once_trained(tokenizer):
    "Each modulation gets a gradient at the very start, although nothing is modulated yet"
    judge = StepAwarePreference(random_clip(tokenizer), tokenizer)
    judge(pictures(4), torch.tensor([1, 300, 600, 900]), PROMPTS * 2).std().backward()
    for _, last in [*judge.modulation.blocks, judge.modulation.pooled]:
        assert last.weight.grad.abs().max() > 0 and last.bias.grad.view(-1, 32).abs().amax(1).min() > 0


@torch.no_grad()
def test_scores_do_not_depend_on_the_company(judge):
    images, timesteps, prompts = pictures(5), torch.tensor([0, 10, 200, 500, 999]), PROMPTS * 2 + ["a dog"]
    together = judge(images, timesteps, prompts)
    alone = [judge(images[i : i + 1], timesteps[i : i + 1], prompts[i : i + 1]) for i in range(5)]
    close(together, torch.cat(alone))
    assert together.dtype == torch.float32


# --- files


@torch.no_grad()
def test_initialised_from_a_clip_folder(tokenizer, tmp_path):
    "The way from PickScore: a folder (or hub id) in transformers' layout, pictures of any size"
    clip, images = random_clip(tokenizer, CLIP_H), pictures(2, 128)
    clip.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    model, tokens = load_preference(str(tmp_path)), tokenizer(PROMPTS, padding="max_length", return_tensors="pt")
    words = dict(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    expected = clip(**words, pixel_values=clip_normalize(clip_pixels(images, 56))).logits_per_image.diagonal()
    close(model(images, torch.tensor([10, 800]), PROMPTS), expected)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert model.plain and not load_preference().plain
    with pytest.warns(UserWarning, match="preference_model is .*, a plain CLIP, not trained on predictions"):
        get_preference(str(tmp_path), redness)


@torch.no_grad()
def test_saved_and_loaded(judge, tmp_path):
    images, timesteps = pictures(2), torch.tensor([100, 900])
    expected = judge(images, timesteps, PROMPTS)
    close(load_preference(str(save_preference(judge, tmp_path)))(images, timesteps, PROMPTS), expected, 1e-6)
    CLIPModel.from_pretrained(tmp_path)  # it is a plain CLIP folder all the same
    unaware = StepAwarePreference(
        judge.clip, judge.tokenizer, conditioned=False
    ).eval()  # trained, not told the timestep
    again = load_preference(str(save_preference(unaware, tmp_path / "untold")))
    assert again.modulation is None and not again.plain and not torch.equal(again(images, timesteps, PROMPTS), expected)
    close(again(images, timesteps, PROMPTS), unaware(images, timesteps, PROMPTS), 1e-6)
    half = load_preference(str(save_preference(judge.half(), tmp_path / "half")))
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    close(half(images, timesteps, PROMPTS), expected, 2e-2)


@pytest.fixture
def hub(judge, tmp_path, monkeypatch):
    "A judge under the id me/judge; what was asked for, and the answer to the next question about its modulation"
    folder, load = save_preference(judge, tmp_path / "hub"), preference.load_pretrained
    hub = dict(asked=[], answer=folder / modulation_file)

    def download(repository, name):
        hub["asked"].append((repository, name))
        if isinstance(hub["answer"], Exception):
            raise hub["answer"]
        return str(hub["answer"])

    def find_tokenizer(kind, place, model, published, asker):
        return judge.tokenizer if place == "me/judge" else published

    monkeypatch.setattr(preference, "load_pretrained", lambda kind, place, asker: load(kind, folder, asker))
    monkeypatch.setattr(preference, "load_tokenizer", find_tokenizer)
    monkeypatch.setattr(preference, "hf_hub_download", download)
    return hub


@torch.no_grad()
def test_a_judge_from_the_hub(judge, hub, monkeypatch):
    "What training added comes from there too; where it is not, or nobody can know, that is said"
    images, timesteps = pictures(2), torch.tensor([100, 900])
    trained = load_preference("me/judge")
    assert hub["asked"] == [("me/judge", modulation_file)] and not trained.plain and trained.name == "me/judge"
    close(trained(images, timesteps, PROMPTS), judge(images, timesteps, PROMPTS), 1e-6)
    hub["answer"] = EntryNotFoundError("404")
    plain, untold = load_preference("me/judge"), StepAwarePreference(judge.clip, judge.tokenizer, False).eval()
    assert plain.plain and plain.tokenizer == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert torch.equal(plain.embed_images(images, timesteps), untold.embed_images(images, timesteps))
    hub["answer"] = LocalEntryNotFoundError("offline")
    monkeypatch.setattr(preference, "try_to_load_from_cache", lambda *_: _CACHED_NO_EXIST)  # an earlier visit has seen
    assert load_preference("me/judge").plain
    monkeypatch.setattr(preference, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(OSError, match="preference_model: could not load 'me/judge': the hub cannot be reached"):
        load_preference("me/judge")


def test_parts_that_do_not_belong_together_are_refused(judge, tmp_path):
    save_preference(judge, tmp_path)
    save_file(StepModulation(32, 3).state_dict(), tmp_path / modulation_file)
    with pytest.raises(ValueError, match="preference_model is .* 32 wide with 3 blocks, but its CLIP tower is 32 wide"):
        load_preference(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 48
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match="preference_model"):
        load_preference(str(tmp_path))
    with pytest.raises(OSError, match="no folder or file here and no hub id"):
        load_preference("no/such/folder")


def test_the_shipped_judge():
    model = load_preference()
    assert sum(path.stat().st_size for path in (assets / "preference").iterdir()) < 1_000_000
    assert model.clip.config.vision_config.image_size == 32 and model.modulation is not None
    assert max(last.weight.abs().max() for _, last in model.modulation.blocks) > 0
    assert model(pictures(2, 64), torch.tensor([0, 500]), PROMPTS).isfinite().all()


# --- preferences


def test_pairs_share_prompt_noise_and_timestep(policy):
    def make(reward=redness, tie=0.0):
        return make_preference_pairs(policy, reward, PROMPTS, 20, pictures=3, num_steps=2, tie=tie, seed=1)

    pairs = make()
    assert pairs.pictures.shape == (2, 20, 3, 16, 16) and pairs.timesteps.shape == pairs.target.shape == (20,)
    assert set(pairs.prompts) == set(PROMPTS) and set(pairs.target.tolist()) == {0.0, 1.0}
    everything_ties, swapped = make(tie=10.0), make(lambda images, prompts: -redness(images, prompts))
    assert set(everything_ties.target.tolist()) == {0.5} and torch.equal(everything_ties.pictures, pairs.pictures)
    assert torch.equal(swapped.target, 1 - pairs.target) and swapped.prompts == pairs.prompts
    part = pairs[torch.tensor([3, 1])]
    assert torch.equal(part.pictures, pairs.pictures[:, [3, 1]])
    assert part.prompts == [pairs.prompts[3], pairs.prompts[1]]


@torch.no_grad()
def test_predictions_are_those_of_a_step(policy):
    "What the judge learns from is what sampling will show it: the predicted clean sample at the same noisy latent"
    clean, noise = torch.randn(2, 2, *policy.latent_shape, generator=torch.Generator().manual_seed(0)).unbind()
    embedding, sampler, steps = policy.embed(PROMPTS), policy.sampler(1000), torch.tensor([299, 969])
    shown = predicted_pictures(policy, sampler, clean, noise, steps, embedding)
    for i, (step, timestep) in enumerate(zip(steps.tolist(), (700, 30))):
        alpha_bar = policy.pipeline.scheduler.alphas_cumprod[timestep]
        noisy = (alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise)[i : i + 1]
        taken = sampler.step(policy.predict(noisy, timestep, embedding[i]), noisy, step)
        close(shown[i : i + 1], policy.decode(taken.pred_x0), 1e-4)


def test_a_model_with_fewer_noise_levels_has_a_judge_too(random_folder):
    policy = load_policy(random_folder("lcm"), device="cpu")
    pairs = make_preference_pairs(policy, redness, PROMPTS, 6, pictures=2, levels=50)
    assert pairs.pictures.isfinite().all() and set(pairs.timesteps.tolist()) <= set(
        policy.sampler(50).timesteps.tolist()
    )


def test_it_learns_what_depends_on_the_timestep(tokenizer):
    "Above 500 red wins, below it blue: only a judge that is told the timestep can be right"

    def compare(count, seed):
        generator = torch.Generator().manual_seed(seed)
        both = torch.rand(2, count, 3, 1, 1, generator=generator)
        timesteps = torch.randint(1000, (count,), generator=generator)
        redder = both[0, :, 0] - both[0, :, 2] > both[1, :, 0] - both[1, :, 2]
        target = (redder[:, 0, 0] == (timesteps >= 500)).float()
        return PreferencePairs(both.expand(-1, -1, -1, 16, 16).half(), timesteps, target, PROMPTS * (count // 2))

    reached, unseen = {}, compare(200, 1)
    for conditioned in (True, False):
        model = StepAwarePreference(random_clip(tokenizer), tokenizer, conditioned)
        train_preference_model(model, compare(600, 0), 80, 32, 3e-3)
        found = preference_accuracy(model, unseen, [0, 500, 1000])
        assert sum(part["n"] for part in found) == 200 and not any(p.requires_grad for p in model.parameters())
        assert score_pairs(model, unseen).shape == (2, 200)
        reached[conditioned] = sum(part["accuracy"] * part["n"] for part in found) / 200
    print(reached)
    assert reached[True] > 0.85 and reached[False] < 0.7


def test_its_training_is_a_command(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(preference, train_tiny_preference.__name__, lambda **settings: called.append(settings))
    preference_command([str(tmp_path), "--num_pairs", "24"])
    assert called == [dict(folder=str(tmp_path), num_pairs=24, iterations=1500, seed=0)]
