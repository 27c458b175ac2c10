"""SDXL, consistency models and guidance, on narrow models of the real classes with random weights."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from sdpo_nb.config import TrainConfig
from sdpo_nb.families import ConsistencyPolicy, SDXLPolicy
from sdpo_nb.mdp import make_sampler
from sdpo_nb.models import Policy, load_policy
from sdpo_nb.trainer import Trainer
from sdpo_nb.figures import loading_code

script = Path(__file__).parent.parent / "benchmarks" / "random_models.py"
spec = importlib.util.spec_from_file_location("random_models", script)
random_models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(random_models)
classes = {"sd_turbo": Policy, "sdxl_turbo": SDXLPolicy, "lcm": ConsistencyPolicy}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {kind: random_models.make(kind, root / kind, width=32, image_size=32) for kind in classes}


@pytest.fixture(scope="module")
def policies(folders):
    return {kind: load_policy(folder) for kind, folder in folders.items()}


def trainer(policy, folder, **fields):
    config = TrainConfig(
        **{
            **dict(
                policy=policy.name,
                num_steps=3,
                epochs=1,
                pairs_per_epoch=2,
                eval_samples=0,
                learning_rate=1e-3,
                output_dir=str(folder),
            ),
            **fields,
        }
    )
    return Trainer(policy, "jpeg_compressibility", ["a cat", "two dogs"], config, callbacks=[])


def test_a_folder_is_driven_by_the_policy_of_its_class(policies):
    assert {kind: type(policy) for kind, policy in policies.items()} == classes


@pytest.mark.parametrize(
    "kind, guidance",
    [("sd_turbo", 0.0), ("sd_turbo", 7.5), ("sdxl_turbo", 0.0), ("sdxl_turbo", 5.0), ("lcm", 0.0), ("lcm", 3.0)],
)
def test_the_same_sampler_in_the_stock_pipeline_gives_the_same_latents(policies, monkeypatch, kind, guidance):
    policy = policies[kind]
    monkeypatch.setattr(policy, "guidance_scale", guidance)
    for steps in (1, 3):
        monkeypatch.setattr(policy.pipeline, "scheduler", make_sampler(policy.scheduler))
        options = dict(seeds=[3, 4], eta=1.0 if kind == "lcm" else 0.0, return_latents=True)
        ours, stock = (
            policy.sample(["a cat", "two dogs"], steps, own_scheduler=own, **options) for own in (False, True)
        )
        torch.testing.assert_close(ours, stock, atol=1e-4 * stock.abs().max().item(), rtol=0)


@pytest.mark.parametrize("kind", ["sd_turbo", "sdxl_turbo"])
def test_guidance_changes_pictures_and_off_is_one_call(policies, monkeypatch, kind):
    policy, calls = policies[kind], []
    handle = policy.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))

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

    assert (
        torch.equal(latents(0.0), latents(policy.default_guidance))
        and not torch.equal(latents(0.0), latents(2.0))
        and not policy.guided
    )


def test_the_conditions_of_sdxl_travel_with_the_prompt(policies):
    embedding = policies["sdxl_turbo"].embed(["a cat", "a dog", "a cat"])
    assert embedding[1:].repeat(2).time_ids.tolist() == [[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]] * 4
    assert torch.equal(embedding.pooled[0], embedding.pooled[2]) and not torch.equal(
        embedding.pooled[0], embedding.pooled[1]
    )
    nothing = policies["sdxl_turbo"].unconditional(embedding)
    assert (
        not nothing.prompt_embeds.any()
        and not nothing.pooled.any()
        and torch.equal(nothing.time_ids, embedding.time_ids)
    )


def test_an_autoencoder_that_overflows_in_half_precision_stays_in_float32(folders):
    policy = load_policy(folders["sdxl_turbo"], precision="fp16")
    assert (policy.dtype, policy.vae.dtype) == (torch.float16, torch.float32) and policy.sample(
        ["a cat"], 1, seeds=[0]
    ).isfinite().all()
    assert load_policy(folders["sdxl_turbo"], precision="bf16").vae.dtype == torch.bfloat16
    assert load_policy(folders["sd_turbo"], precision="fp16").vae.dtype == torch.float16


@pytest.mark.parametrize("kind", classes)
@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_every_family_is_trained_and_its_lora_goes_back(policies, tmp_path, kind, guidance):
    policy = policies[kind]
    run = trainer(policy, tmp_path / "run", guidance_scale=guidance)
    metrics = run.train()
    assert (
        policy.guidance_scale == (guidance or getattr(policy, "default_guidance", 0.0))
        and metrics["log_ratio/max_before_update"] == 0
        and metrics["grad_norm"] > 0
    )
    trained = policy.sample(["a cat"], 2, seeds=[0], return_latents=True)
    with policy.without_lora():
        before = policy.sample(["a cat"], 2, seeds=[0], return_latents=True)
    policy.remove_lora()
    torch.testing.assert_close(policy.sample(["a cat"], 2, seeds=[0], return_latents=True), before)
    policy.load_lora(tmp_path / "run" / "lora")
    torch.testing.assert_close(policy.sample(["a cat"], 2, seeds=[0], return_latents=True), trained)
    assert (trained - before).abs().max() > 1e-6
    policy.remove_lora()
    policy.guidance_scale = 0.0


def test_a_consistency_model_is_trained_by_its_own_steps_without_the_last(policies, tmp_path):
    run = trainer(policies["lcm"], tmp_path / "run", train_last_step=True)
    assert type(run.scheduler).__name__ == "LCMScheduler" and run.trained_steps == [0, 1]
    policies["lcm"].remove_lora()


def test_guidance_with_a_wrong_number_is_refused(policies, tmp_path):
    with pytest.raises(ValueError, match="guidance_scale is -1"):
        trainer(policies["sd_turbo"], tmp_path / "run", guidance_scale=-1.0)


def test_an_unknown_class_is_named(folders, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(folders["sd_turbo"], folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "FluxPipeline"))
    with pytest.raises(
        ValueError, match="is a FluxPipeline, which cannot be trained here: choose a StableDiffusionPipeline or"
    ):
        load_policy(folder)


def test_a_card_tells_what_a_consistency_model_heard(policies, tmp_path):
    "Guidance is an input of its network: the call in the card names the scale it was trained with"
    trained = trainer(policies["lcm"], tmp_path / "run", num_steps=4)
    assert trained.config.guidance_scale == 8.5 and "guidance_scale=8.5" in loading_code(
        trained.config.policy, 4, trained.config.guidance_scale
    )
    assert trainer(policies["sd_turbo"], tmp_path / "other").config.guidance_scale == 0
