"SD3.5, FLUX, Z-Image and SANA-Sprint, on narrow models of the real classes with random weights."

import copy
import re
from pathlib import Path

import pytest
import torch
from comparisons import same_learning
from diffusers import DiffusionPipeline, FlowMatchHeunDiscreteScheduler, LCMScheduler
from PIL import Image

from sdpo_nb.cli import sample_command, train_command
from sdpo_nb.config import preset_config, resolve
from sdpo_nb.files import read_json, read_jsonl
from sdpo_nb.flow_families import FlowPolicy, LargeTextPolicy, MaskedEmbedding, PooledEmbedding
from sdpo_nb.hub import quiet_loading
from sdpo_nb.mdp import sample_trajectories
from sdpo_nb.models import load_policy
from sdpo_nb.plan import memory_estimate, model_sizes, plan_text
from sdpo_nb.recipes import recipes
from sdpo_nb.request import method_settings, method_trainer
from sdpo_nb.trainer import TrainConfig, Trainer

GUIDED = {"sd35_turbo": (0.0, 4.5), "flux_schnell": (0.0,), "zimage_turbo": (0.0, 1.5), "sana_sprint": (0.0, 2.0)}
KINDS = list(GUIDED)
PROMPTS = ["a red circle", "two blue dogs on a background"]


def fast_for(*chosen):
    "All families; those that are not chosen with the slow tests"
    return [kind if kind in chosen else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.fixture(scope="session")
def folders(random_folder):
    return {kind: random_folder(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def loaded(folders):
    return {}


@pytest.fixture
def policy(request, folders, loaded):
    "The policy of a family, as it was loaded"
    kind = request.param
    if kind not in loaded:
        loaded[kind] = load_policy(folders[kind], device="cpu")
    yield loaded[kind]
    loaded[kind].remove_lora()
    loaded[kind].guidance_scale, loaded[kind].timesteps, loaded[kind].size = 0.0, None, None


every_policy = pytest.mark.parametrize("policy", KINDS, indirect=True)


def is_random(policy):
    "Do the steps of the stock pipeline draw noise?"
    return not isinstance(policy, FlowPolicy)


def near(one, other, tolerance=1e-5):
    "Up to the rounding of float32 in networks of this depth; a prompt told wrongly is a thousand times as much"
    assert one.shape == other.shape and (one - other).abs().max() <= tolerance * other.abs().max()


def start(policy, seed=0):
    return torch.randn(len(PROMPTS), *policy.latent_shape, generator=torch.Generator().manual_seed(seed))


def stock_latents(policy, num_steps, noise, pipeline=None, **changes):
    "States after every step of the stock pipeline, called with prompts as its users call it"
    states = []

    def watch(pipeline, step, time, given):
        states.append(given["latents"].clone())
        return {}

    options = policy.stock_options(num_steps) | dict(output_type="latent", latents=policy.packed(noise)) | changes
    options["generator"] = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    with quiet_loading():
        last = (pipeline or policy.pipeline)(list(PROMPTS), callback_on_step_end=watch, **options).images
    return [policy.unpacked(state) for state in [*states[:-1], last]]


def our_latents(policy, num_steps, noise):
    "The same of ours: without fresh noise, or with that of the stock pipeline"
    draws = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    shape = (num_steps, 1, *policy.latent_shape)
    noises = torch.stack([torch.cat([torch.randn(shape[1:], generator=g) for _ in range(num_steps)]) for g in draws])
    embedding, eta = policy.embed(PROMPTS), float(is_random(policy))
    path = sample_trajectories(
        lambda x, t: policy.predict(x, t, embedding).detach(), policy.sampler(num_steps, eta), noise, noises
    )
    return path.latents[:, 1:].unbind(1)


def same_steps(policy, num_steps, **changes):
    "Compare every step; SANA-Sprint's stock states carry a factor until the end"
    noise = start(policy, num_steps)
    ours, stock = our_latents(policy, num_steps, noise), stock_latents(policy, num_steps, noise, **changes)
    scale = policy.scheduler.config.sigma_data if is_random(policy) else 1.0
    assert len(ours) == len(stock) == num_steps
    for i, (one, other) in enumerate(zip(ours, stock)):
        near(one, other / (scale if i < num_steps - 1 else 1.0))


# --- the stock pipeline


@pytest.mark.parametrize(
    "policy, scale", [(kind, scale) for kind in KINDS for scale in GUIDED[kind]], indirect=["policy"]
)
def test_every_step_is_that_of_the_stock_pipeline(policy, scale):
    policy.guidance_scale = scale
    for num_steps in (1, 2, 3, 7):
        same_steps(policy, num_steps)


@pytest.mark.parametrize("policy", ["sd35_turbo", "flux_schnell", "zimage_turbo"], indirect=True)
@pytest.mark.parametrize("config", [dict(use_dynamic_shifting=True), dict(shift=2.0), dict(use_karras_sigmas=True)])
def test_whatever_shifts_the_noise_levels_is_followed(policy, monkeypatch, config):
    scheduler = type(policy.scheduler).from_config(policy.scheduler.config, **config)
    monkeypatch.setattr(policy, "scheduler", scheduler)
    monkeypatch.setattr(policy.pipeline, "scheduler", copy.deepcopy(scheduler))
    same_steps(policy, 4)
    policy.size = 64  # more tokens: dynamic shifting moves the levels
    same_steps(policy, 2)


@every_policy
def test_explicit_timesteps_are_taken_as_they_are(policy):
    angles = type(policy).__name__ == "SanaSprintPolicy"
    policy.timesteps = [1.4, 1.0, 0.3] if angles else [1000, 700, 450]
    assert policy.sampler(3).timesteps.tolist() == pytest.approx(policy.timesteps, abs=1e-4)
    assert policy.sampler(2).timesteps.tolist() != policy.timesteps[:2]
    where = dict(seeds=[1, 2], eta=float(is_random(policy)), return_latents=True)
    for count in (2, 3):
        near(policy.sample(PROMPTS, count, **where), policy.sample(PROMPTS, count, own_scheduler=True, **where))
    policy.timesteps = [0.3, 1.4, 1.0] if angles else [450, 1000, 700]
    with pytest.raises(ValueError, match="fall"):
        policy.sampler(3)


@every_policy
def test_pictures_have_the_size_that_was_asked_for(policy):
    assert policy.size == 32 and policy.sample(PROMPTS[:1], 1, seeds=[0]).shape == (1, 3, 32, 32)
    policy.size = 64
    assert policy.sample(PROMPTS[:1], 1, seeds=[0], own_scheduler=True).shape == (1, 3, 64, 64)
    same_steps(policy, 2)
    for wrong in (65, 0, -32):
        with pytest.raises(ValueError, match=f"size is {wrong}; give a multiple of"):
            policy.size = wrong


@every_policy
def test_pictures_are_decoded_as_the_stock_pipeline_does_it(policy):
    noise = start(policy)
    options = policy.stock_options(2) | dict(output_type="pt", latents=policy.packed(noise))
    with quiet_loading():
        options["generator"] = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        stock = policy.pipeline(list(PROMPTS), **options).images
    near(policy.decode(stock_latents(policy, 2, noise)[-1]), stock, 1e-4)


# --- the random step


@every_policy
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_random_steps_have_the_mean_and_the_variance_of_the_schedule(policy, eta):
    if is_random(policy) and eta < 1:
        pytest.skip("a consistency model always draws fresh noise")
    sampler, embedding, number = policy.sampler(4, eta), policy.embed(PROMPTS[:1]), 3000
    clean, noise = torch.randn(2, 1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    for i in sampler.has_density.nonzero()[:, 0].tolist():
        state = sampler.add_noise(clean, noise, i)
        output = policy.predict(state, sampler.timesteps[i], embedding).detach()
        generator = torch.Generator().manual_seed(i)
        drawn = sampler.step(*(x.expand(number, -1, -1, -1) for x in (output, state)), i, generator=generator)
        mean = sampler.mean(*sampler.predict(output, state, i), i)
        error = (drawn.prev_sample.mean(0) - mean[0]) / (sampler.std[i] / number**0.5)
        assert error.abs().max() < 5 and abs(error.square().mean() - 1) < 0.25  # standard errors
        assert abs(drawn.prev_sample.var(0).mean() / sampler.std[i] ** 2 - 1) < 0.02
        share = sampler.std[i] ** 2 + sampler.direction[i] ** 2
        assert share.item() == pytest.approx(
            sampler.next_noise[i].item() ** 2, rel=1e-4
        )  # of the variance: no more, and no less


# --- training


def trainer(policy, folder, kind=Trainer, reward="jpeg_compressibility", **fields):
    sizes = dict(num_steps=3, epochs=2, pairs_per_epoch=2, eval_samples=0, learning_rate=1e-3)
    settings = method_settings(fields["recipe"]) if "recipe" in fields else TrainConfig
    config = settings(**{"policy": policy.name, "output_dir": str(folder), **sizes, **fields})
    return kind(policy, reward, ["a cat", "two dogs on a red circle"], config, callbacks=[])


@every_policy
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_attention_projection_gets_a_gradient(policy, checkpointing):
    getattr(policy.denoiser, f"{'enable' if checkpointing else 'disable'}_gradient_checkpointing")()
    policy.denoiser.train(checkpointing)
    policy.prepare_training(4)
    steps, sampler = torch.tensor([0, 2]), policy.sampler(4)
    policy.predict(start(policy), sampler.timesteps[steps], policy.embed(PROMPTS)).square().mean().backward()
    weights = {name: w for name, w in policy.trainable_parameters().items() if "lora_B" in name}
    without = [name for name, weight in weights.items() if weight.grad is None or not weight.grad.any()]
    assert without == [] and {re.search(r"to_(\w+)", name)[1] for name in weights} == set("qkv") | {"out"}
    policy.denoiser.eval().disable_gradient_checkpointing()


@every_policy
def test_steps_may_be_mixed_in_a_batch(policy):
    sampler, embedding, noise = policy.sampler(4), policy.embed(PROMPTS), start(policy)
    mixed = policy.predict(noise, sampler.timesteps[torch.tensor([0, 2])], embedding).detach()
    for i, step in enumerate((0, 2)):
        alone = policy.predict(noise[i : i + 1], sampler.timesteps[step].item(), embedding[i]).detach()
        near(mixed[i : i + 1], alone)


@pytest.mark.parametrize("policy", ["sd35_turbo", "zimage_turbo", "sana_sprint"], indirect=True)
def test_guidance_is_trained_as_it_is_sampled(policy, tmp_path):
    metrics = trainer(policy, tmp_path / "run", guidance_scale=3.0, epochs=1).train()
    assert metrics["log_ratio/max_before_update"] == 0 and metrics["grad_norm"] > 0


@pytest.mark.parametrize("kind", fast_for("flux_schnell", "zimage_turbo"))
def test_half_precision_trains_and_paints_what_the_stock_pipeline_paints(folders, tmp_path, kind):
    policy = load_policy(folders[kind], device="cpu", precision="bf16")
    eta = float(is_random(policy))
    metrics = trainer(policy, tmp_path / "run", precision="bf16").train()
    assert metrics["log_ratio/max_before_update"] == 0 and metrics["grad_norm"] > 0
    where = dict(seeds=[1, 2], return_latents=True)
    ours, stock = (policy.sample(PROMPTS, 2, own_scheduler=own, eta=eta, **where) for own in (False, True))
    near(ours.float(), stock.float(), 0.03)
    assert policy.sample(PROMPTS, 2, seeds=[1, 2]).isfinite().all()


@pytest.mark.parametrize("policy", fast_for("flux_schnell"), indirect=True)
@pytest.mark.parametrize("recipe", recipes)
def test_every_recipe_trains_every_family(policy, tmp_path, recipe):
    fields = dict(recipe=recipe)
    if recipe == "spo":
        fields |= dict(preference_model="reward", preference_threshold=1e-6)
    if recipe == "lasro":
        fields |= dict(num_steps=2, pretrain_prompts=2, pretrain_steps=2, surrogate_steps=2, generator_steps=2)
    before = policy.sample(PROMPTS[:1], 2, seeds=[0], return_latents=True)
    metrics = trainer(policy, tmp_path / "run", method_trainer(recipe), **fields).train()
    assert metrics["epoch"] == 2 and metrics.get("log_ratio/max_before_update", 0) < 1e-5
    after = policy.sample(PROMPTS[:1], 2, seeds=[0], return_latents=True)
    assert after.isfinite().all() and not torch.equal(before, after)


@pytest.mark.parametrize("policy", fast_for("zimage_turbo"), indirect=True)
def test_a_resumed_run_is_the_same_to_the_last_bit(policy, tmp_path):
    fields = dict(checkpoint_every=1, epochs=3)
    trainer(policy, tmp_path / "whole", **fields).train()
    whole = policy.lora_state()
    trainer(policy, tmp_path / "part", **fields | dict(epochs=1)).train()
    trainer(policy, tmp_path / "part", **fields, resume=str(tmp_path / "part")).train()
    assert all(torch.equal(whole[name], weight) for name, weight in policy.lora_state().items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(folders, two_processes, tmp_path, kind):
    "By a reward without jumps: the size of a JPEG jumps by a byte where one pixel rounds to another level"
    order = "order='step_accumulated'"  # everything in one update: each process shuffles its own pairs
    code = f"""
        import torch
        from sdpo_nb.models import load_policy
        from sdpo_nb.trainer import TrainConfig, Trainer
        policy = load_policy({str(folders[kind])!r}, device="cpu")
        sizes = dict(num_steps=3, epochs=2, pairs_per_epoch=4, micro_batch=1, eval_samples=0, learning_rate=1e-3)
        sizes |= dict({order})
        config = TrainConfig(policy=policy.name, output_dir={str(tmp_path / "run")!r}, **sizes)
        trainer = Trainer(policy, "warmth", ["a cat", "two dogs on a red circle"], config, callbacks=[])
    """
    one, other = two_processes(code)
    policy = load_policy(folders[kind], device="cpu")
    sizes = dict(pairs_per_epoch=4, micro_batch=1, order="step_accumulated")
    trainer(policy, tmp_path / "alone", reward="warmth", **sizes).train()
    fresh = load_policy(folders[kind], device="cpu").prepare_training(4, seed=42)
    same_learning(one, other, policy.lora_state(), fresh.lora_state())


@pytest.mark.parametrize("policy", fast_for("sd35_turbo", "flux_schnell"), indirect=True)
def test_a_lora_lies_on_top_of_a_distilled_one(policy, folders, tmp_path):
    "As under LCM-LoRA, Hyper-SD or a user's own style: what was loaded stays frozen, and stock diffusers adds both"
    policy.add_lora(4)
    for name, weight in policy.trainable_parameters().items():
        weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    policy.save_lora(tmp_path / "distilled")
    policy.remove_lora()
    policy.load_lora(tmp_path / "distilled", name="distilled")
    trainer(policy, tmp_path / "run", epochs=1).train()
    assert all(".default." in name for name in policy.trainable_parameters())
    with quiet_loading():
        stock = DiffusionPipeline.from_pretrained(policy.name)
        stock.load_lora_weights(tmp_path / "distilled", adapter_name="distilled")
        stock.load_lora_weights(tmp_path / "run" / "lora", adapter_name="ours")
        stock.set_adapters(["distilled", "ours"])
    stock.set_progress_bar_config(disable=True)
    noise = start(policy)
    near(our_latents(policy, 2, noise)[-1], stock_latents(policy, 2, noise, stock)[-1])


# --- prompts


@every_policy
def test_a_prompt_is_encoded_once_and_the_encoders_leave(policy, monkeypatch):
    calls, visits = [], []
    encoders = {name: part for name, part in policy.pipeline.components.items() if name.startswith("text_encoder")}
    handles = [e.register_forward_pre_hook(lambda module, args: calls.append(1)) for e in encoders.values()]
    move = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, place: visits.append(str(place)) or move(self, place))
    policy._embedded_prompts.clear()
    first = policy.embed([*PROMPTS, PROMPTS[0]])
    assert len(calls) == len(encoders) * 2 and visits[-len(encoders) :] == ["cpu"] * len(encoders)
    del calls[:], visits[:]
    policy.sample(PROMPTS, 2, seeds=[1, 2])
    policy.sample(PROMPTS, 2, seeds=[1, 2], own_scheduler=True)
    again = policy.embed(PROMPTS)
    assert not calls and not visits
    assert torch.equal(first.prompt_embeds[:2], again.prompt_embeds)
    with pytest.raises(ValueError, match="must be a list with at least one string"):
        policy.embed([["a cat"]])
    for handle in handles:
        handle.remove()


def test_large_text_encoders_are_never_put_on_the_device(folders):
    pipeline = DiffusionPipeline.from_pretrained(folders["sd35_turbo"])
    LargeTextPolicy.place(pipeline, "meta")
    places = {name: part.device.type for name, part in pipeline.components.items() if hasattr(part, "device")}
    assert {name: place for name, place in places.items() if place == "meta"}.keys() == {"transformer", "vae"}


@every_policy
def test_text_encoders_are_never_in_training_mode(policy):
    "Built by hand, T5 has dropout"
    for name, part in policy.pipeline.components.items():
        if name.startswith("text_encoder"):
            part.train()
    again = type(policy)(policy.pipeline, policy.name)
    assert torch.equal(again.embed(PROMPTS).prompt_embeds, policy.embed(PROMPTS).prompt_embeds)


@every_policy
def test_a_prompt_that_is_too_long_is_told(policy, monkeypatch):
    tokenizer, most = policy.reader
    monkeypatch.setattr(policy, "_cut", False)
    with pytest.warns(UserWarning, match=f"tokens, of which .* reads {most}: .* is lost to it"):
        policy.embed(["red circle " * most])


def test_prompts_of_different_lengths_stack():
    short, long = (MaskedEmbedding(torch.ones(1, n, 2), torch.ones(1, n, dtype=torch.bool)) for n in (2, 5))
    both = MaskedEmbedding.cat([short, long])
    assert both.prompt_embeds.shape == (2, 5, 2) and both.mask.sum(1).tolist() == [2, 5]
    assert MaskedEmbedding.cat([both[0], both[1]]).mask.tolist() == both.mask.tolist()
    assert both.prompt_embeds[0, 2:].abs().sum() == 0 and len(both.repeat(2)) == 4
    assert PooledEmbedding(torch.ones(1, 2, 2), torch.ones(1, 3)).repeat(3).pooled.shape == (3, 3)


@pytest.mark.parametrize("policy", ["zimage_turbo"], indirect=True)
def test_the_callers_prompts_stay_as_they_are(policy):
    given = list(PROMPTS)
    for own in (False, True):
        policy.sample(given, 1, seeds=[0, 1], own_scheduler=own)
    assert given == PROMPTS


# --- what does not fit


def test_sd3_may_come_without_t5(folders, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(folders["sd35_turbo"], text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path / "model")
    policy = load_policy(tmp_path / "model", device="cpu")
    assert policy.pipeline.text_encoder_3 is None and policy.reader[1] == 10
    same_steps(policy, 2)


def test_another_scheduler_is_refused_in_one_sentence(folders, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(folders["flux_schnell"])
    for scheduler in (FlowMatchHeunDiscreteScheduler(), LCMScheduler()):
        pipeline.scheduler = scheduler
        pipeline.save_pretrained(tmp_path / type(scheduler).__name__)
        with pytest.raises(ValueError, match="give the pipeline a FlowMatchEulerDiscreteScheduler"):
            load_policy(tmp_path / type(scheduler).__name__, device="cpu")


def test_a_sana_that_was_not_distilled_is_refused(folders, tmp_path):
    "Such a pipeline can be put together: SANA itself has the same classes but for the scheduler"
    pipeline = DiffusionPipeline.from_pretrained(folders["sana_sprint"])
    config = dict(pipeline.transformer.config) | dict(guidance_embeds=False)
    pipeline.transformer = type(pipeline.transformer).from_config(config)
    pipeline.save_pretrained(tmp_path / "no_guidance")
    pipeline = DiffusionPipeline.from_pretrained(folders["sana_sprint"])
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    pipeline.save_pretrained(tmp_path / "no_angles")
    for name, words in (("no_guidance", "has no place for the guidance"), ("no_angles", "FlowMatchHeunDiscrete")):
        with pytest.raises(ValueError, match=f"is no SANA-Sprint: .*{words}"):
            load_policy(tmp_path / name, device="cpu")


@pytest.mark.parametrize("policy", ["flux_schnell"], indirect=True)
def test_a_guidance_scale_that_nobody_hears_is_refused_before_training(policy, tmp_path):
    with pytest.raises(ValueError, match="guidance_scale is 3, but .* was distilled without: use 0"):
        trainer(policy, tmp_path / "run", guidance_scale=3.0)


def test_a_flux_that_hears_guidance_is_told(folders, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(folders["flux_schnell"])
    config = dict(pipeline.transformer.config) | dict(guidance_embeds=True)
    torch.manual_seed(0)
    pipeline.transformer = type(pipeline.transformer).from_config(config)
    pipeline.save_pretrained(tmp_path / "dev")
    policy = load_policy(tmp_path / "dev", device="cpu")
    assert policy.default_guidance == 3.5 and policy.reader[1] == 512
    for scale in (0.0, 7.0):
        policy.guidance_scale = scale
        same_steps(policy, 2)
    with pytest.raises(AssertionError):
        same_steps(policy, 2, guidance_scale=2.0)


def test_steps_that_do_not_exist_are_refused(folders, loaded):
    for kind in KINDS:
        policy = loaded.setdefault(kind, load_policy(folders[kind], device="cpu"))
        for wrong in (0, -1, 2.5, True, 1001):
            with pytest.raises(ValueError, match="num_steps is"):
                policy.sampler(wrong)
        assert policy.max_steps == 1000


def test_a_lora_of_another_family_is_refused(folders, loaded, tmp_path):
    flux, sd3 = (load_policy(folders[kind], device="cpu") for kind in ("flux_schnell", "sd35_turbo"))
    flux.add_lora(2).save_lora(tmp_path)
    with pytest.raises(ValueError, match="belongs to another model"):
        sd3.load_lora(tmp_path)


# --- plans


def test_a_prompt_is_encoded_on_the_cpu_where_the_gpu_has_no_room(folders, monkeypatch):
    policy = load_policy(folders["sd35_turbo"], device="cpu")
    roomy = policy.embed(PROMPTS)
    policy._embedded_prompts.clear()
    visits, move = [], torch.nn.Module.to
    monkeypatch.setattr(type(policy), "has_room", lambda self, encoders: False)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, place: visits.append(str(place)) or move(self, place))
    assert torch.equal(policy.embed(PROMPTS).prompt_embeds, roomy.prompt_embeds) and visits == ["cpu"] * 3


HUB = {kind: preset_config(f"{kind}_pickscore").policy for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_of_sizes_is_what_was_counted(kind):
    rows = read_jsonl(Path(__file__).parent.parent / "benchmarks" / "results" / "memory.jsonl")
    rows, known = [row for row in rows if row["kind"] == kind], model_sizes[HUB[kind]]
    assert [row["size"] for row in rows] == [512, 1024] == list(known["counted"])
    for row in rows:
        assert (known["unet"], known["vae"]) == (row["millions"]["transformer"], row["millions"]["vae"])
        assert known["counted"][row["size"]][1:] == (row["gb_per_sample"], row["gb_per_sample_checkpointed"])


@pytest.mark.parametrize("suffix, room", [("", 24), ("_1x80gb", 80)])
@pytest.mark.parametrize("kind", KINDS)
def test_presets_plan_without_loading_anything_and_fit(kind, suffix, room, monkeypatch):
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)
    config = resolve(preset_config(f"{kind}_pickscore{suffix}"))
    text, memory = plan_text(config, ["a cat"]), memory_estimate(config)
    assert "GB" in text and memory["in all, estimated"] < (40 if kind == "flux_schnell" and room == 24 else room)
    larger = memory_estimate(resolve(preset_config(f"{kind}_pickscore{suffix}", size=1024, micro_batch=16)))
    assert larger["in all, estimated"] > memory["in all, estimated"]


def test_the_command_line_trains_and_evaluates_at_another_size(folders, tmp_path, capsys):
    run, size = str(tmp_path / "run"), ["--size", "48"]
    words = (
        f"--policy {folders['flux_schnell']} --reward jpeg_compressibility --prompts animals --num_steps 2 --epochs 1"
    )
    words += f" --pairs_per_epoch 2 --eval_samples 0 --output_dir {run}"
    assert train_command(["tiny", *words.split(), *size]) == 0
    assert read_json(tmp_path / "run" / "config.json")["size"] == 48
    assert (
        sample_command([run, "a cat", "--samples", "1", "--output", str(tmp_path / "cat.png"), "--num_steps", "1"]) == 0
    )
    with Image.open(tmp_path / "cat.png") as picture:
        assert 48 <= min(picture.size)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "run" / "README.md").read_text(encoding="utf-8"), re.S)[1]
    told, space = code.replace('"lora"', repr(str(tmp_path / "run" / "lora"))), {}
    with quiet_loading():
        exec(told, space)  # what the card tells others to do
    assert space["image"].size == (48, 48) and space["pipe"].vae_scale_factor * 2 == 16
    capsys.readouterr()
    assert train_command(["tiny", *words.split(), "--overwrite", "true", "--size", "50"]) == 2
    assert "size is 50; give a multiple of 16 pixels" in capsys.readouterr().err


# --- the page


def covered(test):
    "Family -> ✓ or slow, from the marks of a test"
    slow = {mark.name for mark in test.pytestmark} >= {"slow"}
    found = {}
    for mark in test.pytestmark:
        if mark.name == "parametrize" and {"policy", "kind"} & {*mark.args[0].replace(" ", "").split(",")}:
            for value in mark.args[1]:
                later = slow or any(m.name == "slow" for m in getattr(value, "marks", ()))
                kind = getattr(value, "values", value)
                found[kind if isinstance(kind, str) else kind[0]] = "slow" if later else "✓"
    return found


def test_the_table_of_the_page_is_true():
    "nbs/56_flow_families.ipynb: which property is tested for which family"
    cells = read_json(Path(__file__).parent.parent / "nbs" / "56_flow_families.ipynb")["cells"]
    (page,) = ["".join(c["source"]) for c in cells if "| property | test |" in "".join(c["source"])]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    assert rows[0][2:] == ["SD3.5-turbo", "FLUX.1-schnell", "Z-Image-Turbo", "SANA-Sprint"] and len(rows) > 15
    for _, name, *marks in rows[1:]:
        if name != "the table above":  # measured in the page itself
            found = covered(globals()[f"test_{name.strip('`')}"])
            assert marks == [found.get(kind, "–") for kind in KINDS], name
