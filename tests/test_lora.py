"LoRAs that change nothing at first and can be switched off, whole networks, and what a run starts from."

import copy
import shutil

import pytest
import torch
from comparisons import near
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from random_pipelines import nudged, stock_pipeline
from small_runs import small_trainer

from sdpo_nb.lora import _compute_as_base
from sdpo_nb.lora_files import TrainablePipeline
from sdpo_nb.models import Policy, load_policy


def test_a_fresh_lora_changes_nothing_and_disturbs_no_generator(policy, predict):
    before, state = predict(), torch.get_rng_state()
    policy.add_lora(rank=3)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(predict(), before)
    names = [name for name, _ in policy.denoiser.named_parameters() if "lora" in name]
    assert list(policy.trainable_parameters()) == names


def test_lora_reaches_every_attention_projection(policy):
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    projections = [name for name, _ in policy.denoiser.named_modules() if name.endswith(ends)]
    policy.add_lora()
    assert projections and len(policy.trainable_parameters()) == 2 * len(projections)


def test_the_seed_fixes_the_start(policy):
    states = [policy.add_lora(seed=seed).lora_state() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_without_lora_is_the_original_and_comes_back_even_after_an_error(policy, predict):
    original = predict()
    with policy.without_lora():
        assert torch.equal(predict(), original)
    nudged(policy.add_lora())
    changed = predict()
    with pytest.raises(RuntimeError), policy.without_lora():
        assert torch.equal(predict(), original)
        raise RuntimeError
    again = predict()
    assert torch.equal(again, changed) and again.requires_grad


@pytest.mark.parametrize("whole", [False, True], ids=["lora", "whole"])
def test_gradients_survive_a_visit_to_the_reference(policy, predict, whole):
    if whole:
        policy.train_whole()
        with torch.no_grad():
            for parameter in policy.trainable_parameters().values():
                parameter.mul_(1.1)
    else:
        nudged(policy.add_lora())
    output = predict()
    with policy.without_lora(), torch.no_grad():
        reference = predict()
    (output - reference).square().mean().backward()
    gradients = [parameter.grad for parameter in policy.trainable_parameters().values()]
    assert all(gradient is not None for gradient in gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients) or whole


def test_lora_state_round_trip(policy, predict):
    state, expected = nudged(policy.add_lora(alpha=8)).lora_state(), predict()
    policy.add_lora(alpha=8, seed=4).load_lora_state(state)
    assert torch.equal(predict(), expected)
    for wrong in (
        dict(list(state.items())[1:]),
        state | {"extra": torch.zeros(1)},
        {name: tensor[:1] for name, tensor in state.items()},
    ):
        with pytest.raises(ValueError, match="use the lora_rank of the checkpoint"):
            policy.load_lora_state(wrong)


# --- whole networks


def test_an_earlier_lora_leaves_nothing_behind(policy, predict, tmp_path):
    "Neither for the weights that are trained next nor for the file that they are saved in"
    original = predict()
    names = list(policy.train_whole().trainable_parameters())
    nudged(policy.add_lora()).train_whole()
    assert list(policy.trainable_parameters()) == names and torch.equal(predict(), original)
    policy.save_whole(tmp_path / "unet")
    assert torch.equal(predict(policy.load_whole(tmp_path / "unet")), original)


# --- what a run starts from


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    "A LoRA of rank 4 and alpha 8 that has an effect, in a folder"
    place = tmp_path_factory.mktemp("saved")
    nudged(load_policy(folder, device="cpu").add_lora(4, alpha=8)).save_lora(place)
    return place


def by_diffusers(policy, saved, **options):
    policy.pipeline.load_lora_weights(saved, **options)


LOADED = {
    "load_lora": lambda policy, saved: policy.load_lora(saved),
    "diffusers": lambda policy, saved: by_diffusers(policy, saved, adapter_name="default"),
}


@pytest.mark.parametrize("load", LOADED.values(), ids=LOADED)
def test_a_run_goes_on_from_a_loaded_lora(policy, predict, saved, tmp_path, load):
    original = predict()
    load(policy, saved)
    loaded = predict().detach()
    settings = dict(lora_rank=4, lora_alpha=8.0, learning_rate=1e-2)
    trainer = small_trainer(None, tmp_path, policy=policy, **settings)
    assert near(predict(), loaded) and not near(loaded, original)
    with policy.without_lora():
        assert torch.equal(predict(), original)
    trainer.train()
    assert not near(predict(), loaded)
    small_trainer(None, tmp_path / "again", policy=policy, **settings)  # starts where the first one did
    assert near(predict(), loaded)
    policy.remove_lora()
    small_trainer(None, tmp_path / "anew", policy=policy)
    assert torch.equal(predict(), original)


def test_what_a_trainer_has_left_is_replaced(policy, predict, tmp_path):
    original = predict()
    small_trainer(None, tmp_path, policy=policy, learning_rate=1e-2).train()
    assert not near(predict(), original)
    small_trainer(None, tmp_path / "again", policy=policy, lora_rank=2)
    assert torch.equal(predict(), original)


def loaded_before(folder, saved):
    pipeline = stock_pipeline(folder)
    pipeline.load_lora_weights(saved)  # diffusers calls it default_0
    return Policy(pipeline)


def weakened_before(folder, saved):
    pipeline = stock_pipeline(folder)
    pipeline.load_lora_weights(saved, adapter_name="lcm")
    pipeline.set_adapters("lcm", 0.5)
    return Policy(pipeline)


def fused_before(folder, saved):
    pipeline = stock_pipeline(folder)
    pipeline.load_lora_weights(saved)
    pipeline.fuse_lora()
    return Policy(pipeline)


UNDERNEATH = {
    "before": loaded_before,
    "weakened": weakened_before,
    "fused": fused_before,
    "named": lambda folder, saved: load_policy(folder, device="cpu").load_lora(saved, name="lcm"),
}


@pytest.mark.parametrize("make", UNDERNEATH.values(), ids=UNDERNEATH)
@pytest.mark.parametrize("rank", [2, 0])
def test_other_loras_stay_underneath(folder, predict, saved, tmp_path, make, rank):
    original, policy = predict(), make(folder, saved)
    underneath = predict(policy).detach()
    trainer = small_trainer(None, tmp_path, policy=policy, lora_rank=rank, learning_rate=1e-2, kl_coefficient=0.1)
    assert near(predict(policy), underneath) and not near(underneath, original)
    fresh = load_policy(folder, device="cpu").prepare_training(rank)
    assert policy.lora_state().keys() == fresh.lora_state().keys()
    assert trainer.train()["log_ratio/max_before_update"] == 0
    trained = predict(policy).detach()
    with policy.without_lora():
        assert near(predict(policy), underneath)
    assert torch.equal(predict(policy), trained) and not near(trained, underneath)
    again = make(folder, saved) if rank else load_policy(folder, device="cpu")  # whole weights have taken it in
    again.load_lora(tmp_path / "run/lora") if rank else again.load_whole(tmp_path / "run/unet")
    assert near(predict(again), trained)
    small_trainer(None, tmp_path / "again", policy=policy, lora_rank=rank)
    assert near(predict(policy), underneath)


def test_a_lora_that_is_switched_off_stays_so(folder, predict, saved):
    policy = loaded_before(folder, saved)
    policy.pipeline.disable_lora()
    assert near(predict(nudged(policy.prepare_training(2), 0.0)), predict())
    assert not near(predict(nudged(policy)), predict())  # and the new one has an effect
    policy.remove_lora()
    assert torch.equal(predict(policy), predict())


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_starts_from_loaded_whole_weights(policy, predict, tmp_path, rank):
    with torch.no_grad():
        for parameter in policy.train_whole().trainable_parameters().values():
            parameter.mul_(1.1)
    changed, mark = predict(), policy.fingerprint
    policy.save_whole(tmp_path / "unet")
    policy.remove_lora()
    assert not near(predict(), changed)
    policy.load_whole(tmp_path / "unet")
    small_trainer(None, tmp_path, policy=policy, lora_rank=rank, learning_rate=1e-2).train()
    assert not near(predict(), changed)
    with policy.without_lora():  # the reference
        assert torch.equal(predict(), changed)
    small_trainer(None, tmp_path / "again", policy=policy, lora_rank=rank)
    assert torch.equal(predict(), changed) and policy.fingerprint != mark


def test_a_lora_goes_on_top_of_loaded_whole_weights_but_not_the_other_way_round(policy, predict, saved, tmp_path):
    with torch.no_grad():
        for parameter in policy.train_whole().trainable_parameters().values():
            parameter.mul_(1.1)
    changed = predict()
    policy.save_whole(tmp_path / "unet")
    policy.remove_lora()
    policy.load_whole(tmp_path / "unet").load_lora(saved)
    with policy.without_lora():
        assert torch.equal(predict(), changed)
    with pytest.raises(ValueError, match=r"carries a loaded LoRA \(default\).*call load_whole before load_lora"):
        policy.load_whole(tmp_path / "unet")
    assert policy.has_lora


def own_lora(policy, targets=("to_q", "to_k", "to_v", "to_out.0"), **options):
    config = dict(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False)
    policy.denoiser.add_adapter(LoraConfig(**config | options), "default")


MISFITS = {
    "rank": (lambda policy: own_lora(policy), (8, 8), "rank 4 and alpha 8 on 32 layers.*lora_rank=8 and lora_alpha=8"),
    "alpha": (lambda policy: own_lora(policy), (4, 4), "give the run lora_rank=4 and lora_alpha=8, load it"),
    "whole": (lambda policy: own_lora(policy), (0, None), "the run lora_rank=0: give the run lora_rank=4"),
    "layers": (lambda policy: own_lora(policy, ["to_q"]), (4, 8), "alpha 8 on 8 layers, .* on 32 layers: load it"),
    "ranks": (lambda policy: own_lora(policy, rank_pattern={"to_q": 2}), (4, 8), "has rank 2 to 4 and"),
    "dora": (lambda policy: own_lora(policy, use_dora=True), (4, 8), r"on 32 layers \(DoRA\), the run .*: load it"),
}


@pytest.mark.parametrize("load, asked, sentence", MISFITS.values(), ids=MISFITS)
def test_a_loaded_lora_that_does_not_fit_is_refused_and_kept(policy, predict, load, asked, sentence):
    load(policy)
    before = predict()
    with pytest.raises(ValueError, match=sentence) as caught:
        policy.prepare_training(*asked)
    assert "call remove_lora()" in str(caught.value) and "\n" not in str(caught.value)
    assert torch.equal(predict(), before)


def test_the_rank_of_half_precision_policies_is_trained_in_float32(folder, saved):
    policy = load_policy(folder, device="cpu", precision="bf16")
    by_diffusers(policy, saved, adapter_name="default")
    parameters = policy.prepare_training(4, 8).trainable_parameters().values()
    assert {parameter.dtype for parameter in parameters} == {torch.float32}


# --- fingerprints


def test_a_fingerprint_goes_by_what_the_weights_are(folder, tmp_path, random_folder, policy):
    mark, moved = policy.fingerprint, shutil.copytree(folder, tmp_path / "moved")
    config = moved / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("{", '{"note": 1, ', 1))
    assert load_policy(moved, device="cpu").fingerprint == mark
    others = [load_policy(random_folder(seed=1), device="cpu"), load_policy(folder, device="cpu", precision="bf16")]
    assert len({mark, *(other.fingerprint for other in others)}) == 3
    for part in ("unet", "vae", "text_encoder"):
        other = load_policy(folder, device="cpu")
        with torch.no_grad():
            list(getattr(other.pipeline, part).parameters())[3].flatten()[-1] += 1e-3
        assert other.fingerprint != mark


def test_a_fingerprint_is_that_of_what_is_frozen(policy, folder, saved):
    mark = policy.fingerprint
    assert nudged(policy.prepare_training(4)).fingerprint == mark
    assert policy.load_lora(saved).prepare_training(4, 8).fingerprint == mark
    policy.remove_lora()
    with torch.no_grad():
        for parameter in policy.prepare_training(0).trainable_parameters().values():
            parameter.add_(0.1)
    assert policy.fingerprint == mark  # of the originals
    policy._fingerprint = None
    assert policy.fingerprint == mark
    policy.remove_lora()
    named = policy.load_lora(saved, name="lcm").prepare_training(4).fingerprint
    assert named != mark and named == loaded_before(folder, saved).prepare_training(2).fingerprint
    assert weakened_before(folder, saved).prepare_training(4).fingerprint not in (mark, named)


# --- transformers


def stable_diffusion_3():
    "Two layers of SD3's transformer, without text encoders"
    torch.manual_seed(0)
    sizes = dict(sample_size=8, patch_size=1, in_channels=4, out_channels=4, pos_embed_max_size=8, num_layers=2)
    widths = dict(attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16)
    transformer = SD3Transformer2DModel(**sizes, **widths, pooled_projection_dim=16)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    return StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), vae, *[None] * 6)


def test_a_transformer_is_trained_like_a_unet(tmp_path):
    x, states, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16), torch.randn(2, 16)

    @torch.no_grad()
    def output(network):
        told = dict(timestep=torch.tensor([900.0, 500.0]), encoder_hidden_states=states, pooled_projections=pooled)
        return network(x, **told).sample

    trained, stock = TrainablePipeline(stable_diffusion_3()), stable_diffusion_3()
    original = output(trained.denoiser)
    mark = trained.fingerprint
    nudged(trained.prepare_training(4, 8)).save_lora(tmp_path)
    expected = output(trained.denoiser)
    assert trained.part_name == "transformer" and (expected - original).abs().max() > 0.1
    stock.load_lora_weights(tmp_path)
    again = TrainablePipeline(stable_diffusion_3()).load_lora(tmp_path)
    assert torch.equal(output(stock.transformer), expected) and torch.equal(output(again.denoiser), expected)
    with again.without_lora():
        assert torch.equal(output(again.denoiser), original)
    again.train_whole().save_whole(tmp_path / "whole")
    assert torch.equal(output(SD3Transformer2DModel.from_pretrained(tmp_path / "whole")), original)
    assert torch.equal(output(trained.load_whole(tmp_path / "whole").denoiser), original)
    assert again.prepare_training(4).fingerprint == trained.prepare_training(0).fingerprint == mark


# --- half precision


@pytest.mark.parametrize("options, plain", [({}, True), (dict(use_dora=True), False), (dict(lora_dropout=0.5), False)])
def test_a_half_precision_layer_computes_as_its_base_unless_it_is_a_special_one(options, plain):
    "Near PEFT's own result, or exactly that; a copy of the layer computes with its own weights"
    torch.manual_seed(0)
    base, x = torch.nn.Linear(24, 16).requires_grad_(False).bfloat16(), torch.randn(2, 5, 24).bfloat16()
    layer = Linear(base, "a", LoraConfig(r=4, init_lora_weights=False, **options), r=4, lora_alpha=4)
    layer.lora_A.float(), layer.lora_B.float()
    torch.manual_seed(1)
    by_peft = layer(x)
    _compute_as_base(layer)
    torch.manual_seed(1)
    here = layer(x)
    assert here.dtype == x.dtype and torch.equal(here, by_peft) != plain
    assert (here - by_peft).abs().max() <= 2**-6 * by_peft.abs().max()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.lora_B["a"].weight.zero_()
    assert torch.equal(layer(x), here) or options
    assert plain is False or torch.equal(twin(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_with_a_lora_can_be_compiled(dtype):
    "`torch.compile` reads its forward pass; what makes machine code of it does not matter here"
    base, x = torch.nn.Linear(24, 16).requires_grad_(False).to(dtype), torch.randn(2, 5, 24).to(dtype)
    layer = Linear(base, "a", LoraConfig(r=4, init_lora_weights=False), r=4, lora_alpha=4)
    layer.lora_A.float(), layer.lora_B.float()
    _compute_as_base(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    assert torch.equal(compiled(x), layer(x))
    compiled(x).float().sum().backward()
    assert layer.lora_A["a"].weight.grad is not None
