"The recipe of the embedded model, its rehearsal from end to end, and the bars that the shipped weights have to clear."

import json
import math
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sdpo_nb.embedded as module
from sdpo_nb.embedded import (
    LatentWorld,
    assemble,
    bridge,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    caption_mix,
    caption_table,
    check_recipe,
    code_directions,
    coded,
    couple,
    degrade,
    embedded_command,
    fit,
    learn_merges,
    matches,
    merge_pair,
    oracle_accuracy,
    reconstruction_psnr,
    stage,
    taste,
    tokenize,
    train_embedded,
)
from sdpo_nb.evaluate import read_attributes
from sdpo_nb.files import read_jsonl
from sdpo_nb.mdp import ddim_step, make_ddim
from sdpo_nb.models import load_policy
from sdpo_nb.rewards import assets, load_network
from sdpo_nb.shapes import all_captions, parse_caption, random_scenes, render, scenes_from_uniform, shapes


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny", device="cpu")


# captions and tokens


def test_every_caption_has_its_own_tokens_and_fits(tokenizer):
    captions = caption_table()
    assert len(captions) == len(set(captions)) == 253
    assert len({tuple(row) for row in tokenize(tokenizer, captions).tolist()}) == 253
    assert max(len(tokenizer(text).input_ids) for text in captions) <= tokenizer.model_max_length
    assert math.isclose(sum(caption_mix.values()), 1)


def test_known_words_are_one_token_and_unknown_ones_letters(tokenizer):
    assert len(tokenizer("a yellow triangle on a brown background").input_ids) == 2 + 7
    assert tokenizer.unk_token_id not in tokenizer("zebra quilt").input_ids[1:-1]
    assert tokenizer.decode(tokenizer("a zebra").input_ids, skip_special_tokens=True).strip() == "a zebra"


def test_tokenizer_is_the_same_in_every_process(tokenizer, tmp_path):
    code = "import sys; from pathlib import Path; from sdpo_nb.embedded import build_tokenizer; build_tokenizer(Path(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert json.loads((tmp_path / "vocab.json").read_text()) == tokenizer.get_vocab()


def test_merges_are_learnt_by_frequency():
    vocabulary = {token: number for number, token in enumerate(["a", "b", "c", "a</w>", "b</w>", "c</w>"])}
    assert learn_merges(Counter(ab=3, cab=1, ca=1), vocabulary) == [("a", "b</w>"), ("c", "a</w>"), ("c", "ab</w>")]
    assert merge_pair(["a", "a", "a</w>"], ("a", "a")) == ["aa", "a</w>"]


# the shared loop


def test_fit_learns_and_logs(tmp_path):
    weight = nn.Parameter(torch.zeros(2))
    fit([weight], lambda step: (weight - 1).square().sum(), 200, 0.1, "line", tmp_path / "log.jsonl")
    assert torch.allclose(weight.detach(), torch.ones(2), atol=0.01)
    records = read_jsonl(tmp_path / "log.jsonl")
    assert [(record["network"], record["step"]) for record in records] == [("line", 100), ("line", 200)]
    assert records[1]["loss"] < records[0]["loss"]


@pytest.mark.parametrize("iterations", [1, 2, 3, 9, 10, 11, 20])
def test_fit_makes_exactly_the_updates_asked_for(iterations):
    weight, calls = nn.Parameter(torch.zeros(2)), []
    fit([weight], lambda step: weight.square().sum(), iterations, 0.1, after_step=calls.append)
    assert calls == list(range(iterations))


def test_fit_without_updates_is_refused():
    with pytest.raises(ValueError, match="iterations is 0; give at least one update"):
        fit([nn.Parameter(torch.zeros(1))], None, 0, 0.1)


# examples for the small networks


def test_degrade_leaves_some_images_alone_and_reports_the_others():
    images = render(random_scenes(200, seeded()))
    degraded, amount = degrade(images, seeded(1))
    same = (degraded == images).flatten(1).all(1)
    assert torch.equal(same, amount == 0) and 0.25 < same.float().mean() < 0.6
    assert 0 <= degraded.min() and degraded.max() <= 1 and amount.max() <= 1


def test_matches_agrees_with_the_attributes():
    scenes = random_scenes(100, seeded())
    hit = matches(scenes, ["", "a ring", "a red ring", "a red ring on a navy background"])
    assert hit[:, 0].all() and torch.equal(hit[:, 1], scenes.shape == shapes.index("ring"))
    assert (hit[:, 3] <= hit[:, 2]).all() and (hit[:, 2] <= hit[:, 1]).all()


def test_taste_prefers_big_centred_and_bright():
    def score(**columns):
        u = torch.full((1, 9), 0.5)
        for column, value in columns.items():
            u[0, dict(x=3, size=5, shade=7)[column]] = value
        return taste(scenes_from_uniform(u)).item()

    assert score(size=0.9) > score() > score(size=0.1)
    assert score() > score(x=0.9) and score(shade=1.0) > score(shade=0.0)
    everything = taste(random_scenes(5000, seeded()))
    assert 0 <= everything.min() and everything.max() <= 10


# noise coupling


def test_directions_are_orthonormal():
    directions = code_directions()
    assert directions.shape == (len(coded), 256)
    assert torch.allclose(directions @ directions.T, torch.eye(len(coded)), atol=1e-5)


def test_coupled_noise_holds_the_codes_and_is_still_standard_normal():
    noise, codes, directions = (
        torch.randn(20_000, 4, 8, 8, generator=seeded()),
        torch.rand(20_000, 7, generator=seeded(1)),
        code_directions(),
    )
    coupled = couple(noise, codes, directions)
    assert torch.allclose(torch.special.ndtr(coupled.flatten(1) @ directions.T), codes.clamp(1e-4, 1 - 1e-4), atol=1e-4)
    assert (coupled.flatten(1).T.cov() - torch.eye(256)).abs().max() < 0.06 and coupled.mean(0).abs().max() < 0.05
    change = (coupled - noise).flatten(1)
    assert torch.allclose(change, change @ directions.T @ directions, atol=1e-4)


def test_coupling_refuses_codes_of_another_number():
    with pytest.raises(ValueError, match=r"codes has shape \[2, 3\]; give \[2, 7\]"):
        couple(torch.randn(2, 4, 8, 8), torch.rand(2, 3), code_directions())


# the bridge


@pytest.mark.parametrize("num_steps", [1, 2, 4, 5, 8, 10, 20, 50])
def test_bridge_has_the_mean_and_variance_of_chained_ddim_steps(num_steps):
    "Follow mean and variance exactly through `ddim_step` with perfect predictions: each step is linear in its state and its noise"
    ddim, alphas = make_ddim(build_scheduler(), num_steps), build_scheduler().alphas_cumprod.double()
    clean, start = torch.randn(2, 3, 4, 8, 8, generator=seeded(), dtype=torch.float64)
    mean, variance = start, torch.zeros(1, dtype=torch.float64)
    for timestep in ddim.timesteps:

        def step(x, noise):
            velocity = (alphas[timestep].sqrt() * x - clean) / (1 - alphas[timestep]).sqrt()
            return ddim_step(ddim, velocity, timestep, x, noise=noise).prev_sample

        zero, one = torch.zeros_like(clean), torch.ones_like(clean)
        following = step(mean, zero)
        slope, scale = (step(mean + 1, zero) - following).mean(), (step(mean, one) - following).mean()
        mean, variance = following, slope**2 * variance + scale**2
        after = torch.full((3,), max(int(timestep) - 1000 // num_steps, 0))
        assert torch.allclose(bridge(clean, start, after, alphas, zero), mean, atol=1e-6)
        spread = (bridge(clean, start, after, alphas, one) - bridge(clean, start, after, alphas, zero)).mean()
        assert torch.allclose(spread**2, variance, atol=1e-6)


def test_bridge_samples_look_like_sampled_ddim_chains():
    "The same by dice: ten thousand chains against ten thousand bridges"
    ddim, alphas, count = make_ddim(build_scheduler(), 4), build_scheduler().alphas_cumprod, 10_000
    clean, start = torch.full((count, 1, 1, 1), 0.7), torch.full((count, 1, 1, 1), -1.3)
    x, generator = start, seeded()
    for timestep in ddim.timesteps[:2]:
        velocity = (alphas[timestep].sqrt() * x - clean) / (1 - alphas[timestep]).sqrt()
        x = ddim_step(ddim, velocity, timestep, x, generator=generator).prev_sample
    direct = bridge(clean, start, torch.full((count,), 499), alphas, torch.randn(x.shape, generator=generator))
    assert abs(x.mean() - direct.mean()) < 0.04 and abs(x.std() - direct.std()) < 0.03


def test_bridge_begins_at_its_start_and_ends_at_the_picture():
    alphas, clean, start, noise = build_scheduler().alphas_cumprod, *torch.randn(3, 2, 4, 8, 8, generator=seeded())
    assert torch.allclose(bridge(clean, start, torch.tensor([999, 999]), alphas, noise), start, atol=1e-5)
    assert (bridge(clean, start, torch.tensor([0, 0]), alphas, noise) - clean).abs().max() < 0.2


def test_batches_code_what_captions_leave_open_and_nothing_else():
    world = LatentWorld(build_vae(), 300)
    found, codes, captions = world.batch(300, seeded(1))
    at = torch.cdist(codes[:, 3:], world.uniform[:, 3:7]).argmin(1)
    assert torch.equal(found, world.latents[at]) and torch.equal(codes[:, 3:], world.uniform[at, 3:7])
    scenes = scenes_from_uniform(world.uniform[at])
    for column, name in enumerate(("shape", "color", "background")):
        said = torch.tensor([parse_caption(text).get(name, -1) for text in captions])
        assert torch.equal(said[said >= 0], getattr(scenes, name)[said >= 0])
        same = codes[:, column] == world.uniform[at, column]
        assert torch.equal(same, said < 0)


# stages and the command


def test_stage_trains_once(tmp_path):
    calls = []

    def train():
        calls.append(1)
        return nn.Linear(2, 1)

    first, second = (stage(tmp_path / "line.safetensors", train, lambda: nn.Linear(2, 1)) for _ in range(2))
    assert calls == [1] and torch.equal(first.weight, second.weight) and not first.weight.requires_grad
    assert [path.name for path in tmp_path.iterdir()] == ["line.safetensors"]


@pytest.mark.parametrize("fraction", [0, -1, 10.5, math.inf, math.nan, True, "all", None])
def test_impossible_fractions_are_refused(fraction, tmp_path):
    with pytest.raises(ValueError, match="give a number above 0 and at most 10"):
        train_embedded(tmp_path, fraction)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, False, "one"])
def test_impossible_seeds_are_refused(seed, tmp_path):
    with pytest.raises(ValueError, match="seed is .*; give a whole number"):
        train_embedded(tmp_path, 1, seed)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "note").write_text("")
    with pytest.raises(ValueError, match="which is a file; give the name of a folder"):
        train_embedded(tmp_path / "note")


def test_a_folder_keeps_to_its_recipe(tmp_path):
    (tmp_path / "recipe.json").write_text('{"fraction": 0.002, "seed": 0}')
    assert check_recipe(tmp_path, 0.002, 0) == dict(fraction=0.002, seed=0)
    for fraction, seed in ((1, 0), (0.002, 1)):
        with pytest.raises(ValueError, match="go on with those numbers or give another folder"):
            train_embedded(tmp_path, fraction, seed)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--fraction", "0"], "fraction is 0.0; give a number above 0"),
        (["--fraction", "half"], "invalid float value: 'half'"),
        (["--fraction", "nan"], "fraction is nan"),
        (["--seed", "-3"], "seed is -3; give a whole number"),
        (["--seed", "x"], "invalid int value: 'x'"),
    ],
)
def test_the_command_refuses_bad_input_with_a_sentence(arguments, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        embedded_command([str(tmp_path / "new"), *arguments])
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_command_trains(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "train_embedded", lambda **recipe: asked.append(recipe))
    embedded_command([str(tmp_path), "--fraction", ".5", "--seed", "3"])
    assert asked == [dict(folder=str(tmp_path), fraction=0.5, seed=3)]


def test_the_module_is_a_command():
    done = subprocess.run([sys.executable, "-m", "sdpo_nb.embedded", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "python -m sdpo_nb.embedded" in done.stdout


def test_rehearsal_of_the_whole_recipe(tmp_path):
    train_embedded(tmp_path, fraction=0.0005)
    weights = sorted(tmp_path.glob("*.safetensors"))
    assert [path.stem for path in weights] == ["aesthetic", "alignment", "oracle", "unet", "vae"]
    policy = load_policy(tmp_path / "assets" / "tiny", device="cpu")
    assert policy.sample(["a red star", ""], 2, seeds=[0, 1]).shape == (2, 3, 32, 32)
    assert {path.stem for path in (tmp_path / "assets" / "networks").iterdir()} == {"oracle", "alignment", "aesthetic"}
    written, vocabulary = (
        [path.stat().st_mtime_ns for path in weights],
        (tmp_path / "tokenizer" / "vocab.json").read_text(),
    )
    train_embedded(tmp_path, fraction=0.0005)  # goes on where it stopped: nothing is left to train
    assert [path.stat().st_mtime_ns for path in weights] == written
    assert (tmp_path / "tokenizer" / "vocab.json").read_text() == vocabulary


def test_untrained_parts_make_a_stock_pipeline(tokenizer):
    pipeline = assemble(build_vae(), build_text_encoder(tokenizer), tokenizer, build_unet())
    picture = pipeline("a red star", num_inference_steps=2, guidance_scale=0.0, output_type="pt").images
    assert picture.shape == (1, 3, 32, 32)


# what is shipped


def test_shipped_files_are_at_most_eight_megabytes():
    assert sum(path.stat().st_size for path in assets.rglob("*") if path.is_file()) <= 8e6


def test_shipped_parts_are_those_of_the_recipe(policy, tokenizer):
    def count(part):
        return sum(parameter.numel() for parameter in part.parameters())

    shipped = policy.pipeline
    assert [count(part) for part in (shipped.unet, shipped.vae, shipped.text_encoder)] == [
        count(part) for part in (build_unet(), build_vae(), build_text_encoder(tokenizer))
    ]
    for text in caption_table():
        assert shipped.tokenizer.convert_ids_to_tokens(
            shipped.tokenizer(text).input_ids
        ) == tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    expected = dict(build_scheduler().config)
    assert {name: shipped.scheduler.config[name] for name in expected if not name.startswith("_")} == {
        name: value for name, value in expected.items() if not name.startswith("_")
    }


def test_shipped_autoencoder_copies_well(policy):
    assert reconstruction_psnr(policy.vae, n=256) >= 28
    latents = (
        policy.vae.encode(render(random_scenes(256, seeded(4))) * 2 - 1).latent_dist.mode()
        * policy.vae.config.scaling_factor
    )
    assert abs(latents.std() - 1) < 0.05


def test_shipped_oracle_reads_fresh_renders():
    assert min(oracle_accuracy(load_network("oracle"), n=1024).values()) >= 0.97


def test_shipped_taste_is_the_decreed_one():
    scenes = random_scenes(512, seeded(5))
    assert F.mse_loss(load_network("aesthetic")(render(scenes)), taste(scenes)) < 0.25 * taste(scenes).var()


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 16, 50])
def test_shipped_model_paints_what_captions_name(policy, num_steps):
    captions = all_captions()
    prompts = [captions[index * 7 % len(captions)] for index in range(512)]
    images = policy.sample(prompts, num_steps, seeds=range(512))
    agreement = {
        name: right.mean().item() for name, right in read_attributes(load_network("oracle"), images, prompts).items()
    }
    assert agreement["shape"] >= 0.85 and agreement["color"] >= 0.95 and agreement["background"] >= 0.98, agreement
