"SDXL, consistency models and guidance, on narrow models of the real classes with random weights."

import re
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, TCDScheduler

from sdpo_nb.families import ConsistencyPolicy, SDXLPolicy, distilled
from sdpo_nb.report import loading_code
from sdpo_nb.models import Policy, load_policy
from sdpo_nb.trainer import TrainConfig, Trainer

classes = {"sd_turbo": Policy, "sdxl_turbo": SDXLPolicy, "lcm": ConsistencyPolicy}


# the notebook trains each without guidance
KINDS = [kind if kind == "lcm" else pytest.param(kind, marks=pytest.mark.slow) for kind in classes]


@pytest.fixture(scope="session")
def folders(random_folder):
    return {kind: random_folder(kind) for kind in classes}


@pytest.fixture(scope="module")
def policies(folders):
    return {kind: load_policy(folder, device="cpu") for kind, folder in folders.items()}


def near(one, other, tolerance=1e-4):
    "Up to the rounding of float32 in networks of this depth"
    assert one.shape == other.shape and (one - other).abs().max() <= tolerance * other.abs().max()


def trainer(policy, folder, **fields):
    sizes = dict(num_steps=3, epochs=1, pairs_per_epoch=2, eval_samples=0, learning_rate=1e-3)
    config = TrainConfig(**{"policy": policy.name, "output_dir": str(folder), **sizes, **fields})
    return Trainer(policy, "jpeg_compressibility", ["a cat", "two dogs"], config, callbacks=[])


def test_a_folder_is_driven_by_the_policy_of_its_class(policies):
    assert {kind: type(policy) for kind, policy in policies.items()} == classes


@pytest.mark.parametrize("kind", ["sd_turbo", "sdxl_turbo"])
def test_guidance_changes_pictures_and_off_is_one_call(policies, monkeypatch, kind):
    policy, calls = policies[kind], []
    handle = policy.denoiser.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))

    def latents(scale):
        monkeypatch.setattr(policy, "guidance_scale", scale)
        return policy.sample(["a cat"], 2, seeds=[0], return_latents=True)

    off, one, five = latents(0.0), latents(1.0), latents(5.0)
    handle.remove()
    assert calls == [1, 1, 1, 1, 2, 2] and torch.equal(off, one) and (off - five).abs().max() > 1e-3


def test_a_consistency_network_hears_the_guidance_scale_in_one_call(policies, monkeypatch):
    policy = policies["lcm"]

    def latents(scale):
        monkeypatch.setattr(policy, "guidance_scale", scale)
        return policy.sample(["a cat"], 2, seeds=[0], return_latents=True)

    default = latents(0.0)
    assert torch.equal(default, latents(policy.default_guidance)) and not torch.equal(default, latents(2.0))
    assert not policy.guided
    monkeypatch.setattr(policy, "guidance_scale", 3.0)  # made once, on the CPU, for batches of any size
    made, make = [], policy.pipeline.get_guidance_scale_embedding
    monkeypatch.setattr(
        policy.pipeline, "get_guidance_scale_embedding", lambda *a, **k: made.append(1) or make(*a, **k)
    )
    one, several = policy.guidance_embedding(1), policy.guidance_embedding(3)
    width = policy.denoiser.config.time_cond_proj_dim
    assert len(made) == 1 and torch.equal(one.expand(3, -1), several) and several.shape == (3, width)
    assert torch.equal(several.cpu(), make(torch.full((3,), 2.0), embedding_dim=width).to(several.dtype))


def test_the_conditions_of_sdxl_travel_with_the_prompt(policies):
    embedding = policies["sdxl_turbo"].embed(["a cat", "a dog", "a cat"])
    assert embedding[1:].repeat(2).time_ids.tolist() == [[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]] * 4
    assert torch.equal(embedding.pooled[0], embedding.pooled[2])
    nothing = policies["sdxl_turbo"].unconditional(embedding)
    assert not nothing.prompt_embeds.any() and not nothing.pooled.any()
    assert torch.equal(nothing.time_ids, embedding.time_ids)


@pytest.mark.parametrize(
    "kind", [kind if kind == "sdxl_turbo" else pytest.param(kind, marks=pytest.mark.slow) for kind in classes]
)
def test_an_autoencoder_that_says_so_stays_in_float32_in_every_family(folders, tmp_path, kind):
    place = shutil.copytree(folders[kind], tmp_path / "model")
    config = place / "vae" / "config.json"
    for upcast, dtype in (("true", torch.float32), ("false", torch.float16)):
        config.write_text(re.sub('"force_upcast": \\w+', f'"force_upcast": {upcast}', config.read_text()))
        half = load_policy(place, device="cpu", precision="fp16")
        assert (half.dtype, half.vae.dtype) == (torch.float16, dtype)
    assert load_policy(place, device="cpu", precision="bf16").vae.dtype == torch.bfloat16


def stock_pictures(policy, latents):
    "What the stock pipeline makes of latents: its own code, without a single step"
    pipeline, drawn = policy.pipeline, []
    pipeline.scheduler.set_timesteps = lambda *args, **options: setattr(
        pipeline.scheduler, "timesteps", latents[:0, 0, 0, 0]
    )
    try:
        size = {name: side * pipeline.vae_scale_factor for name, side in zip(("height", "width"), latents.shape[2:])}
        options = dict(guidance_scale=0.0, output_type="pt", latents=latents / pipeline.scheduler.init_noise_sigma)
        drawn = pipeline(["a cat"] * len(latents), num_inference_steps=1, **size, **options).images
    finally:
        del pipeline.scheduler.set_timesteps
    return drawn


STATISTICS = dict(latents_mean=[-0.6, 0.4, 1.1, -0.2], latents_std=[0.7, 1.6, 0.5, 2.0])


@pytest.mark.parametrize("config", [{}, STATISTICS], ids=["size", "mean and std"])
def test_latents_are_decoded_as_stock_sdxl_does_it(folders, config):
    policy = load_policy(folders["sdxl_turbo"], device="cpu")
    policy.vae.register_to_config(**config)
    latents = torch.randn(2, *policy.latent_shape)
    ours, stock = policy.decode(latents), stock_pictures(policy, latents)
    near(ours, stock)
    assert ours.std() > 0.01


@pytest.mark.parametrize("kind", ["sdxl_turbo", "lcm"])
def test_pictures_need_not_be_square(folders, tmp_path, kind):
    "By our own steps and by the stock pipeline, which takes any size if it is told"
    place = shutil.copytree(folders[kind], tmp_path / "model")
    config = place / "unet" / "config.json"
    config.write_text(config.read_text().replace('"sample_size": 4', '"sample_size": [4, 8]'))
    policy = load_policy(place, device="cpu")
    assert policy.latent_shape == (4, 4, 8)
    for own_scheduler in (False, True):
        assert policy.sample(["a cat"], 2, seeds=[0], own_scheduler=own_scheduler).shape == (1, 3, 32, 64)
    if kind == "sdxl_turbo":
        assert policy.embed(["a cat"]).time_ids.tolist() == [[32.0, 64.0, 0.0, 0.0, 32.0, 64.0]]


def test_a_consistency_model_has_a_largest_number_of_steps(folders, tmp_path):
    place = shutil.copytree(folders["lcm"], tmp_path / "model")
    config = place / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"original_inference_steps": 50', '"original_inference_steps": 25'))
    policy = load_policy(place, device="cpu")
    assert policy.max_steps == 25
    for own_scheduler in (False, True):
        assert policy.sample(["a cat"], 25, seeds=[0], own_scheduler=own_scheduler).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_is_trained_with_guidance_and_its_lora_goes_back(policies, tmp_path, kind):
    policy, where = policies[kind], dict(seeds=[0], return_latents=True)
    metrics = trainer(policy, tmp_path / "run", guidance_scale=4.0).train()
    assert policy.guidance_scale == 4.0 and metrics["log_ratio/max_before_update"] == 0 and metrics["grad_norm"] > 0
    trained = policy.sample(["a cat"], 2, **where)
    with policy.without_lora():
        before = policy.sample(["a cat"], 2, **where)
    policy.remove_lora()
    near(policy.sample(["a cat"], 2, **where), before)
    policy.load_lora(tmp_path / "run" / "lora")
    near(policy.sample(["a cat"], 2, **where), trained)
    assert (trained - before).abs().max() > 1e-6
    policy.remove_lora()
    policy.guidance_scale = 0.0


def test_a_consistency_model_is_trained_by_its_own_steps_without_the_last(policies, tmp_path):
    run = trainer(policies["lcm"], tmp_path / "run", train_last_step=True)
    assert type(policies["lcm"].sampler(3)).__name__ == "LCMSampler" and run.trained_steps == [0, 1]
    policies["lcm"].remove_lora()


def test_guidance_with_a_wrong_number_is_refused(policies, tmp_path):
    with pytest.raises(ValueError, match="guidance_scale is -1"):
        trainer(policies["sd_turbo"], tmp_path / "run", guidance_scale=-1.0)


def test_an_unknown_class_is_named(folders, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(folders["sd_turbo"], folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "KolorsPipeline"))
    with pytest.raises(
        ValueError, match="is a KolorsPipeline, which cannot be trained here: choose a StableDiffusionPipeline or"
    ):
        load_policy(folder)


def test_a_card_tells_what_a_consistency_model_heard(policies, tmp_path):
    "Guidance is an input of its network: the call in the card names the scale it was trained with"
    config = trainer(policies["lcm"], tmp_path / "run", num_steps=4).config
    assert config.guidance_scale == 8.5 and "guidance_scale=8.5" in loading_code(
        config.policy, 4, config.guidance_scale
    )
    assert trainer(policies["sd_turbo"], tmp_path / "other").config.guidance_scale == 0


# --- base models that an adapter makes fast


def adapter(policy, folder):
    "A LoRA that changes much, as a file; the policy is as before"
    policy.remove_lora()
    policy.add_lora(2)
    for name, weight in policy.trainable_parameters().items():
        weight.data.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    file = policy.save_lora(folder)
    policy.remove_lora()
    return file


WAYS = {
    "dmd2": (LCMScheduler, dict(timesteps=[999, 749, 499, 249])),
    "lcm": (LCMScheduler, {}),
    "hyper": (DDIMScheduler, dict(timestep_spacing="trailing", set_alpha_to_one=False)),
    "hyper, unified": (TCDScheduler, {}),
    "lightning": (EulerDiscreteScheduler, dict(timestep_spacing="trailing")),
}


@pytest.mark.parametrize("way", [way if way == "dmd2" else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
@pytest.mark.parametrize("kind", ["sd_turbo", pytest.param("sdxl_turbo", marks=pytest.mark.slow)])
def test_a_base_model_is_trained_on_top_of_the_adapter_that_made_it_fast(folders, tmp_path, kind, way):
    scheduler, settings = WAYS[way]
    policy = load_policy(folders[kind], device="cpu")
    file = adapter(policy, tmp_path / "distilled")
    plain = policy.sample(["a cat"], 4, seeds=[0], own_scheduler=True, return_latents=True)
    distilled(policy, file, scheduler, **settings)
    where = dict(seeds=[0], eta=float(scheduler is LCMScheduler), return_latents=True)
    for count in (1, 4):
        ours, stock = (policy.sample(["a cat"], count, own_scheduler=own, **where) for own in (False, True))
        near(ours, stock, 5e-3 if way == "lightning" else 1e-4)  # whose scheduler starts from a little less noise
    assert (stock - plain).abs().max() > 1e-2
    metrics = trainer(policy, tmp_path / "run", num_steps=4).train()
    assert metrics["log_ratio/max_before_update"] == 0 and metrics["grad_norm"] > 0
    assert all(".default." in name for name in policy.trainable_parameters())
    with policy.without_lora():
        near(policy.sample(["a cat"], 4, **where), ours)  # what lies underneath stays on


def test_a_scheduler_without_a_step_for_it_is_refused(folders):
    policy = load_policy(folders["sd_turbo"], device="cpu")
    with pytest.raises(ValueError, match="give falling numbers above 0 and at most 999"):
        distilled(policy, scheduler=LCMScheduler, timesteps=[249, 999])
