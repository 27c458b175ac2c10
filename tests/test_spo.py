"""SPO: a judge that begins as the CLIP it came from, a tree whose parts belong together, and a trainer that learns from comparisons alone."""

import json
import math
import re
from dataclasses import asdict

import pytest
import torch
import sdpo_nb.spo as spo
from comparisons import same_learning, same_weights, weights, without_clock
from huggingface_hub import _CACHED_NO_EXIST
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from random_pipelines import random_tokenizer
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from sdpo_nb.config import TrainConfig, batch_plan, resolve
from sdpo_nb.files import read_jsonl
from sdpo_nb.mdp import ddim_step, make_ddim, pair_noise, sample_trajectories
from sdpo_nb.models import load_policy
from sdpo_nb.objectives import preference_loss
from sdpo_nb.batching import pooled_cells
from sdpo_nb.scorers import clip_normalize, clip_pixels
from sdpo_nb.spo import (
    PreferencePairs,
    RewardAsPreference,
    SPOConfig,
    SPOTrainer,
    StepAwarePreference,
    StepModulation,
    branch_noise,
    branching_steps,
    compare_candidates,
    first_branch,
    get_preference,
    load_preference,
    make_preference_pairs,
    modulation_file,
    predicted_pictures,
    preference_accuracy,
    preference_command,
    preference_model_loss,
    sample_tree,
    save_preference,
    train_preference_model,
    trailing_timesteps,
)
from sdpo_nb.trainer import Rollout, Trainer, run_config

PROMPTS = ["a red circle", "a cat"]
SMALL = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
)
CLIP_H = dict(
    hidden_size=80,
    intermediate_size=320,
    num_hidden_layers=3,
    num_attention_heads=5,
    image_size=56,
    patch_size=14,
    hidden_act="gelu",
)  # CLIP-H: 1280, 5120, 32, 16, 224, 14


def redness(images, prompts):
    return (images[:, 0] - images[:, 2]).mean((1, 2))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return random_tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture
def policy(pipeline):
    return load_policy(pipeline, device="cpu")


def random_clip(tokenizer, vision=SMALL, seed=0):
    "A CLIP model with random weights, large enough ones that nothing is nearly constant"
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=10,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=24,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(
            CLIPConfig(text_config=text, vision_config={**vision, "projection_dim": 24}, projection_dim=24)
        ).eval()


@pytest.fixture
def judge(tokenizer):
    return StepAwarePreference(random_clip(tokenizer), tokenizer).eval().requires_grad_(False)


def pictures(count, size=16, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


# --- the judge


@pytest.mark.parametrize("vision", [SMALL, CLIP_H], ids=["small", "as CLIP-H"])
@pytest.mark.parametrize("conditioned", [True, False])
@torch.no_grad()
def test_it_begins_as_clip(tokenizer, vision, conditioned):
    clip, images, prompts = (
        random_clip(tokenizer, vision),
        pictures(3, vision["image_size"]),
        ["a cat", "a red circle", ""],
    )
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    expected = clip(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=clip_normalize(images)
    )
    model = StepAwarePreference(clip, tokenizer, conditioned).eval()
    timesteps = torch.tensor([0, 500, 999])
    assert torch.equal(model.embed_images(images, timesteps), expected.image_embeds)
    torch.testing.assert_close(
        model(images, timesteps, prompts), expected.logits_per_image.diagonal(), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_initialised_from_a_clip_folder(tokenizer, tmp_path):
    "The way from PickScore: a folder (or hub id) in transformers' layout, pictures of any size"
    clip = random_clip(tokenizer, CLIP_H)
    clip.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    model = load_preference(str(tmp_path))
    images = pictures(2, 128)
    pixels = clip_normalize(clip_pixels(images, 56))
    tokens = tokenizer(PROMPTS, padding="max_length", return_tensors="pt")
    expected = clip(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels
    ).logits_per_image.diagonal()
    torch.testing.assert_close(model(images, torch.tensor([10, 800]), PROMPTS), expected, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert model.plain and not load_preference().plain
    with pytest.warns(UserWarning, match="preference_model is .*, a plain CLIP, not trained on predictions"):
        get_preference(str(tmp_path), redness)


def test_time_reaches_every_block_once_trained(judge):
    "Each modulation gets a gradient at the very start, although nothing is modulated yet"
    judge.train().requires_grad_(True)
    judge(pictures(4), torch.tensor([1, 300, 600, 900]), PROMPTS * 2).std().backward()
    for _, last in [*judge.modulation.blocks, judge.modulation.pooled]:
        assert last.weight.grad.abs().max() > 0 and last.bias.grad.view(-1, 32).abs().amax(1).min() > 0
    torch.optim.SGD(judge.parameters(), 1.0).step()
    judge.eval()
    with torch.no_grad():
        same = judge.embed_images(pictures(1).repeat(2, 1, 1, 1), torch.tensor([100, 900]))
        assert (same[0] - same[1]).abs().max() > 1e-4


@torch.no_grad()
def test_scores_do_not_depend_on_the_company(judge):
    images, timesteps, prompts = pictures(5), torch.tensor([0, 10, 200, 500, 999]), PROMPTS * 2 + ["a dog"]
    together = judge(images, timesteps, prompts)
    alone = torch.cat([judge(images[i : i + 1], timesteps[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert together.dtype == torch.float32


@torch.no_grad()
def test_saved_and_loaded(judge, tmp_path):
    for _, last in judge.modulation.blocks:
        last.weight.normal_(std=0.1)
    images, timesteps = pictures(2), torch.tensor([100, 900])
    expected = judge(images, timesteps, PROMPTS)
    again = load_preference(str(save_preference(judge, tmp_path)))
    torch.testing.assert_close(again(images, timesteps, PROMPTS), expected, rtol=1e-6, atol=1e-6)
    unaware = StepAwarePreference(judge.clip, judge.tokenizer, conditioned=False).eval()
    again = load_preference(str(save_preference(unaware, tmp_path / "untold")))  # trained, and not told the timestep
    assert again.modulation is None and not again.plain and not torch.equal(again(images, timesteps, PROMPTS), expected)
    torch.testing.assert_close(
        again(images, timesteps, PROMPTS), unaware(images, timesteps, PROMPTS), rtol=1e-6, atol=1e-6
    )
    CLIPModel.from_pretrained(tmp_path)  # it is a plain CLIP folder all the same
    half = load_preference(str(save_preference(judge.half(), tmp_path / "half")))
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    torch.testing.assert_close(half(images, timesteps, PROMPTS), expected, rtol=1e-2, atol=2e-2)


@torch.no_grad()
def test_a_judge_from_the_hub(judge, tmp_path, monkeypatch):
    "What training added comes from there too; without it, and where nobody can know, that is not passed over in silence"
    for _, last in judge.modulation.blocks:
        last.weight.normal_(std=0.1)
    save_preference(judge, tmp_path / "hub")
    asked, answer, load = [], tmp_path / "hub" / modulation_file, spo.load_pretrained

    def download(repository, name):
        asked.append((repository, name))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(
        spo, "load_pretrained", lambda reward, field, kind, place: load(reward, field, kind, tmp_path / "hub")
    )
    monkeypatch.setattr(
        spo,
        "load_tokenizer",
        lambda reward, kind, place, model, published: judge.tokenizer if place == "me/judge" else published,
    )
    monkeypatch.setattr(spo, "hf_hub_download", download)
    images, timesteps = pictures(2), torch.tensor([100, 900])
    trained = load_preference("me/judge")
    assert asked == [("me/judge", modulation_file)] and not trained.plain and trained.name == "me/judge"
    torch.testing.assert_close(
        trained(images, timesteps, PROMPTS), judge(images, timesteps, PROMPTS), rtol=1e-6, atol=1e-6
    )
    answer = EntryNotFoundError("404")
    plain = load_preference("me/judge")
    assert plain.plain and plain.tokenizer == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert torch.equal(
        plain.embed_images(images, timesteps),
        StepAwarePreference(judge.clip, judge.tokenizer, False).eval().embed_images(images, timesteps),
    )
    answer = LocalEntryNotFoundError("offline")
    monkeypatch.setattr(
        spo, "try_to_load_from_cache", lambda *_: _CACHED_NO_EXIST
    )  # an earlier visit has seen that there is none
    assert load_preference("me/judge").plain
    monkeypatch.setattr(spo, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(OSError, match="preference_model: could not load 'me/judge': the hub cannot be reached"):
        load_preference("me/judge")


@pytest.mark.parametrize("width, depth", [(48, 2), (32, 3)])
def test_modulation_of_another_model_is_refused(judge, tmp_path, width, depth):
    save_preference(judge, tmp_path)
    save_file(StepModulation(width, depth).state_dict(), tmp_path / modulation_file)
    with pytest.raises(
        ValueError,
        match=f"preference_model is .* {width} wide with {depth} blocks, but its CLIP tower is 32 wide with 2",
    ):
        load_preference(str(tmp_path))


def test_a_tower_of_another_width_is_refused(judge, tmp_path):
    save_preference(judge, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 48
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match="preference_model"):
        load_preference(str(tmp_path))
    with pytest.raises(OSError, match="no folder or file here and no hub id"):
        load_preference("no/such/folder")


def test_the_shipped_judge(policy):
    model = load_preference()
    files = [path for path in (__import__("sdpo_nb.rewards").rewards.assets / "preference").iterdir()]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    assert model.clip.config.vision_config.image_size == 32 and model.modulation is not None
    assert max(last.weight.abs().max() for _, last in model.modulation.blocks) > 0
    assert model(pictures(2, 64), torch.tensor([0, 500]), PROMPTS).isfinite().all()


# --- preferences


def test_pairs_share_prompt_noise_and_timestep(policy):
    pairs = make_preference_pairs(policy, redness, PROMPTS, 20, pictures=3, num_steps=2, tie=0.0, seed=1)
    assert (
        pairs.pictures.shape == (2, 20, 3, 16, 16)
        and pairs.timesteps.shape == pairs.target.shape == (20,)
        and len(pairs) == len(pairs.prompts) == 20
    )
    assert set(pairs.prompts) == set(PROMPTS) and set(pairs.target.tolist()) == {0.0, 1.0}
    again = make_preference_pairs(policy, redness, PROMPTS, 20, pictures=3, num_steps=2, tie=0.0, seed=1)
    assert torch.equal(again.pictures, pairs.pictures) and again.prompts == pairs.prompts
    everything_ties = make_preference_pairs(policy, redness, PROMPTS, 20, pictures=3, num_steps=2, tie=10.0, seed=1)
    assert set(everything_ties.target.tolist()) == {0.5} and torch.equal(everything_ties.pictures, pairs.pictures)
    swapped = make_preference_pairs(
        policy, lambda images, prompts: -redness(images, prompts), PROMPTS, 20, pictures=3, num_steps=2, tie=0.0, seed=1
    )
    assert torch.equal(swapped.target, 1 - pairs.target)
    part = pairs[torch.tensor([3, 1])]
    assert torch.equal(part.pictures, pairs.pictures[:, [3, 1]]) and part.prompts == [
        pairs.prompts[3],
        pairs.prompts[1],
    ]


@torch.no_grad()
def test_predictions_are_those_of_a_step(policy):
    "What the judge learns from is what the sampler will show it: the x̂0 of `ddim_step` at the same noisy latent"
    clean, noise = torch.randn(2, 2, *policy.latent_shape, generator=torch.Generator().manual_seed(0)).unbind()
    embedding, scheduler = policy.embed(PROMPTS), make_ddim(policy.scheduler, 1000)
    shown = predicted_pictures(policy, clean, noise, torch.tensor([700, 30]), embedding)
    for i, timestep in enumerate((700, 30)):
        alpha_bar = scheduler.alphas_cumprod[timestep]
        noisy = (alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise)[i : i + 1]
        step = ddim_step(scheduler, policy.predict(noisy, timestep, embedding[i]), timestep, noisy, eta=0.0)
        torch.testing.assert_close(shown[i : i + 1], policy.decode(step.pred_x0), rtol=1e-4, atol=1e-4)


def test_loss_of_the_judge():
    scores = torch.tensor([[2.0, 0.0, 1.0], [0.0, 2.0, 1.0]])
    torch.testing.assert_close(
        preference_model_loss(scores, torch.tensor([1.0, 0.0, 0.5])), torch.tensor(2 * math.log(1 + math.exp(-2)) / 3)
    )
    assert preference_model_loss(scores, torch.tensor([0.0, 1.0, 0.5])) > preference_model_loss(
        scores, torch.tensor([1.0, 0.0, 0.5])
    )
    torch.testing.assert_close(preference_model_loss(torch.zeros(2, 4), torch.full((4,), 0.5)), torch.tensor(0.0))


def test_it_learns_what_depends_on_the_timestep(tokenizer):
    "Above 500 red wins, below it blue: only a judge that is told the timestep can be right"

    def compare(count, seed):
        generator = torch.Generator().manual_seed(seed)
        both, timesteps = (
            torch.rand(2, count, 3, 1, 1, generator=generator),
            torch.randint(1000, (count,), generator=generator),
        )
        redder = both[0, :, 0] - both[0, :, 2] > both[1, :, 0] - both[1, :, 2]
        return PreferencePairs(
            both.expand(-1, -1, -1, 16, 16).half(),
            timesteps,
            (redder[:, 0, 0] == (timesteps >= 500)).float(),
            PROMPTS * (count // 2),
        )

    reached, unseen = {}, compare(200, 1)
    for conditioned in (True, False):
        model = train_preference_model(
            StepAwarePreference(random_clip(tokenizer), tokenizer, conditioned), compare(600, 0), 80, 32, 3e-3
        )
        found = preference_accuracy(model, unseen, [0, 500, 1000])
        assert sum(part["n"] for part in found) == 200 and not any(p.requires_grad for p in model.parameters())
        reached[conditioned] = sum(part["accuracy"] * part["n"] for part in found) / 200
    print(reached)
    assert reached[True] > 0.85 and reached[False] < 0.7


def test_its_training_is_a_command(tmp_path):
    preference_command([str(tmp_path), "--num_pairs", "24", "--iterations", "1"])
    found = read_jsonl(tmp_path / "accuracy.jsonl")
    assert len(found) == 20 and sum(part["n"] for part in found if part["conditioned"]) <= 6
    assert (
        load_preference(str(tmp_path / "preference")).modulation is not None
        and load_preference(str(tmp_path / "untold")).modulation is None
    )


def test_cheap_mode(policy):
    judge = get_preference("reward", redness)
    assert isinstance(judge, RewardAsPreference) and judge.name == "redness of the prediction"
    assert torch.equal(judge(pictures(2), torch.tensor([1, 900]), PROMPTS), redness(pictures(2), PROMPTS))


# --- the tree


def grow(policy, T=5, K=3, B=2, judge=None, seed=0, indices=None, **options):
    "Trees, and what was asked on the way"
    asked, scheduler, prompts = dict(predict=[], score=[]), make_ddim(policy.scheduler, T), (PROMPTS * B)[:B]
    embedding = policy.embed(prompts)
    initial, noises, picks = branch_noise(seed, 0, range(B) if indices is None else indices, K, T, policy.latent_shape)

    def predict(x, t):
        asked["predict"].append((len(x), t))
        return policy.predict(x, t, embedding.repeat(len(x) // B))

    def score(x, t):
        asked["score"].append((len(x), t))
        return redness(policy.decode(x), prompts * (len(x) // B))

    branching = options.pop("branching", torch.ones(T, dtype=torch.bool))
    return sample_tree(predict, score, scheduler, initial, noises, picks, branching, **options), asked, scheduler


@pytest.mark.parametrize("segment_steps", [1, 2, 3, 9])
@pytest.mark.parametrize("ordinary", [0, 2])
def test_the_parts_of_a_tree_belong_together(policy, segment_steps, ordinary):
    T, K, B = 5, 3, 2
    tree, asked, scheduler = grow(policy, branching=torch.arange(T) >= ordinary, segment_steps=segment_steps)
    times, rows, embedding = [*scheduler.timesteps.tolist(), 0], torch.arange(B), policy.embed(PROMPTS)
    S = 1 if segment_steps == 1 else K
    assert tree.states.shape == (S, B, T, *policy.latent_shape) and tree.actions.shape == tree.promised.shape == (
        K,
        B,
        T,
        *policy.latent_shape,
    )
    assert tree.latents.shape[:2] == (B, T + 1) and tree.pred_x0.shape[:2] == tree.chosen.shape == (B, T)
    with torch.no_grad():
        for i in range(T):
            mine = tree.states[tree.chosen[:, i] if S > 1 else torch.zeros(B, dtype=torch.long), rows, i]
            assert torch.equal(tree.latents[:, i], mine) and torch.equal(
                tree.latents[:, i + 1], tree.actions[tree.chosen[:, i], rows, i]
            )
            for k in range(K):
                state = tree.states[k if S > 1 else 0, :, i]
                step = ddim_step(
                    scheduler,
                    policy.predict(state, times[i], embedding),
                    times[i],
                    state,
                    prev_sample=tree.actions[k, :, i],
                )
                torch.testing.assert_close(step.log_prob, tree.log_prob[k, :, i], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(
                    step.pred_x0,
                    tree.promised[k, :, i - 1]
                    if i and segment_steps > 1 and i > ordinary and (i - ordinary) % segment_steps
                    else tree.pred_x0[:, i],
                    rtol=1e-4,
                    atol=1e-4,
                )
                if i < T - 1:
                    ahead = ddim_step(
                        scheduler,
                        policy.predict(tree.actions[k, :, i], times[i + 1], embedding),
                        times[i + 1],
                        tree.actions[k, :, i],
                        eta=0.0,
                    ).pred_x0
                    torch.testing.assert_close(tree.promised[k, :, i], ahead, rtol=1e-4, atol=1e-4)
                if i >= ordinary:
                    end = min(i + segment_steps - 1 - (i - ordinary) % segment_steps, T - 1)
                    torch.testing.assert_close(
                        tree.scores[k, :, i],
                        redness(policy.decode(tree.promised[k, :, end]), None),
                        rtol=1e-4,
                        atol=1e-5,
                    )
    assert torch.equal(tree.promised[:, :, -1], tree.actions[:, :, -1]) and tree.scores[:, :, :ordinary].isnan().all()
    ends = [min(start + segment_steps, T) for start in range(ordinary, T, segment_steps)]
    assert asked["score"] == [(K * B, times[end]) for end in ends]  # at the next timestep; finished samples at 0
    assert [t for _, t in asked["predict"]] == times[:T]  # one call a step: the chosen prediction is reused
    assert [count for count, _ in asked["predict"]] == [B if i <= ordinary else K * B for i in range(T)]


def test_one_candidate_is_an_ordinary_trajectory(policy):
    tree, _, scheduler = grow(policy, K=1)
    initial, noises, _ = branch_noise(0, 0, range(2), 1, 5, policy.latent_shape)
    embedding = policy.embed(PROMPTS)
    plain = sample_trajectories(lambda x, t: policy.predict(x, t, embedding), scheduler, initial, noises[0])
    assert (
        torch.equal(tree.latents, plain.latents)
        and torch.equal(tree.pred_x0, plain.pred_x0)
        and torch.equal(tree.log_prob[0], plain.log_prob)
    )


def test_noise_belongs_to_the_walk(policy):
    "Whatever batch a walk is played in: its noise, its choices and so its tree are the same"
    both, _, _ = grow(policy, indices=[4, 9])
    initial, noises, picks = branch_noise(0, 0, [9], 3, 5, policy.latent_shape)
    together = branch_noise(0, 0, [4, 9], 3, 5, policy.latent_shape)
    assert (
        torch.equal(together[0][1:], initial)
        and torch.equal(together[1][:, 1:], noises)
        and torch.equal(together[2][1:], picks)
    )
    assert torch.equal(branch_noise(3, 2, [1, 5], 2, 4, (2, 3, 3))[1], pair_noise(3, 2, [1, 5], 4, (2, 3, 3))[1])
    assert torch.equal(
        branch_noise(3, 2, [1, 5], 5, 4, (2, 3, 3))[1][:2], pair_noise(3, 2, [1, 5], 4, (2, 3, 3))[1]
    )  # more candidates leave the first ones alone
    assert torch.equal(both.chosen, together[2])


def test_where_walks_go_on(policy):
    winner, _, _ = grow(policy, continue_from="winner")
    loser, _, _ = grow(policy, continue_from="loser")
    assert torch.equal(winner.chosen, winner.scores.argmax(0)) and torch.equal(loser.chosen, loser.scores.argmin(0))
    picks = branch_noise(0, 0, range(400), 4, 5, (1, 1, 1))[2]
    counts = torch.bincount(picks.flatten(), minlength=4)
    assert ((counts - 500).abs() < 5 * (2000 * 0.25 * 0.75) ** 0.5).all()
    random, _, _ = grow(policy)
    assert torch.equal(random.chosen, branch_noise(0, 0, range(2), 3, 5, policy.latent_shape)[2])


def test_noises_that_do_not_fit(policy):
    scheduler, (initial, noises, picks) = (
        make_ddim(policy.scheduler, 4),
        branch_noise(0, 0, range(2), 3, 5, policy.latent_shape),
    )
    with pytest.raises(
        ValueError, match=re.escape("noises has shape [3, 2, 5, 4, 8, 8]; give [K,B,T,C,H,W] with T = 4")
    ):
        sample_tree(None, None, scheduler, initial, noises, picks, None)


def test_comparison():
    scores = torch.tensor([[1.0, 5.0], [2.0, 5.0], [0.5, 5.0]])[:, :, None]
    winner, loser, gap = compare_candidates(scores)
    assert winner[0, 0] == 1 and loser[0, 0] == 2 and gap[1, 0] == 0
    chances = torch.tensor([2.0, 0.5]).softmax(0)
    torch.testing.assert_close(gap[0, 0], chances[0] - chances[1])
    torch.testing.assert_close(compare_candidates(scores, 10.0).gap[0, 0], torch.tensor(15 / 2).tanh())
    torch.testing.assert_close(
        compare_candidates(torch.tensor([0.0, 0.6191]).view(2, 1, 1)).gap.item(), 0.3, rtol=1e-3, atol=1e-3
    )  # SPO's 0.62


def test_few_steps(policy):
    "Which steps branch by default, where nothing is asked for"
    usable = {T: branching_steps(make_ddim(policy.scheduler, T)).nonzero()[:, 0].tolist() for T in (1, 2, 3, 4, 8, 20)}
    assert usable == {1: [], 2: [0, 1], 3: [0, 1, 2], 4: [1, 2, 3], 8: [2, 3, 4, 5, 6, 7], 20: list(range(5, 20))}
    for T in range(1, 60):
        assert torch.equal(trailing_timesteps(T), make_ddim(policy.scheduler, T).timesteps)
    assert first_branch(trailing_timesteps(4), 0) == 0 and first_branch(trailing_timesteps(1), 0) == 0
    assert branching_steps(make_ddim(policy.scheduler, 4), 3).tolist() == [False, False, False, True]
    assert branching_steps(make_ddim({**policy.scheduler.config, "set_alpha_to_one": True}, 4)).tolist() == [
        False,
        True,
        True,
        False,
    ]  # a last step without noise has no candidates


def test_pooled_cells():
    valid = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    updates = pooled_cells(valid, 4, torch.Generator().manual_seed(1))
    cells = [(p, s) for pairs, steps in updates for p, s in zip(pairs.tolist(), steps.tolist())]
    assert sorted(cells) == [tuple(cell) for cell in valid.nonzero().tolist()] and len(updates) == 4
    assert max(len(p) for p, _ in updates) - min(len(p) for p, _ in updates) <= 1
    assert cells != sorted(cells) and [len(set(steps.tolist())) > 1 for _, steps in updates].count(True) >= 3


# --- settings

refusals = [
    (dict(candidates=1), "candidates is 1; give a whole number from 2 to 64"),
    (dict(candidates=2.0), "candidates is 2.0"),
    (dict(candidates=True), "candidates is True"),
    (dict(preference_threshold=0), "preference_threshold is 0; give a number above 0 and below 1"),
    (dict(preference_threshold=1.0), "preference_threshold is 1.0"),
    (dict(preference_threshold=math.nan), "preference_threshold is nan"),
    (dict(preference_threshold="0.3"), "preference_threshold is '0.3'"),
    (dict(preference_scale=0.0), "preference_scale is 0.0; give a number above 0"),
    (dict(beta=-1.0), "beta is -1.0; give a number above 0"),
    (dict(divert_start=10), "divert_start is 10; give a whole number from 0 to 9"),
    (dict(divert_start=-1), "divert_start is -1"),
    (dict(segment_steps=0), "segment_steps is 0; give a whole number from 1 to 10"),
    (dict(segment_steps=11), "segment_steps is 11"),
    (dict(continue_from="best"), "continue_from is 'best', which is none of random, winner, loser"),
    (
        dict(num_steps=1),
        "num_steps is 1 with divert_start=None and train_last_step=True, which leaves no step whose candidates could be compared",
    ),
    (
        dict(num_steps=4, divert_start=3, train_last_step=False),
        "num_steps is 4 with divert_start=3 and train_last_step=False, which leaves no step",
    ),
    (dict(clip_range=1.0), "clip_range is 1.0"),
    (dict(recipe="sdpo"), "recipe is 'sdpo', which goes with TrainConfig, not SPOConfig"),
]


@pytest.mark.parametrize("settings, message", refusals, ids=[str(s) for s, _ in refusals])
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(SPOConfig(**settings))


def test_settings():
    config = resolve(SPOConfig())
    assert (config.beta, config.clip_range, config.step_weight, config.log_ratio_scale, config.train_last_step) == (
        10.0,
        0.1,
        1.0,
        "none",
        True,
    )
    assert resolve(config) == config
    assert resolve(SPOConfig(num_steps=1, divert_start=0)).num_steps == 1  # whoever insists
    with pytest.raises(ValueError, match="recipe is 'spo', which goes with SPOConfig, not TrainConfig"):
        resolve(TrainConfig(recipe="spo"))


def test_judges_that_cannot_be(judge, tmp_path):
    "Refused before anything is loaded; a hub id is only known by asking"
    (tmp_path / "empty").mkdir(), (tmp_path / "file").write_text("")
    for settings, message in (
        (
            dict(policy="stabilityai/sd-turbo"),
            "preference_model is 'tiny', which knows nothing but pictures of the policy tiny, and the policy is 'stabilityai/sd-turbo'",
        ),
        (
            dict(preference_model=str(tmp_path / "none")),
            "none', where nothing is; give tiny, reward, or the folder or hub id of a judge.",
        ),
        (dict(preference_model="no/such/folder"), "preference_model is 'no/such/folder', where nothing is"),
        (dict(preference_model=""), "preference_model is ''"),
        (dict(preference_model=None), "preference_model is None"),
        (dict(preference_model=str(tmp_path / "empty")), "it has no config.json"),
        (dict(preference_model=str(tmp_path / "file")), "it has no config.json"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            resolve(SPOConfig(**settings))

    def words(**settings):
        return resolve(SPOConfig(**settings)).words()["judge"]

    assert words() == "tiny, which was taught shapes_aesthetic; the reward is only watched; threshold 0.3"
    assert words(preference_model="me/judge").startswith(
        "me/judge, plain CLIP, not trained on predictions unless the hub has its step_modulation.safetensors"
    )
    folder = str(save_preference(judge, tmp_path / "judge"))
    assert (
        words(policy="stabilityai/sd-turbo", preference_model=folder)
        == f"{folder}; the reward is only watched; threshold 0.3"
    )
    (tmp_path / "judge" / modulation_file).unlink()
    assert words(preference_model=folder).startswith(f"{folder}, plain CLIP, not trained on predictions;")


# --- the trainer


@pytest.fixture
def make(pipeline, tmp_path):
    "Make a trainer of a small run"

    def make_trainer(*, judge="reward", reward=redness, kind=SPOTrainer, callbacks=(), output="run", **settings):
        small = dict(
            num_steps=5,
            epochs=1,
            pairs_per_epoch=4,
            pairs_per_update=2,
            micro_batch=2,
            eval_samples=0,
            candidates=3,
            divert_start=1,
            preference_threshold=1e-6,
            preference_scale=50.0,
            output_dir=str(tmp_path / output),
        )
        if isinstance(judge, str):
            settings, judge = dict(preference_model=judge, **settings), None
        return kind(
            load_policy(pipeline, device="cpu"),
            reward,
            PROMPTS,
            SPOConfig(**{**small, **settings}),
            callbacks,
            preference=judge,
        )

    return make_trainer


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(candidates=2),
        dict(segment_steps=2),
        dict(num_steps=2, divert_start=None),
        dict(continue_from="winner"),
        dict(divert_start=4),
        dict(train_last_step=False),
        dict(kl_coefficient=0.1),
        dict(kl_coefficient=0.1, segment_steps=2),
        dict(micro_batch=1),
    ],
    ids=str,
)
def test_it_trains(make, settings):
    trainer = make(**settings)
    start, plan = weights(trainer), batch_plan(trainer.config)
    metrics = trainer.train()
    assert not same(start, weights(trainer))
    assert (
        metrics["log_ratio/max_before_update"] < 1e-5 and metrics["log_ratio/recomputed"] == 0
    )  # sampling and training see batches of different sizes
    assert (
        metrics["samples"] == 4 * trainer.config.candidates == plan["trajectories per epoch, in network calls, at most"]
    )
    assert metrics["reward_queries"] == plan["reward queries per epoch"]
    cells = round(metrics["preference/valid"] * 4 * len(trainer.trained_steps))
    assert (
        metrics["optimizer_steps"] == math.ceil(cells / 2)
        and cells <= plan["(tree, step) comparisons per epoch, at most"]
    )
    assert {
        "epoch",
        "reward/mean",
        "loss",
        "grad_norm",
        "diversity",
        "seconds/sample",
        "seconds/reward",
        "seconds/train",
    } <= metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values() if value is not None)
    assert not any(name.startswith(("anchor/", "dense/")) for name in metrics)  # there are none


def test_the_shipped_judge_belongs_to_its_policy(make, judge):
    with pytest.raises(
        ValueError, match="preference_model is 'tiny', which knows nothing but pictures of the policy tiny"
    ):
        make(judge="tiny")
    trainer = make(judge=load_preference("tiny"))  # whoever hands it over knows why
    assert trainer.config.preference_model == "given:tiny" and make(judge=judge).config.words()["judge"].startswith(
        "preference, as handed to the trainer;"
    )
    assert make(judge=lambda images, timesteps, prompts: timesteps).config.preference_model == "given:lambda"


@pytest.mark.parametrize(
    "valid, sharing", [(4, False), (1, False), (3, True)], ids=["all", "one", "three, weights shared"]
)
def test_two_processes_learn_what_one_does(make, pipeline, two_processes, tmp_path, valid, sharing):
    "One update of all comparisons, however many of them each process has: every one counts alike"
    settings = dict(
        num_steps=2,
        divert_start=1,
        candidates=2,
        pairs_per_epoch=4,
        pairs_per_update=4,
        micro_batch=1,
        epochs=2,
        preference_threshold=1e-9,
        preference_scale=50.0,
    )
    if valid < 4:
        gaps = compare_candidates(make(**settings).grow(0)[2].scores, 50.0).gap[:, 1].sort(descending=True).values
        settings.update(
            preference_threshold=(gaps[valid - 1] + gaps[valid]).item() / 2, epochs=1
        )  # so many pass, the processes have unequally many
    alone = make(**settings, output="alone")
    assert alone.train()["preference/valid"] == valid / 4 and len(alone.trained_steps) == 1
    first, second = two_processes(
        f"""
        from test_spo import *
        config = SPOConfig(eval_samples=0, preference_model='reward', output_dir={str(tmp_path / "two")!r}, **{settings!r})
        trainer = SPOTrainer(load_policy({str(pipeline)!r}, device='cpu'), redness, PROMPTS, config, [])""",
        sharing=sharing,
    )
    same_learning(first, second, weights(alone), weights(make(**settings)))
    one, two = (without_clock(tmp_path / name) for name in ("alone", "two"))
    for name in ("samples", "reward_queries", "optimizer_steps", "preference/valid"):
        assert [record[name] for record in one] == [record[name] for record in two]
    for name in ("reward/mean", "preference/gap", "loss"):
        assert [record[name] for record in two] == pytest.approx([record[name] for record in one], rel=1e-3)


def test_what_is_learnt_from(make, judge):
    "Winners and losers by the judge, at the timestep of the next call; only confident comparisons at trained steps are valid"
    untried = make(judge=judge)
    middle = compare_candidates(untried.grow(0)[2].scores, 50.0).gap[:, 1:].median().item()
    trainer = make(judge=judge, preference_threshold=middle, output="other")
    rollout, tree = trainer.rollout(0), trainer.grow(0)[2]
    winner, loser, gap = compare_candidates(tree.scores, 50.0)
    times = [*trainer.scheduler.timesteps.tolist(), 0]
    for b in range(4):
        for i in range(5):
            assert torch.equal(rollout.actions[0, b, i], tree.actions[winner[b, i], b, i]) and torch.equal(
                rollout.actions[1, b, i], tree.actions[loser[b, i], b, i]
            )
            assert rollout.valid[b, i] == (i > 0 and gap[b, i].item() > middle)
            if i:
                shown = trainer.policy.decode(tree.promised[:, b, i])
                torch.testing.assert_close(
                    judge(shown, torch.full((3,), times[i + 1]), [rollout.prompts[b]] * 3),
                    tree.scores[:, b, i],
                    rtol=1e-4,
                    atol=1e-4,
                )
    assert 0 < rollout.valid[:, 1:].float().mean() < 1 and (rollout.advantages[0] >= rollout.advantages[1]).all()
    assert torch.equal(rollout.final_reward[0], redness(trainer.policy.decode(rollout.latents[0, :, -1]), None))


def test_one_call_for_the_shared_state(make):
    "The network looks once at a state that winner and loser share; the numbers are those of two calls"
    trainer = make()
    rollout, rows, predict = trainer.rollout(0), [], trainer.policy.predict
    units, steps = rollout.valid.nonzero(as_tuple=True)

    def counting(x, *rest):
        rows.append(len(x))
        return predict(x, *rest)

    trainer.policy.predict = counting
    loss, _ = once(trainer, rollout, units, steps)
    assert rows == [len(units)]
    twice = Rollout(
        rollout.prompts,
        rollout.embedding,
        rollout.latents,
        rollout.pred_x0,
        rollout.log_prob,
        rollout.states.expand(2, *rollout.states.shape[1:]),
        rollout.actions,
        rollout.valid,
        rollout.reference_log_prob,
        advantages=rollout.advantages,
    )
    other, _ = once(trainer, twice, units, steps)
    assert rows == [len(units), 2 * len(units)]
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)


def once(trainer, rollout, units, steps):
    "The loss of some cells, with the reference policy's log-probabilities"
    with trainer.policy.without_lora(), torch.no_grad():
        predict, trainer.policy.predict = trainer.policy.predict, type(trainer.policy).predict.__get__(trainer.policy)
        rollout.reference_log_prob = trainer.policy_log_prob(rollout)
        trainer.policy.predict = predict
    return trainer.cell_loss(rollout, units, steps)


def test_the_loss_is_dpo_on_mean_log_probabilities(make):
    "Recomputed from the formula after an update, when policy and reference differ; the reference is the policy without its adapter"
    trainer = make(learning_rate=1e-3)
    rollout = trainer.rollout(0)
    trainer.update(rollout, 0)
    units, steps = rollout.valid.nonzero(as_tuple=True)
    loss, log = once(trainer, rollout, units, steps)

    def log_prob():
        state, timestep = rollout.states[0, units, steps], trainer.scheduler.timesteps[steps]
        output = trainer.policy.predict(state, timestep, rollout.embedding[units])
        return torch.stack(
            [
                ddim_step(
                    trainer.scheduler, output, timestep, state, prev_sample=rollout.actions[k, units, steps]
                ).log_prob
                for k in range(2)
            ]
        )

    with torch.no_grad():
        now = log_prob()
        with trainer.policy.without_lora():
            reference = log_prob()
    ratio = (now - reference).exp().clamp(0.9, 1.1).log()
    expected = -torch.nn.functional.logsigmoid(10 * (ratio[0] - ratio[1])).mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)
    assert (now - reference).abs().max() > 1e-6
    torch.testing.assert_close(
        preference_loss(
            now,
            reference,
            torch.tensor([[1.0], [-1.0]]).expand(2, len(units)),
            torch.ones(len(units)),
            clip_range=0.1,
            beta=10.0,
        ),
        expected,
    )


def test_winners_become_more_probable(make):
    trainer = make(epochs=1, learning_rate=3e-3, pairs_per_update=4, micro_batch=4)
    rollout = trainer.rollout(0)
    before = rollout.log_prob.clone()
    for _ in range(3):
        trainer.update(rollout, 0)
    with torch.no_grad():
        after = trainer.policy_log_prob(rollout)
    moved = (after - before)[:, rollout.valid]
    assert (moved[0] - moved[1]).mean() > 0


def test_micro_batches_do_not_matter(make):
    whole, parts = make(micro_batch=2, output="a"), make(micro_batch=1, output="b")
    whole.train(), parts.train()
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(parts)[name], rtol=1e-3, atol=2e-5)


def test_nothing_passes_the_threshold(make):
    "An epoch without a confident comparison teaches nothing, and says so"
    trainer = make(preference_threshold=0.9, preference_scale=1e-3, epochs=2)
    start = weights(trainer)
    with pytest.warns(UserWarning, match="taught nothing") as said:
        metrics = trainer.train()
    assert (
        same(start, weights(trainer))
        and metrics["optimizer_steps"] == 0
        and metrics["preference/valid"] == 0
        and metrics["epoch"] == 2
    )
    (message,) = [str(warning.message) for warning in said if "taught nothing" in str(warning.message)]  # once
    gaps = compare_candidates(make().grow(0)[2].scores, 1e-3).gap[:, 1:]
    assert (
        re.match(
            r"epoch 1 taught nothing: no comparison passed preference_threshold 0\.9, the largest gap in probability was ",
            message,
        )
        and f"was {gaps.max():.2g};" in message
    )
    enough = float(re.search(r"raise preference_scale above (.+)\.$", message)[1])
    assert make(preference_threshold=0.9, preference_scale=1.01 * enough, output="more").train()["optimizer_steps"] == 1
    alike = make(judge=lambda images, timesteps, prompts: torch.zeros(len(images)), output="alike")
    with pytest.warns(UserWarning, match="the judge finds all candidates equally good"):
        alike.train()


@pytest.mark.parametrize("settings", [{}, dict(segment_steps=2)], ids=str)
def test_a_resumed_run_is_the_same_run(make, judge, settings, tmp_path):
    settings = dict(judge=judge, preference_threshold=0.01, preference_scale=100.0, **settings)
    whole = make(epochs=4, checkpoint_every=2, output="whole", **settings)
    whole.train()
    make(epochs=2, checkpoint_every=2, output="parts", **settings).train()
    resumed = make(epochs=4, checkpoint_every=2, output="parts", resume=str(tmp_path / "parts"), **settings)
    resumed.train()
    assert same_weights(whole, resumed)
    first, second = (without_clock(tmp_path / name) for name in ("whole", "parts"))
    assert first == second and len(first) == 4
    other = make(epochs=5, candidates=2, resume=str(tmp_path / "parts"), **settings)
    with pytest.raises(ValueError, match="candidates is 2, but the run in .* was started with 3"):
        other.train()
    with pytest.raises(
        ValueError, match="preference_model is 'reward', but the run in .* was started with 'given:preference'"
    ):
        make(**{**settings, "judge": "reward"}, epochs=5, resume=str(tmp_path / "parts")).train()


def test_a_run_folder(make, tmp_path):
    "Evaluation, report, model card and LoRA are those of every run"
    trainer = make(callbacks=None, eval_samples=4, epochs=2)
    trainer.train()
    assert {"config.json", "metrics.jsonl", "evaluation.json", "checkpoints", "lora", "report.html", "README.md"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["recipe"] == "spo" and settings["candidates"] == 3
    assert asdict(run_config(tmp_path / "run", SPOConfig))["candidates"] == 3


def test_the_common_trainer_does_not_take_it(pipeline, tmp_path):
    with pytest.raises(ValueError, match="recipe is 'spo', which goes with SPOConfig"):
        Trainer(
            load_policy(pipeline, device="cpu"),
            redness,
            PROMPTS,
            TrainConfig(recipe="spo", output_dir=str(tmp_path / "run")),
        )


# --- the command line


def run(words):
    from sdpo_nb.cli import train_command

    return train_command(words)


def test_from_the_command_line(pipeline, tmp_path, capsys):
    "Train, look at the plan, resume: the recipe decides which flags there are"
    place, common = (
        str(tmp_path / "run"),
        [
            "--policy",
            str(pipeline),
            "--reward",
            "warmth",
            "--num_steps",
            "4",
            "--pairs_per_epoch",
            "2",
            "--eval_samples",
            "0",
        ],
    )
    own = [
        "--recipe",
        "spo",
        "--candidates",
        "2",
        "--preference_model",
        "reward",
        "--preference_scale=50",
        "--preference_threshold",
        "1e-6",
    ]
    assert run(["tiny", *common, *own, "--output_dir", place, "--dry_run"]) == 0
    plan = capsys.readouterr().out
    assert (
        re.search(r"judge +warmth of the prediction \(cheap mode\); threshold 1e-06", plan)
        and "2 trees per epoch" in plan
        and not (tmp_path / "run").exists()
    )
    assert run(["tiny", *common, *own, "--output_dir", place, "--epochs", "1"]) == 0
    assert run(["--resume", place, "--epochs", "2"]) == 0
    assert [record["epoch"] for record in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    capsys.readouterr()
    assert run(["--resume", place, "--candidates", "3"]) == 2
    assert "candidates is 3, but the run in" in capsys.readouterr().err


def test_a_judge_that_was_handed_over_cannot_be_resumed_without_it(make, judge, tmp_path, capsys):
    make(judge=judge, preference_threshold=0.01, preference_scale=100.0, reward="warmth").train()
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["preference_model"] == "given:preference"
    assert run(["--resume", str(tmp_path / "run"), "--epochs", "2"]) == 2
    assert (
        "preference_model is 'given:preference', a judge that was handed to the trainer and cannot be loaded by its name"
        in capsys.readouterr().err
    )
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == files


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["sd_turbo_aesthetic", "--recipe", "spo", "--num_steps", "4"],
            "preference_model is 'tiny', which knows nothing but pictures of the policy tiny",
        ),
        (
            ["tiny", "--recipe", "spo", "--preference_model", "./nowhere"],
            "preference_model is './nowhere', where nothing is",
        ),
        (["tiny", "--recipe", "spo", "--candidates", "1"], "candidates is 1; give a whole number from 2 to 64."),
        (["tiny", "--recipe", "spo", "--preference_threshold", "1"], "preference_threshold is 1.0"),
        (["tiny", "--recipe=spo", "--num_steps", "1"], "num_steps is 1 with divert_start=None"),
        (["tiny", "--candidates", "4"], "There is no flag --candidates"),
        (["tiny", "--recipe", "spo", "--candidate", "4"], "did you mean --candidates?"),
    ],
    ids=str,
)
def test_refused_on_the_command_line(words, message, capsys):
    assert run([*words, "--dry_run"]) == 2
    assert message in capsys.readouterr().err


def test_a_yaml_file_may_name_the_recipe(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("recipe: spo\ncandidates: 2\n")
    assert run(["tiny", "--config", str(tmp_path / "mine.yaml"), "--dry_run", "--beta", "5"]) == 0
    assert "2 candidates at each of their branching steps" in capsys.readouterr().out
