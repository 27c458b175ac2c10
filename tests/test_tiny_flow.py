"The embedded flow model: a real pipeline from shared parts, its recipe, and the bars that the shipped weights clear."

import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from transformers import CLIPTextModelWithProjection

import sdpo_nb.embedded_flow as module
from sdpo_nb.embedded import caption_table, code_directions, couple
from sdpo_nb.embedded_flow import (
    build_flow_scheduler,
    build_transformer,
    describe,
    flow_states,
    shipped_parts,
    train_embedded_flow,
)
from sdpo_nb.evaluate import read_attributes
from sdpo_nb.files import read_json, read_jsonl
from sdpo_nb.flow_families import EvenSD3Policy
from sdpo_nb.hub import quiet_loading
from sdpo_nb.models import load_policy
from sdpo_nb.samplers import FlowSampler
from sdpo_nb.shapes import all_captions, assets, load_network

results = Path(__file__).parent.parent / "benchmarks" / "results" / "flow"

PROMPTS = ["a red circle on a blue background", "a yellow star on a black background"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny_flow", device="cpu")


# a real pipeline


def test_the_pipeline_is_of_the_real_classes(policy):
    pipeline = policy.pipeline
    assert type(policy) is EvenSD3Policy and type(pipeline) is StableDiffusion3Pipeline
    assert isinstance(pipeline.text_encoder, CLIPTextModelWithProjection)
    assert pipeline.text_encoder is pipeline.text_encoder_2 and pipeline.text_encoder_3 is None
    assert policy.latent_shape == (4, 8, 8)


def test_shared_parts_are_those_of_the_first_model(policy):
    first = load_policy("tiny", device="cpu")
    for shared, own in (
        (policy.vae, first.vae),
        (policy.pipeline.text_encoder.text_model, first.pipeline.text_encoder),
    ):
        own = own.state_dict()
        assert all(torch.equal(weight, own[name]) for name, weight in shared.state_dict().items())
    assert policy.pipeline.tokenizer("a red star").input_ids == first.pipeline.tokenizer("a red star").input_ids


def test_the_transformer_is_the_one_of_the_recipe(policy):
    shipped = {name: weight.shape for name, weight in policy.denoiser.state_dict().items()}
    assert shipped == {name: weight.shape for name, weight in build_transformer().state_dict().items()}
    assert policy.scheduler.config.shift == build_flow_scheduler().config.shift == 1


def test_prompts_are_told_as_in_training(policy):
    _, tokenizer, encoder = shipped_parts()
    states, pooled = describe(tokenizer, encoder, caption_table())
    told = policy.embed(caption_table())
    assert torch.allclose(told.prompt_embeds, states, atol=1e-5) and torch.allclose(told.pooled, pooled, atol=1e-5)


def test_it_is_few_step_at_even_levels(policy):
    assert policy.noise_levels(4).tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert isinstance(policy.sampler(4), FlowSampler) and policy.sampler(4).has_density.tolist() == [True] * 3 + [False]


# the recipe


def test_states_are_those_of_a_consistency_step():
    "Below the first level only fresh noise is left; at it, only the start"
    clean, start, noise = torch.randn(3, 2, 4, 8, 8, generator=seeded())
    sampler = FlowSampler([1.0, 0.3, 0.0])
    after = sampler.step(start - clean, start, 0, noise=noise).prev_sample
    states, velocity = flow_states(clean, start, torch.full((2,), 0.3), noise)
    assert torch.allclose(states, after, atol=1e-6) and torch.equal(velocity, noise - clean)
    states, velocity = flow_states(clean, start, torch.ones(2), noise)
    assert torch.allclose(states, start) and torch.allclose(sampler.predict(velocity, states, 0)[0], clean, atol=1e-6)


@pytest.mark.slow
def test_rehearsal_of_the_whole_recipe(tmp_path):
    train_embedded_flow(tmp_path, fraction=0.0005)
    written = (tmp_path / "transformer.safetensors").stat().st_mtime_ns
    half = load_file(tmp_path / "assets" / "tiny_flow" / "transformer" / "diffusion_pytorch_model.safetensors")
    full = load_file(tmp_path / "transformer.safetensors")
    assert half.keys() >= full.keys() - {"pos_embed.pos_embed"}
    assert all(torch.equal(full[name].half(), weight) for name, weight in half.items() if name in full)
    train_embedded_flow(tmp_path, fraction=0.0005)  # goes on where it stopped: nothing is left to train
    assert (tmp_path / "transformer.safetensors").stat().st_mtime_ns == written


# what is shipped


def test_a_second_training_gave_the_weights_that_ship():
    "The appendix says so; the first training's losses are in log.jsonl"
    again = read_json(results / "repeat.json")
    shipped = assets / "tiny_flow" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert again["weights_sha256"] == sha256(shipped.read_bytes()).hexdigest()
    first = [line for line in read_jsonl(results / "log.jsonl") if "loss" in line]
    assert again["losses"] == [line["loss"] for line in first] and again["updates"] == first[-1]["step"]


def test_shipped_files_are_those_of_the_recipe(tmp_path, monkeypatch):
    "Everything but the numbers in the weights"
    module._export_flow(build_transformer(), tmp_path)
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(assets) for path in (assets / "tiny_flow").rglob("*") if path.is_file())
    assert sum(path.stat().st_size for path in (assets / "tiny_flow").rglob("*") if path.is_file()) <= 3.5e6


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


@pytest.mark.slow
def test_codes_in_the_noise_decide_what_the_caption_leaves_open(policy):
    "One step: the object's place follows the two codes that were written into the initial noise"
    noise, codes = torch.randn(2, 4, 8, 8, generator=seeded()), torch.full((2, 7), 0.5)
    codes[:, 3] = torch.tensor([0.05, 0.95])  # left, right
    noise = couple(noise[:1].repeat(2, 1, 1, 1), codes, code_directions())
    prompts = ["a white square on a black background"] * 2
    columns = policy.sample(prompts, 1, seeds=[0, 0], initial_noise=noise).mean(1).sum(1)  # [2,32]
    left, right = (columns * torch.arange(32)).sum(1) / columns.sum(1)
    assert right - left > 3


# the same steps as stock diffusers, and one LoRA for both


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_deterministic_sampling_is_the_stock_pipelines(policy, num_steps):
    "Called with prompts, as its users do"
    noise = torch.randn(2, 4, 8, 8, generator=seeded(num_steps))
    ours = policy.sample(PROMPTS, num_steps, seeds=[0, 1], initial_noise=noise, eta=0.0)
    levels = [1 - step / num_steps for step in range(num_steps)]
    options = dict(num_inference_steps=num_steps, sigmas=levels, guidance_scale=0, max_sequence_length=0)
    with quiet_loading():
        stock = policy.pipeline(list(PROMPTS), latents=noise, output_type="pt", **options).images
    assert torch.allclose(ours, stock, atol=1e-4)


def test_log_ratio_of_an_unchanged_policy_is_zero_and_lora_serves_stock_diffusers(tmp_path):
    policy = load_policy("tiny_flow", device="cpu")
    policy.add_lora(rank=4)
    sampler, embedding = policy.sampler(4), policy.embed(PROMPTS)
    x = torch.randn(2, 4, 8, 8, generator=seeded(1))
    first = sampler.step(policy.predict(x, sampler.timesteps[0], embedding), x, 0, generator=seeded(2))
    again = sampler.step(policy.predict(x, sampler.timesteps[0], embedding), x, 0, action=first.prev_sample)
    assert torch.equal(first.log_prob, again.log_prob)
    again.log_prob.sum().backward()
    trained = [weight for weight in policy.denoiser.parameters() if weight.requires_grad]
    assert trained and any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in trained)
    with torch.no_grad():
        for number, weight in enumerate(trained):
            weight.normal_(std=0.1, generator=seeded(number))
    policy.save_lora(tmp_path)
    stock = load_policy("tiny_flow", device="cpu").pipeline
    noise = torch.randn(2, 4, 8, 8, generator=seeded(3))
    options = dict(num_inference_steps=2, sigmas=[1.0, 0.5], guidance_scale=0, max_sequence_length=0)
    draw = lambda: stock(list(PROMPTS), latents=noise, output_type="pt", **options).images
    with quiet_loading():
        before = draw()
        stock.load_lora_weights(tmp_path)
        after = draw()
    ours = policy.sample(PROMPTS, 2, seeds=[0, 1], initial_noise=noise, eta=0.0)
    assert torch.allclose(ours, after, atol=1e-3) and (after - before).abs().max() > 0.01


@pytest.mark.slow
def test_the_module_is_a_command():
    done = subprocess.run([sys.executable, "-m", "sdpo_nb.embedded_flow", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "python -m sdpo_nb.embedded_flow" in done.stdout
