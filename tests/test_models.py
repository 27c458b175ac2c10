"Pipelines as policies: the same pictures as stock diffusers, LoRAs that survive the trip, and failures that say what to do."

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from random_pipelines import random_stable_diffusion
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sdpo_nb import models
from sdpo_nb.models import PromptEmbedding, load_policy, sort_header

STEP_COUNTS = [1, 2, 4, 8, 16, 50]
PROMPTS = ["a red circle", "a blue cat", "a red circle"]
SEEDS = [3, 1, 2]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    random_stable_diffusion(folder, prediction_type=request.param)
    return folder


@pytest.fixture(scope="module")
def epsilon_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    random_stable_diffusion(folder)
    return folder


@pytest.fixture
def policy(epsilon_folder):
    return load_policy(epsilon_folder, device="cpu")


def nudged(policy, size=0.3):
    "The policy with a LoRA that really changes its output."
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return policy


def stock_pipeline(folder, **scheduler):
    "What a user has: diffusers alone."
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if scheduler:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **scheduler)
    return pipeline


def stock_images(pipeline, num_steps, **arguments):
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipeline(
        PROMPTS, num_inference_steps=num_steps, guidance_scale=0.0, generator=generators, output_type="pt", **arguments
    ).images


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    "A policy with a LoRA whose alpha is not its rank, and a stock pipeline that loaded that LoRA from our file."
    policy = nudged(load_policy(folder, device="cpu").add_lora(rank=4, alpha=12))
    saved = tmp_path_factory.mktemp("lora")
    policy.save_lora(saved)
    pipeline = stock_pipeline(folder, timestep_spacing="trailing")
    pipeline.load_lora_weights(saved)
    return policy, pipeline


# --- the same pictures as stock diffusers


@pytest.mark.parametrize("num_steps", STEP_COUNTS)
def test_sampler_equals_stock_ddim_with_our_lora(trained, num_steps):
    policy, pipeline = trained
    torch.testing.assert_close(
        policy.sample(PROMPTS, num_steps, seeds=SEEDS), stock_images(pipeline, num_steps, eta=1.0), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("num_steps", STEP_COUNTS)
def test_sampler_equals_stock_ddim_from_given_noise(trained, num_steps):
    policy, pipeline = trained
    noise = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(9))
    ours = policy.sample(PROMPTS, num_steps, seeds=SEEDS, initial_noise=noise)
    torch.testing.assert_close(
        ours, stock_images(pipeline, num_steps, eta=1.0, latents=noise.clone()), rtol=0, atol=1e-4
    )


def test_the_lora_matters_in_that_comparison(trained):
    policy, _ = trained
    with policy.without_lora():
        original = policy.sample(PROMPTS, 4, seeds=SEEDS)
    assert (policy.sample(PROMPTS, 4, seeds=SEEDS) - original).abs().max() > 1e-2


def test_eta_zero_ignores_the_noise_of_the_steps(policy):
    noise = torch.randn(3, *policy.latent_shape)
    one, other = (
        policy.sample(PROMPTS, 4, initial_noise=noise, seeds=seeds, eta=0.0) for seeds in ([0, 1, 2], [7, 8, 9])
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_own_scheduler_is_the_stock_call(tmp_path, num_steps):
    pipeline = random_stable_diffusion(tmp_path)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, device="cpu")
    assert isinstance(policy.own_scheduler, EulerDiscreteScheduler) and isinstance(policy.scheduler, DDIMScheduler)
    assert not policy.scheduler.config.clip_sample
    ours = policy.sample(PROMPTS, num_steps, seeds=SEEDS, own_scheduler=True)
    torch.testing.assert_close(ours, stock_images(stock_pipeline(tmp_path), num_steps), rtol=0, atol=1e-4)
    policy.sample(PROMPTS, num_steps, seeds=SEEDS)
    assert isinstance(policy.own_scheduler, EulerDiscreteScheduler)


def test_pictures_depend_on_their_own_seed_alone(policy):
    together = policy.sample(PROMPTS, 4, seeds=SEEDS)
    for index in range(3):
        alone = policy.sample(PROMPTS[index : index + 1], 4, seeds=SEEDS[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(policy.sample(PROMPTS, 4, seeds=SEEDS, batch_size=2), together, rtol=0, atol=1e-5)
    assert (policy.sample([PROMPTS[0]] * 2, 4, seeds=[1, 2]).diff(dim=0)).abs().max() > 1e-2


def test_without_seeds_the_global_generator_decides(policy):
    pictures = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        pictures.append(policy.sample(PROMPTS, 2))
    assert torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])


def test_latents_on_request(policy):
    latents = policy.sample(PROMPTS, 2, seeds=SEEDS, return_latents=True)
    assert latents.shape == (3, *policy.latent_shape)
    assert torch.equal(policy.decode(latents), policy.sample(PROMPTS, 2, seeds=SEEDS))


# --- prompts


def test_prompts_are_encoded_once_and_each_by_itself(policy, monkeypatch):
    encoded, encode = [], policy.pipeline.encode_prompt
    monkeypatch.setattr(
        policy.pipeline,
        "encode_prompt",
        lambda prompt, *rest, **options: encoded.append(prompt) or encode(prompt, *rest, **options),
    )
    first = policy.embed(PROMPTS)
    policy.embed(PROMPTS[::-1])
    assert encoded == ["a red circle", "a blue cat"]
    assert torch.equal(first[0].prompt_embeds, first[2].prompt_embeds) and not first.prompt_embeds.requires_grad
    monkeypatch.setattr(models, "most_embedded", 1)
    assert torch.equal(policy.embed(PROMPTS).prompt_embeds, first.prompt_embeds) and len(policy._embedded_prompts) == 1


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    assert models.own_device() == "cpu" or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert models.own_device() == "cuda:0"
    for rank, device in (("3", "cuda:3"), ("5", "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert models.own_device() == device


def test_embeddings_equal_those_of_the_stock_pipeline(policy, epsilon_folder):
    stock, _ = stock_pipeline(epsilon_folder).encode_prompt(PROMPTS, "cpu", 1, False)
    torch.testing.assert_close(policy.embed(PROMPTS).prompt_embeds, stock)


def test_embedding_algebra():
    embedding = PromptEmbedding(torch.arange(6.0).reshape(3, 2, 1))
    for index, expected in ((1, [1]), ([2, 0], [2, 0]), (torch.tensor([0, 0]), [0, 0]), (slice(1, None), [1, 2])):
        assert torch.equal(embedding[index].prompt_embeds, embedding.prompt_embeds[expected])
    assert torch.equal(embedding.repeat(2).prompt_embeds, PromptEmbedding.cat([embedding, embedding]).prompt_embeds)
    assert len(embedding) == 3


def test_prompts_longer_than_the_tokenizer_allows_are_cut(policy):
    assert (
        policy.embed(["a red circle on a blue background " * 4]).prompt_embeds.shape[1]
        == policy.pipeline.tokenizer.model_max_length
    )


@pytest.mark.parametrize("prompts", ["a cat", [], [3]])
def test_prompts_must_be_a_list_of_strings(policy, prompts):
    with pytest.raises(ValueError, match="write \\['a prompt'\\]"):
        policy.embed(prompts)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(seeds=[1]), "seeds has length 1 for 3 prompts"),
        (dict(initial_noise=torch.zeros(2, 4, 8, 8)), "initial_noise has length 2 for 3 prompts"),
        (dict(num_steps=0), "num_steps is 0"),
        (dict(num_steps=1001), "num_steps is 1001"),
    ],
)
def test_impossible_sampling_is_refused(policy, arguments, message):
    with pytest.raises(ValueError, match=message):
        policy.sample(PROMPTS, **(dict(num_steps=2) | arguments))


# --- prediction and decoding


def test_predict_takes_one_time_or_one_per_sample(policy):
    latents, embedding = torch.randn(3, *policy.latent_shape), policy.embed(PROMPTS)
    mixed = policy.predict(latents, torch.tensor([999, 499, 19]), embedding)
    for index, timestep in enumerate([999, 499, 19]):
        torch.testing.assert_close(policy.predict(latents, timestep, embedding)[index], mixed[index], rtol=0, atol=1e-5)


def test_every_prediction_goes_through_the_forward_module(policy):
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *arguments, **options):
            self.calls += 1
            return self.module(*arguments, **options)

    policy.forward_module = Wrapper(policy.unet)
    policy.predict(torch.randn(3, *policy.latent_shape), 999, policy.embed(PROMPTS))
    policy.sample(PROMPTS, 4, seeds=SEEDS)
    assert policy.forward_module.calls == 5


def test_decode_is_that_of_the_stock_pipeline_and_lets_gradients_through(policy, epsilon_folder):
    latents = torch.randn(5, *policy.latent_shape)
    stock = stock_pipeline(epsilon_folder)
    with torch.no_grad():
        expected = stock.image_processor.postprocess(
            stock.vae.decode(latents / stock.vae.config.scaling_factor).sample, "pt"
        )
    torch.testing.assert_close(policy.decode(latents, batch_size=2), expected, rtol=0, atol=1e-5)
    policy.decode(latents.requires_grad_()).sum().backward()
    assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_the_learning_part_in_float32(epsilon_folder, precision):
    policy = nudged(load_policy(epsilon_folder, device="cpu", precision=precision).add_lora())
    assert policy.dtype == models.precisions[precision] and next(policy.unet.parameters()).dtype == policy.dtype
    assert {parameter.dtype for parameter in policy.trainable_parameters().values()} == {torch.float32}
    output = policy.predict(torch.randn(3, *policy.latent_shape), 499, policy.embed(PROMPTS))
    output.square().mean().backward()
    assert output.dtype == torch.float32
    assert all(
        parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
        for parameter in policy.trainable_parameters().values()
    )
    for own_scheduler in (False, True):
        images = policy.sample(PROMPTS, 2, seeds=SEEDS, own_scheduler=own_scheduler)
        assert images.dtype == torch.float32 and images.isfinite().all()


# --- LoRA


def test_a_fresh_lora_changes_nothing_and_disturbs_no_generator(policy):
    latents, embedding = torch.randn(3, *policy.latent_shape), policy.embed(PROMPTS)
    before, state = policy.predict(latents, 999, embedding), torch.get_rng_state()
    policy.add_lora(rank=3)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(policy.predict(latents, 999, embedding), before)
    assert list(policy.trainable_parameters()) == [name for name, _ in policy.unet.named_parameters() if "lora" in name]


def test_lora_reaches_every_attention_projection(policy):
    policy.add_lora()
    projections = [
        name for name, _ in policy.unet.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    ]
    assert projections and len(policy.trainable_parameters()) == 2 * len(projections)


def test_the_seed_fixes_the_start(policy):
    states = [policy.add_lora(seed=seed).lora_state() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_without_lora_is_the_original_and_comes_back_even_after_an_error(policy):
    latents, embedding = torch.randn(3, *policy.latent_shape), policy.embed(PROMPTS)
    original = policy.predict(latents, 999, embedding)
    with policy.without_lora():
        assert torch.equal(policy.predict(latents, 999, embedding), original)
    changed = nudged(policy.add_lora()).predict(latents, 999, embedding)
    with pytest.raises(RuntimeError), policy.without_lora():
        assert torch.equal(policy.predict(latents, 999, embedding), original)
        raise RuntimeError
    again = policy.predict(latents, 999, embedding)
    assert torch.equal(again, changed) and again.requires_grad


def test_gradients_survive_a_visit_to_the_reference(policy):
    latents, embedding = torch.randn(3, *policy.latent_shape), policy.embed(PROMPTS)
    output = nudged(policy.add_lora()).predict(latents, 999, embedding)
    with policy.without_lora(), torch.no_grad():
        reference = policy.predict(latents, 999, embedding)
    (output - reference).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in policy.trainable_parameters().values())


def test_lora_state_round_trip(policy):
    state = nudged(policy.add_lora(alpha=8)).lora_state()
    expected = policy.predict(torch.ones(1, *policy.latent_shape), 9, policy.embed(["a cat"]))
    policy.add_lora(alpha=8, seed=4).load_lora_state(state)
    assert torch.equal(policy.predict(torch.ones(1, *policy.latent_shape), 9, policy.embed(["a cat"])), expected)
    for wrong in (
        dict(list(state.items())[1:]),
        state | {"extra": torch.zeros(1)},
        {name: tensor[:1] for name, tensor in state.items()},
    ):
        with pytest.raises(ValueError, match="use the lora_rank of the checkpoint"):
            policy.load_lora_state(wrong)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_loading_keeps_alpha_folds_the_scale_and_can_be_saved_again(epsilon_folder, tmp_path, scale):
    policy = nudged(load_policy(epsilon_folder, device="cpu").add_lora(rank=2, alpha=7))
    file = policy.save_lora(tmp_path / "first")
    again = load_policy(epsilon_folder, device="cpu").load_lora(file if scale == 1 else file.parent, scale=scale)
    assert {parameter.dtype for parameter in again.trainable_parameters().values()} == {torch.float32}
    assert list(again.trainable_parameters()) == list(policy.trainable_parameters())
    nudged(policy, 0.3 * scale)
    expected = policy.sample(PROMPTS, 4, seeds=SEEDS)
    torch.testing.assert_close(again.sample(PROMPTS, 4, seeds=SEEDS), expected, rtol=0, atol=1e-5)
    again.save_lora(tmp_path / "second")
    pipeline = stock_pipeline(epsilon_folder, timestep_spacing="trailing")
    pipeline.load_lora_weights(tmp_path / "second")
    torch.testing.assert_close(stock_images(pipeline, 4, eta=1.0), expected, rtol=0, atol=1e-4)


def test_a_half_precision_policy_saves_and_loads_float32_exactly(epsilon_folder, tmp_path):
    policy = nudged(load_policy(epsilon_folder, device="cpu", precision="bf16").add_lora())
    policy.save_lora(tmp_path)
    again = load_policy(epsilon_folder, device="cpu", precision="bf16").load_lora(tmp_path)
    assert all(torch.equal(again.lora_state()[name], tensor) for name, tensor in policy.lora_state().items())


def test_the_older_names_of_lora_files_are_understood(policy, tmp_path):
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    nudged(policy.add_lora())
    expected = policy.lora_state()
    layers = convert_state_dict_to_diffusers(
        get_peft_model_state_dict(policy.unet)
    )  # lora.down and lora.up for A and B
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    policy.load_lora(tmp_path)
    assert all(torch.equal(policy.lora_state()[name], tensor) for name, tensor in expected.items())


def test_an_interrupted_save_leaves_the_earlier_file(policy, tmp_path, monkeypatch):
    file = policy.add_lora().save_lora(tmp_path)
    before = file.read_bytes()

    def interrupted(unfinished, **options):
        with open(os.path.join(unfinished, file.name), "wb") as half:
            half.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(StableDiffusionPipeline, "save_lora_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nudged(policy).save_lora(tmp_path)
    assert os.listdir(tmp_path) == [file.name] and file.read_bytes() == before


class Upwards(set):
    "A set in one of the orders that a set of strings may have in another process"

    def __iter__(self):
        return iter(sorted(set.__iter__(self)))


class Downwards(set):
    "The same in the opposite order"

    def __iter__(self):
        return iter(sorted(set.__iter__(self), reverse=True))


def test_equal_runs_save_equal_bytes(epsilon_folder, tmp_path):
    written = []
    for order in (Upwards, Downwards):
        policy = nudged(load_policy(epsilon_folder, device="cpu").add_lora())
        policy.unet.peft_config["default"].target_modules = order(policy.unet.peft_config["default"].target_modules)
        written += [
            policy.save_lora(tmp_path / order.__name__).read_bytes() for _ in range(4)
        ]  # a header's own order differs from one save to the next
    assert len(set(written)) == 1


def test_the_saved_configuration_is_sorted(policy, tmp_path):
    file = policy.add_lora(targets=("to_v", "to_k", "to_q")).save_lora(tmp_path)
    with safe_open(file, "pt") as opened:
        notes = opened.metadata()
    assert json.loads(notes["lora_adapter_metadata"])["unet.target_modules"] == ["to_k", "to_q", "to_v"]
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    assert list(header["__metadata__"]) == ["format", "lora_adapter_metadata"]


@pytest.mark.parametrize("notes", [None, {"b": 'ü€ "quoted" \n', "a": "1", "c": "\u2028"}])
def test_sorting_a_header_keeps_everything(tmp_path, notes):
    tensors, file = {"x": torch.randn(3, 5), "half": torch.randn(7).half()}, tmp_path / "any.safetensors"
    save_file(tensors, file, metadata=notes)
    sort_header(file)
    assert (
        all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(file).items())
        and len(load_file(file)) == 2
    )
    with safe_open(file, "pt") as opened:
        assert (opened.metadata() or None) == notes
    once = file.read_bytes()
    sort_header(file)
    assert file.read_bytes() == once and int.from_bytes(once[:8], "little") % 8 == 0


def test_lora_misuse(policy, tmp_path):
    with pytest.raises(ValueError, match="call add_lora first"):
        policy.save_lora(tmp_path)
    with pytest.raises(ValueError, match="lora_rank=0 must be at least 1"):
        policy.add_lora(rank=0)
    with pytest.raises(OSError, match="There is no LoRA"):
        policy.load_lora(tmp_path / "missing")
    with pytest.raises(OSError, match="Could not load "):
        policy.load_lora(tmp_path)
    file = policy.add_lora().save_lora(tmp_path)
    os.truncate(file, 100)
    with pytest.raises(OSError, match="is damaged"):
        policy.load_lora(tmp_path)
    assert policy.has_lora


# --- loading, and what can go wrong


def test_everything_is_frozen_quiet_and_on_the_device_asked_for(policy):
    for module in (policy.unet, policy.vae, policy.pipeline.text_encoder):
        assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())
    assert policy.device.type == "cpu" and policy.latent_shape == (4, 8, 8) and policy.trainable_parameters() == {}
    assert policy.scheduler.config.timestep_spacing == "trailing"


def test_device_and_dtype_follow_the_weights_and_cost_next_to_nothing(policy, monkeypatch):
    policy.add_lora()
    policy.pipeline.to(dtype=torch.bfloat16)
    policy.unet.to("meta")  # a device that every machine has
    assert (policy.device.type, policy.dtype) == ("meta", torch.bfloat16)
    visited, walk = [], torch.nn.Module.named_modules

    def counted(module, *arguments, **options):
        for found in walk(module, *arguments, **options):
            visited.append(found)
            yield found

    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
    assert policy.device.type == "meta" and policy.dtype == torch.bfloat16
    assert len(visited) < 20 < len(list(walk(policy.unet)))  # `predict` asks for both at every call


def test_loading_restores_the_verbosity_of_the_libraries(epsilon_folder):
    from diffusers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_policy(epsilon_folder, device="cpu")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.fixture
def damaged(epsilon_folder, tmp_path):
    return shutil.copytree(epsilon_folder, tmp_path / "damaged")


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
@pytest.mark.parametrize("length", [5, 5000, -1])
def test_truncated_weights_are_named(damaged, file, length):
    os.truncate(damaged / file, length if length > 0 else (damaged / file).stat().st_size - 1)
    with pytest.raises(OSError, match=f"{file} is damaged"):
        load_policy(damaged)


def test_the_embedded_policy_missing_or_damaged(damaged, monkeypatch):
    monkeypatch.setitem(models.embedded_policies, "tiny", damaged)
    assert load_policy("tiny", device="cpu").name == "tiny"
    os.truncate(damaged / "vae/diffusion_pytorch_model.safetensors", 1000)
    with pytest.raises(OSError, match="is damaged .*reinstall sdpo_nb"):
        load_policy("tiny")
    shutil.rmtree(damaged)
    with pytest.raises(OSError, match="'tiny' is missing .*reinstall sdpo_nb"):
        load_policy("tiny")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "model_index.json").unlink(), "no file named model_index.json"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "not a valid JSON"),
        (lambda folder: shutil.rmtree(folder / "unet"), "Could not load "),
        (lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{"), "Could not load "),
    ],
)
def test_broken_folders(damaged, damage, message):
    damage(damaged)
    with pytest.raises(OSError, match=message) as caught:
        load_policy(damaged)
    assert "\n" not in str(caught.value)


def test_other_classes_are_refused_before_their_weights_are_read(damaged):
    index = damaged / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "FluxPipeline"))
    shutil.rmtree(damaged / "unet")
    with pytest.raises(ValueError, match="is a FluxPipeline, .*choose a StableDiffusionPipeline"):
        load_policy(damaged)


@pytest.mark.parametrize("name", ["tinny", "./nowhere", "/nowhere/at/all", "~/nowhere", "runs/some/folder"])
def test_paths_that_lead_nowhere(name):
    with pytest.raises(OSError, match="no folder here and no hub id: give 'tiny'"):
        load_policy(name)


def test_unknown_precision(epsilon_folder):
    with pytest.raises(ValueError, match="precision='fp8' is unknown: choose one of fp32, fp16, bf16"):
        load_policy(epsilon_folder, precision="fp8")


class ConnectError(Exception):
    "What the hub's HTTP client raises without a network; its module depends on the version."


def answer(status):
    "As much of an HTTP response as the hub's errors look at."
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    "failure, message",
    [
        (lambda: GatedRepoError("403", response=answer(403)), "its licence must be accepted"),
        (lambda: RepositoryNotFoundError("404", response=answer(404)), "the hub has no such model"),
        (lambda: LocalEntryNotFoundError("offline"), "the hub cannot be reached"),
        (lambda: ConnectError("offline"), "the hub cannot be reached"),
    ],
)
def test_hub_failures_are_told_apart(monkeypatch, failure, message):
    def unreachable(*arguments, **options):
        raise failure()

    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", unreachable)
    with pytest.raises(OSError, match=f"Could not load 'someone/model': .*{message}") as caught:
        load_policy("someone/model")
    assert "\n" not in str(caught.value)


def test_stock_diffusers_draws_with_the_embedded_pipeline_as_it_lies():
    "Without any argument about precision: transformers goes by the dtype of the text encoder's config, diffusers by float32"
    stock = StableDiffusionPipeline.from_pretrained(
        models.policy_folder("tiny"), safety_checker=None, requires_safety_checker=False
    )
    assert stock.text_encoder.dtype == stock.unet.dtype == stock.vae.dtype == torch.float32
    assert stock("a red circle", num_inference_steps=2, guidance_scale=0.0).images[0].size == (32, 32)


def test_every_process_reads_its_own_weights(monkeypatch):
    "What accelerate launch sets by default would leave text encoder and rewards without weights on all processes but one"
    from sdpo_nb.models import quiet_loading

    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with quiet_loading():
        assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    monkeypatch.delenv("FSDP_CPU_RAM_EFFICIENT_LOADING")
    with quiet_loading():
        assert "FSDP_CPU_RAM_EFFICIENT_LOADING" not in os.environ
