"Pipelines as policies: the same pictures as stock diffusers, and failures that say what to do."

import os
import shutil
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, StableDiffusionPipeline
from huggingface_hub.errors import LocalEntryNotFoundError
from random_pipelines import SCHEDULER, nudged, stock_images, stock_pipeline

from sdpo_nb import models
from sdpo_nb.models import Policy, PromptEmbedding, load_policy

PROMPTS = ["a red circle", "a blue cat", "a red circle"]
SEEDS = [3, 1, 2]


def near(one, other):
    "Up to the rounding of float32 in networks of this depth, a thousand times that of a single operation"
    assert one.shape == other.shape and (one - other).abs().max() <= 1e-4 * other.abs().max()


@pytest.fixture(scope="module")
def folder(random_folder):
    return random_folder()


@pytest.fixture
def policy(folder):
    return load_policy(folder, device="cpu")


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def trained(request, random_folder, tmp_path_factory):
    "A policy with a LoRA whose alpha is not its rank, and a stock pipeline that loaded that LoRA from our file"
    folder = random_folder(prediction_type=request.param)
    policy = nudged(load_policy(folder, device="cpu").add_lora(rank=4, alpha=12))
    saved = tmp_path_factory.mktemp("lora")
    policy.save_lora(saved)
    pipeline = stock_pipeline(folder, timestep_spacing="trailing")
    pipeline.load_lora_weights(saved)
    return policy, pipeline


# --- the same pictures as stock diffusers


@pytest.mark.parametrize("num_steps", [1, 2, 4, pytest.param(16, marks=pytest.mark.slow)])
def test_sampler_equals_stock_ddim_with_our_lora(trained, num_steps):
    "Other counts, without a LoRA: in the notebook"
    policy, pipeline = trained
    ours, stock = (
        policy.sample(PROMPTS, num_steps, seeds=SEEDS),
        stock_images(pipeline, PROMPTS, SEEDS, num_steps, eta=1.0),
    )
    near(ours, stock)


def test_sampler_equals_stock_ddim_from_given_noise(trained):
    policy, pipeline = trained
    noise = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(9))
    ours = policy.sample(PROMPTS, 4, seeds=SEEDS, initial_noise=noise)
    stock = stock_images(pipeline, PROMPTS, SEEDS, 4, eta=1.0, latents=noise.clone())
    near(ours, stock)


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


def test_own_scheduler_is_the_stock_call(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    pipeline = stock_pipeline(tmp_path)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, device="cpu")
    assert isinstance(policy.own_scheduler, EulerDiscreteScheduler)
    ours = policy.sample(PROMPTS, 4, seeds=SEEDS, own_scheduler=True)
    stock = stock_images(stock_pipeline(tmp_path), PROMPTS, SEEDS, 4)
    near(ours, stock)
    trained = load_policy(folder, device="cpu").sample(PROMPTS, 4, seeds=SEEDS)
    assert torch.equal(policy.sample(PROMPTS, 4, seeds=SEEDS), trained)  # DDIM on the same noise levels
    assert isinstance(policy.own_scheduler, EulerDiscreteScheduler)


def test_training_goes_by_the_published_noise_levels(folder):
    "Whatever the pipeline samples with later; another spacing is told once, and an impossible scheduler refused"
    pipeline = stock_pipeline(folder)
    pipeline.scheduler = DDIMScheduler(**SCHEDULER | dict(timestep_spacing="leading"))
    with pytest.warns(UserWarning, match="changed from 'leading' to 'trailing'"):
        policy = Policy(pipeline)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = policy.sampler(4)
    pipeline.scheduler = EulerDiscreteScheduler(beta_start=0.1, beta_end=0.2)
    assert torch.equal(policy.sampler(4).signal, sampler.signal) and sampler.timesteps.tolist() == [999, 749, 499, 249]
    pipeline.scheduler = DDIMScheduler(**SCHEDULER | dict(thresholding=True))
    with pytest.raises(ValueError, match="thresholding is True"):
        Policy(pipeline)


def test_pictures_depend_on_their_own_seed_alone(policy):
    together = policy.sample(PROMPTS, 4, seeds=SEEDS)
    for index in range(3):
        alone = policy.sample(PROMPTS[index : index + 1], 4, seeds=SEEDS[index : index + 1])
        near(together[index : index + 1], alone)
    near(policy.sample(PROMPTS, 4, seeds=SEEDS, batch_size=2), together)
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
    monkeypatch.setattr(models, "_most_embedded", 1)
    assert torch.equal(policy.embed(PROMPTS).prompt_embeds, first.prompt_embeds) and len(policy._embedded_prompts) == 1


def test_embeddings_equal_those_of_the_stock_pipeline(policy, folder):
    stock, _ = stock_pipeline(folder).encode_prompt(PROMPTS, "cpu", 1, False)
    near(policy.embed(PROMPTS).prompt_embeds, stock)


@pytest.mark.parametrize(
    "index, expected", [(1, [1]), ([2, 0], [2, 0]), (torch.tensor([0, 0]), [0, 0]), (slice(1, None), [1, 2])]
)
def test_embeddings_are_indexed_like_tensors(index, expected):
    embedding = PromptEmbedding(torch.arange(6.0).reshape(3, 2, 1))
    assert torch.equal(embedding[index].prompt_embeds, embedding.prompt_embeds[expected])


LONG = "a red circle on a blue background a square cat"


def test_prompts_longer_than_the_tokenizer_allows_are_cut_and_that_is_said_once(policy, capfd):
    "As the stock pipeline does it, which says so where nobody hears it"
    most = policy.pipeline.tokenizer.model_max_length
    assert policy.count_tokens([LONG, "a cat", ""]) == [len(policy.pipeline.tokenizer(LONG).input_ids), 4, 2]
    assert policy.count_tokens([LONG])[0] > most == 10
    with pytest.warns(
        UserWarning, match=r"has \d+ tokens, of which '.*' reads 10: 'square cat' is lost to it, though not"
    ) as told:
        embedded = policy.embed([LONG, "a cat"])
        policy.embed([LONG + " a dog", LONG])
    assert capfd.readouterr().err == ""  # nor a line for every further prompt
    assert len(told) == 1 and "red" not in str(told[0].message).partition("reads 10")[2]
    assert embedded.prompt_embeds.shape[1] == most
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_policy(policy.name, device="cpu").embed(["a red circle on a cat"])  # just short enough


@pytest.mark.parametrize("prompts", [[], [3]])
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
        near(policy.predict(latents, timestep, embedding)[index], mixed[index])


def test_every_prediction_goes_through_the_forward_module(policy):
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *arguments, **options):
            self.calls += 1
            return self.module(*arguments, **options)

    policy.forward_module = Wrapper(policy.denoiser)
    policy.predict(torch.randn(3, *policy.latent_shape), 999, policy.embed(PROMPTS))
    policy.sample(PROMPTS, 4, seeds=SEEDS)
    assert policy.forward_module.calls == 5


def test_decode_is_that_of_the_stock_pipeline_and_lets_gradients_through(policy, folder):
    latents = torch.randn(5, *policy.latent_shape)
    stock = stock_pipeline(folder)
    with torch.no_grad():
        expected = stock.image_processor.postprocess(
            stock.vae.decode(latents / stock.vae.config.scaling_factor).sample, "pt"
        )
    near(policy.decode(latents, batch_size=2), expected)
    policy.decode(latents.requires_grad_()).sum().backward()
    assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_latents_that_are_no_numbers_are_no_pictures(policy, number):
    latents = torch.zeros(3, *policy.latent_shape)
    latents[1, 0, 2, 2] = number
    with pytest.raises(
        FloatingPointError, match=r"\(its latents\) is not finite in fp32: lower the learning rate or the"
    ):
        policy.decode(latents, batch_size=1)


@pytest.mark.parametrize("own_scheduler", [False, True])
def test_a_network_that_overflows_is_named(folder, own_scheduler):
    policy = load_policy(folder, device="cpu", precision="fp16")
    with torch.no_grad():
        policy.denoiser.conv_out.weight.fill_(6e4)
    with pytest.raises(FloatingPointError, match="latents.* is not finite in fp16: use precision 'bf16' or 'fp32', or"):
        policy.sample(PROMPTS, 2, seeds=SEEDS, own_scheduler=own_scheduler)


def test_a_decoder_that_overflows_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "vae" / "config.json"
    assert '"force_upcast": true' in config.read_text()
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        reference = load_policy(tmp_path, device="cpu")
        reference.vae.decoder.conv_in.weight.mul_(1e5)
        reference.vae.save_pretrained(tmp_path / "vae")
        expected = reference.decode(latents)
        half = load_policy(tmp_path, device="cpu", precision="fp16")  # it says that it needs float32, and gets it
        assert (half.dtype, half.vae.dtype) == (torch.float16, torch.float32)
        near(half.decode(latents), expected)
        config.write_text(config.read_text().replace('"force_upcast": true', '"force_upcast": false'))
        half = load_policy(tmp_path, device="cpu", precision="fp16")
        assert half.vae.dtype == torch.float16
        with pytest.raises(
            FloatingPointError, match="output of the decoder of .* is not finite in fp16: use precision"
        ):
            half.decode(latents)
        half.vae.float()  # what the sentence proposes
        assert half.decode(latents).isfinite().all()


def test_a_black_picture_is_no_success_on_the_command_line(random_folder, tmp_path, capsys, monkeypatch):
    from sdpo_nb.cli import sample_command

    place = shutil.copytree(random_folder(), tmp_path / "model")
    policy = load_policy(place, device="cpu")
    policy.add_lora().save_lora(tmp_path / "lora")
    policy.remove_lora()
    with torch.no_grad():
        policy.denoiser.conv_out.weight.fill_(torch.nan)
    policy.denoiser.save_pretrained(place / "unet")
    monkeypatch.chdir(tmp_path)
    words = ["lora", "a cat", "--policy", str(place), "--samples", "1", "--output", "black.png"]
    assert sample_command(words) == 1 and not (tmp_path / "black.png").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not finite in fp32: lower the learning rate" in line


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_half_precision_keeps_the_learning_part_in_float32(folder, precision):
    policy = nudged(load_policy(folder, device="cpu", precision=precision).add_lora())
    assert policy.dtype == models.precisions[precision] and next(policy.denoiser.parameters()).dtype == policy.dtype
    assert {parameter.dtype for parameter in policy.trainable_parameters().values()} == {torch.float32}
    output = policy.predict(torch.randn(3, *policy.latent_shape), 499, policy.embed(PROMPTS))
    output.square().mean().backward()
    assert output.dtype == torch.float32
    gradients = [parameter.grad for parameter in policy.trainable_parameters().values()]
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)
    for own_scheduler in (False, True):
        images = policy.sample(PROMPTS, 2, seeds=SEEDS, own_scheduler=own_scheduler)
        assert images.dtype == torch.float32 and images.isfinite().all()


@pytest.mark.parametrize("scheduler, most", [(DDIMScheduler, 1000), (EulerDiscreteScheduler, 1000), (LCMScheduler, 25)])
def test_the_largest_number_of_steps_is_known(folder, scheduler, most):
    pipeline = stock_pipeline(folder)
    extra = dict(original_inference_steps=25) if scheduler is LCMScheduler else {}
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **extra)
    policy = Policy(pipeline)
    assert policy.max_steps == most and policy.sampler(most).num_steps == most
    with pytest.raises(ValueError, match="num_steps is"):
        policy.sampler(most + 1)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config, original_inference_steps=10)
    assert policy.max_steps == 10  # what users would draw with


# --- loading, and what can go wrong


def test_everything_is_frozen_quiet_and_on_the_device_asked_for(policy):
    for module in (policy.denoiser, policy.vae, policy.pipeline.text_encoder):
        assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())
    assert policy.device.type == "cpu" and policy.latent_shape == (4, 8, 8) and policy.trainable_parameters() == {}


def test_device_and_dtype_follow_the_weights_and_cost_next_to_nothing(policy, monkeypatch):
    policy.add_lora()
    policy.pipeline.to(dtype=torch.bfloat16)
    policy.denoiser.to("meta")  # a device that every machine has
    assert (policy.device.type, policy.dtype) == ("meta", torch.bfloat16)
    visited, walk = [], torch.nn.Module.named_modules

    def counted(module, *arguments, **options):
        for found in walk(module, *arguments, **options):
            visited.append(found)
            yield found

    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
    assert policy.device.type == "meta" and policy.dtype == torch.bfloat16
    assert len(visited) < 20 < len(list(walk(policy.denoiser)))  # `predict` asks for both at every call


@pytest.fixture
def damaged(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "damaged")


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
@pytest.mark.parametrize("length", [5, -1])
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
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "PixArtAlphaPipeline"))
    shutil.rmtree(damaged / "unet")
    with pytest.raises(ValueError, match="is a PixArtAlphaPipeline, .*choose a StableDiffusionPipeline"):
        load_policy(damaged)


def test_failures_of_the_hub_are_one_sentence(monkeypatch):
    "tests/test_hub.py tells them apart"

    def unreachable(*arguments, **options):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", unreachable)
    with pytest.raises(OSError, match="^Could not load 'someone/model': the hub cannot be reached") as caught:
        load_policy("someone/model")
    assert "\n" not in str(caught.value)


def test_stock_diffusers_draws_with_the_embedded_pipeline_as_it_lies():
    "Without a word about precision: transformers goes by the dtype of the text encoder's config, diffusers by float32"
    stock = StableDiffusionPipeline.from_pretrained(
        models.policy_folder("tiny"), safety_checker=None, requires_safety_checker=False
    )
    assert stock.text_encoder.dtype == stock.unet.dtype == stock.vae.dtype == torch.float32
    assert stock("a red circle", num_inference_steps=2, guidance_scale=0.0).images[0].size == (32, 32)
