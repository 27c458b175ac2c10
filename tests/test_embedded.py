"The recipe of the embedded model, its rehearsal from end to end, and the bars that the shipped weights have to clear."

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import sdpo_nb.embedded as module
from sdpo_nb.embedded import (
    _check_recipe,
    bridge,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    caption_table,
    embedded_command,
    oracle_accuracy,
    reconstruction_psnr,
    taste,
    train_embedded,
)
from sdpo_nb.embedded_flow import embedded_flow_command, train_embedded_flow
from sdpo_nb.evaluate import read_attributes
from sdpo_nb.models import load_policy
from sdpo_nb.samplers import make_sampler
from sdpo_nb.shapes import all_captions, assets, load_network, random_scenes, render, scenes_from_uniform


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny", device="cpu")


# captions and tokens


def test_known_words_are_one_token_and_unknown_ones_letters(tokenizer):
    assert len(tokenizer("a yellow triangle on a brown background").input_ids) == 2 + 7
    assert tokenizer.unk_token_id not in tokenizer("zebra quilt").input_ids[1:-1]
    assert tokenizer.decode(tokenizer("a zebra").input_ids, skip_special_tokens=True).strip() == "a zebra"


@pytest.mark.slow
def test_tokenizer_is_the_same_in_every_process(tokenizer, tmp_path):
    code = "import sys; from pathlib import Path; from sdpo_nb.embedded import build_tokenizer\n"
    code += "build_tokenizer(Path(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert json.loads((tmp_path / "vocab.json").read_text()) == tokenizer.get_vocab()


# the made-up taste


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


# the bridge


def test_bridge_samples_look_like_sampled_ddim_chains():
    "By random draws, what the chapter computes: ten thousand chains against ten thousand bridges"
    sampler, alphas, count = make_sampler(build_scheduler(), 4), build_scheduler().alphas_cumprod, 10_000
    clean, start = torch.full((count, 1, 1, 1), 0.7), torch.full((count, 1, 1, 1), -1.3)
    x, generator = start, seeded()
    for i in range(2):
        velocity = (sampler.signal[i] * x - clean) / sampler.noise[i]
        x = sampler.step(velocity, x, i, generator=generator).prev_sample
    direct = bridge(clean, start, torch.full((count,), 499), alphas, torch.randn(x.shape, generator=generator))
    assert abs(x.mean() - direct.mean()) < 0.04 and abs(x.std() - direct.std()) < 0.03


# stages and the command


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
    assert _check_recipe(tmp_path, 0.002, 0) == dict(fraction=0.002, seed=0)
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
@pytest.mark.parametrize("command", [embedded_command, embedded_flow_command])
def test_the_commands_refuse_bad_input_with_a_sentence(command, arguments, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command([str(tmp_path / "new"), *arguments])
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "trained, command", [(module.train_embedded, embedded_command), (train_embedded_flow, embedded_flow_command)]
)
def test_the_commands_train(trained, command, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(f"{trained.__module__}.{trained.__name__}", lambda **recipe: asked.append(recipe))
    command([str(tmp_path), "--fraction", ".5", "--seed", "3"])
    assert asked == [dict(folder=str(tmp_path), fraction=0.5, seed=3)]


@pytest.mark.slow
def test_the_module_is_a_command():
    done = subprocess.run([sys.executable, "-m", "sdpo_nb.embedded", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "python -m sdpo_nb.embedded" in done.stdout


@pytest.mark.slow  # the chapter has a rehearsal, too
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


# what is shipped


def test_shipped_files_are_small():
    "All of them, the flow model's included; the first model's pipeline and networks"
    size = lambda *folders: sum(p.stat().st_size for f in folders for p in f.rglob("*") if p.is_file())
    assert size(assets) <= 11.5e6 and size(assets / "tiny", assets / "networks") <= 8e6


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
