"""LaSRO: the surrogate and its pairs, gradients through few steps, the alternation, exact resume, the alarm."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from sdpo_nb.cli import train_command
from sdpo_nb.config import TrainConfig, batch_plan, resolve
from sdpo_nb.files import read_jsonl
from sdpo_nb.lasro import (
    LaSROConfig,
    LaSROTrainer,
    LatentReward,
    RankedPairs,
    ReplayBuffer,
    RunningScale,
    best_and_worst,
    bradley_terry_loss,
    few_step_outputs,
    gains_since,
    ranked_loss,
    ranking_accuracy,
    score_outputs,
)
from sdpo_nb.mdp import make_sampler, sample_trajectories
from sdpo_nb.models import load_policy
from sdpo_nb.rewards import jpeg_compressibility
from sdpo_nb.trainer import Callback, most_skipped, newest_checkpoint

script = Path(__file__).parent.parent / "benchmarks" / "random_models.py"
spec = importlib.util.spec_from_file_location("random_models", script)
random_models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(random_models)
kinds = ("tiny", "sd_turbo", "sdxl_turbo", "lcm")
prompts = ["a cat", "two dogs"]
small = dict(
    epochs=2,
    pairs_per_epoch=2,
    candidates=3,
    generator_batch=3,
    generator_steps=2,
    surrogate_steps=2,
    pretrain_prompts=3,
    pretrain_steps=2,
    eval_samples=0,
    seed=1,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("lasro")
    return {
        "tiny": "tiny",
        **{kind: random_models.make(kind, root / kind, width=32, image_size=32) for kind in kinds[1:]},
    }


@pytest.fixture
def policy():
    return load_policy("tiny", device="cpu")


def spoil(policy):
    "A LoRA that changes everything"
    policy.add_lora(4, seed=3)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    return policy


def make(policy, folder, reward="jpeg_compressibility", callbacks=(), **fields):
    return LaSROTrainer(
        policy,
        reward,
        prompts,
        LaSROConfig(**{**small, "policy": policy.name, "output_dir": str(folder), **fields}),
        list(callbacks),
    )


def numbers(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("seconds")}


# --- the surrogate -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", kinds)
def test_the_encoder_starts_as_the_policys_own_whatever_its_lora(folders, kind):
    policy = load_policy(folders[kind], device="cpu")
    embedding, latents, seen = policy.embed(prompts), torch.randn(2, *policy.latent_shape), {}
    handle = policy.unet.mid_block.register_forward_hook(lambda module, args, output: seen.update(features=output))
    policy.unet(latents, 0, **policy.conditioning(embedding))
    handle.remove()
    spoil(policy)
    surrogate = LatentReward(policy)
    torch.testing.assert_close(
        surrogate.encoder(latents, 0, **surrogate.conditions(embedding), return_dict=False)[0],
        seen["features"],
        rtol=0,
        atol=1e-5,
    )
    assert surrogate(latents, embedding).shape == (2,)
    assert not any("up_blocks" in name or "lora" in name for name, _ in surrogate.named_parameters())


def test_the_surrogate_shares_no_memory_with_the_policy(policy):
    theirs, ours = (
        {parameter.data_ptr() for parameter in module.parameters()} for module in (policy.unet, LatentReward(policy))
    )
    assert not theirs & ours
    assert not any(parameter.is_meta for parameter in LatentReward(policy).parameters())


@pytest.mark.parametrize("learns", ["encoder", "head"])
def test_what_learns(policy, learns):
    surrogate = LatentReward(policy, learns)
    names = {name.split(".")[0] for name, parameter in surrogate.named_parameters() if parameter.requires_grad}
    assert names == {"features", "score"} | ({"encoder"} if learns == "encoder" else set())
    assert not any(parameter.requires_grad for parameter in surrogate.learning(False).parameters())
    assert {
        name.split(".")[0] for name, parameter in surrogate.learning(True).named_parameters() if parameter.requires_grad
    } == names
    with pytest.raises(ValueError, match="surrogate_learns is 'all', which is none of encoder, head"):
        LatentReward(policy, "all")


def test_the_head_is_the_same_for_the_same_seed_and_leaves_torch_alone(policy):
    before = torch.get_rng_state()
    first, second, third = (LatentReward(policy, seed=seed).score.weight for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, third) and torch.equal(before, torch.get_rng_state())


def test_text_and_latents_reach_the_score_without_the_autoencoder(policy, monkeypatch):
    monkeypatch.setattr(policy.vae, "decode", lambda *args, **kwargs: pytest.fail("decoded"))
    surrogate, latents = LatentReward(policy), torch.randn(2, 2, *policy.latent_shape, requires_grad=True)
    scores = score_outputs(surrogate, latents, policy.embed(["a circle", "a star"]))
    swapped = score_outputs(surrogate, latents, policy.embed(["a star", "a circle"]))
    scores.sum().backward()
    assert (
        scores.shape == (2, 2)
        and latents.grad.abs().amin((1, 2, 3, 4)).min() >= 0
        and latents.grad.abs().amax((2, 3, 4)).min() > 0
    )
    assert (scores - swapped).abs().min() > 1e-6
    alone = surrogate(latents[1:, 1], policy.embed(["a star"]))
    torch.testing.assert_close(alone[0], scores[1, 1], rtol=0, atol=1e-4)


def test_half_precision_policies_get_a_float32_surrogate():
    policy = load_policy("tiny", device="cpu", precision="bf16")
    surrogate = LatentReward(policy)
    scores = surrogate(torch.randn(2, *policy.latent_shape, dtype=policy.dtype), policy.embed(prompts))
    assert scores.dtype == torch.float32 and {parameter.dtype for parameter in surrogate.parameters()} == {
        torch.float32
    }


@pytest.mark.parametrize(
    "precision, expected", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float32)]
)
def test_the_surrogate_never_computes_in_float16(policy, precision, expected):
    "Its gradient would underflow there without a loss scale"
    surrogate, seen = LatentReward(policy), []
    policy.pipeline.unet.to(dtype := dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[precision])
    assert policy.dtype == dtype
    surrogate.encoder.conv_in.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    surrogate(torch.randn(2, *policy.latent_shape, dtype=dtype), policy.embed(prompts)).sum().backward()
    assert (
        seen == [expected]
        and surrogate.encoder.conv_in.weight.grad.isfinite().all()
        and surrogate.encoder.conv_in.weight.grad.abs().max() > 0
    )


# --- pairs ---------------------------------------------------------------------------------------


def test_best_and_worst_are_chosen_at_each_step():
    rewards = torch.tensor([[[1.0, 5.0], [3.0, 4.0], [2.0, 6.0]]])  # one group, three samples, two steps
    outputs = torch.arange(6.0).view(1, 3, 2, 1, 1, 1)
    pairs = best_and_worst(["p"], outputs, rewards)
    assert pairs.rewards.tolist() == [[[3.0, 6.0]], [[1.0, 4.0]]]
    assert pairs.latents.flatten(2).tolist() == [[[2.0, 5.0]], [[0.0, 3.0]]]  # samples 1 and 2 win, 0 and 1 lose


def test_bradley_terry_by_hand():
    winner, loser = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])
    expected = [-math.log(math.exp(w) / (math.exp(w) + math.exp(l))) for w, l in zip(winner.tolist(), loser.tolist())]
    assert bradley_terry_loss(winner, loser).item() == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert bradley_terry_loss(winner, loser, torch.tensor([True, False])).item() == pytest.approx(expected[0], rel=1e-5)
    assert bradley_terry_loss(winner, loser, torch.tensor([False, False])).item() == 0
    assert (
        bradley_terry_loss(winner + 1000, loser - 1000).item() < 1e-6
        and bradley_terry_loss(loser - 1000, winner + 1000).isfinite()
    )


def test_accuracy_counts_decided_pairs_within_a_group():
    rewards = torch.tensor([[[1.0], [2.0], [2.0]], [[0.0], [1.0], [2.0]]])
    right = rewards * 3 + torch.tensor([100.0, -100.0]).view(2, 1, 1)  # a shift per prompt changes nothing
    assert ranking_accuracy(right, rewards).tolist() == [1.0]
    assert ranking_accuracy(-right, rewards).tolist() == [0.0]
    assert ranking_accuracy(torch.zeros_like(rewards), rewards).tolist() == [0.5]
    one_wrong = torch.tensor(
        [[[1.0], [2.0], [5.0]], [[0.0], [2.0], [1.0]]]
    )  # the tie does not count, one of five is wrong
    assert ranking_accuracy(one_wrong, rewards).item() == pytest.approx(4 / 5)


def test_fitting_teaches_the_order_and_ties_teach_nothing(policy):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 2, *policy.latent_shape, generator=generator)
    pairs = RankedPairs(["a circle"] * 4, latents, torch.stack([torch.ones(4, 2), torch.zeros(4, 2)]))
    surrogate, embedding = LatentReward(policy), policy.embed(pairs.prompts)
    optimizer = torch.optim.AdamW(surrogate.parameters(), lr=1e-3)
    for _ in range(15):
        loss, scores = ranked_loss(surrogate, pairs, embedding)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 and (scores[0] > scores[1]).all()
    tied, _ = ranked_loss(surrogate, RankedPairs(pairs.prompts, latents, torch.ones(2, 4, 2)), embedding)
    assert tied.item() == 0


def test_the_buffer_keeps_the_newest_and_comes_back_as_it_was():
    def pairs(*values):
        return RankedPairs(
            [f"p{value}" for value in values],
            torch.tensor(values).float().view(1, -1, 1, 1, 1, 1).expand(2, -1, 1, 1, 1, 1),
            torch.zeros(2, len(values), 1),
        )

    buffer = ReplayBuffer(3)
    assert len(buffer) == 0 and buffer.state_dict() is None
    buffer.add(pairs(0, 1))
    buffer.add(pairs(2, 3))
    assert buffer.pairs.prompts == ["p1", "p2", "p3"] and buffer.pairs.latents[0].flatten().tolist() == [1, 2, 3]
    other = ReplayBuffer(3)
    other.load_state_dict(buffer.state_dict())
    drawn = [each.draw(7, torch.Generator().manual_seed(0)) for each in (buffer, other)]
    assert drawn[0].prompts == drawn[1].prompts and len(drawn[0]) == 7 and {*drawn[0].prompts} <= {"p1", "p2", "p3"}
    assert [f"p{int(value)}" for value in drawn[0].latents[0].flatten()] == drawn[0].prompts


def test_the_running_scale_by_hand():
    scale = RunningScale(1, decay=0.5)
    scale.update(torch.tensor([[0.0], [4.0]]), recentre=True)
    assert (scale.mean.item(), scale.largest.item()) == (2.0, 2.0)
    scores = torch.tensor([[3.0], [10.0], [-10.0]], requires_grad=True)
    normalised = scale(scores)
    normalised.sum().backward()
    assert normalised.flatten().tolist() == [0.5, 1.0, -6.0] and scores.grad.flatten().tolist() == [0.5, 0.0, 0.5]
    scale.update(torch.tensor([[4.0], [4.0]]))
    assert (scale.mean.item(), scale.largest.item()) == (3.0, 1.0)
    scale.update(torch.tensor([[103.0]]), recentre=True)
    assert (scale.mean.item(), scale.largest.item()) == (103.0, 0.5)
    other = RunningScale(1, 0.5)
    other.load_state_dict(scale.state_dict())
    assert other(scores).tolist() == scale(scores).tolist()
    assert RunningScale(2)(torch.zeros(3, 2)).isfinite().all()


@pytest.mark.parametrize("recentre", [False, True])
def test_an_overflow_leaves_the_running_scale_alone(recentre):
    scale, clean = RunningScale(2), RunningScale(2)
    good = torch.tensor([[0.0, 1.0], [4.0, 3.0]])
    clean.update(good, recentre=recentre)
    scale.update(torch.cat([good, torch.tensor([[math.inf, 1.0], [2.0, math.nan]])]), recentre=recentre)
    assert torch.equal(scale.mean, clean.mean) and torch.equal(scale.largest, clean.largest)
    scale.update(torch.full((2, 2), math.nan), recentre=recentre)
    assert torch.equal(scale.mean, clean.mean) and scale(good).isfinite().all()


# --- gradients through few steps -----------------------------------------------------------------


@pytest.mark.parametrize("kind", kinds)
@pytest.mark.parametrize("num_steps", [1, 2])
def test_outputs_are_those_of_the_sampler(folders, kind, num_steps):
    policy = load_policy(folders[kind], device="cpu")
    scheduler, embedding, generator = (
        make_sampler(policy.scheduler, num_steps),
        policy.embed(prompts),
        torch.Generator().manual_seed(0),
    )
    initial, noises = (
        torch.randn(2, *policy.latent_shape, generator=generator),
        torch.randn(2, num_steps, *policy.latent_shape, generator=generator),
    )

    def predict(x, t):
        return policy.predict(x, t, embedding)

    with torch.no_grad():
        outputs, reference = few_step_outputs(predict, scheduler, initial, noises, reference=predict)
    expected = sample_trajectories(predict, scheduler, initial, noises).pred_x0
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    torch.testing.assert_close(reference, outputs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["tiny", "lcm"])
def test_where_the_gradient_goes(folders, kind):
    scheduler = make_sampler(load_policy(folders[kind], device="cpu").scheduler, 2)
    generator = torch.Generator().manual_seed(0)
    initial, noises = torch.randn(2, 4, 2, 2, generator=generator), torch.randn(2, 2, 4, 2, 2, generator=generator)
    first = scheduler.timesteps[0].item()

    def second_output(a, b, through):
        return few_step_outputs(
            lambda x, t: (a if t == first else b) * x, scheduler, initial, noises, through_noise=through
        )[0][:, 1].sum()

    for through in (True, False):
        a, b = torch.tensor(0.3, requires_grad=True), torch.tensor(0.2, requires_grad=True)
        value = second_output(a, b, through)
        from_a, from_b = torch.autograd.grad(value, (a, b), allow_unused=True)
        with torch.no_grad():
            slope = (second_output(a + 1e-2, b, True) - second_output(a - 1e-2, b, True)) / 2e-2
        assert abs(slope) > 1e-2 and from_b.abs() > 1e-3
        if through:
            assert from_a.item() == pytest.approx(slope.item(), rel=1e-2)
        else:
            assert from_a.item() == 0


# --- the alternation -----------------------------------------------------------------------------


def test_counts_are_those_of_the_plan_and_the_reward_is_a_black_box(policy, tmp_path):
    seen = []

    def reward(images, prompts):
        assert not images.requires_grad and not torch.is_grad_enabled()
        seen.append(len(images))
        return jpeg_compressibility(images, prompts)

    trainer = make(policy, tmp_path / "run", reward)
    metrics, plan = trainer.train(), batch_plan(trainer.config)
    assert plan["reward queries per epoch"] == 2 * 3 * 2 and plan["reward queries of the pre-training"] == 3 * 3 * 2
    assert metrics["reward_queries"] == sum(seen) == 18 + 2 * 12
    assert metrics["samples"] == 3 * 3 + 2 * (2 * 3 + 2 * 3)
    assert (
        metrics["optimizer_steps"] == 2 * plan["optimizer steps per epoch"] == 4
        and metrics["surrogate_steps"] == 2 + 2 * 2
    )
    assert (len(trainer.replay), trainer.replay.pairs.latents.shape[2]) == (3 + 2 * 2, 2)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert (
        lines[-1] == json.loads(json.dumps(metrics))
        and {
            "gain/true/step_1",
            "gain/claimed/step_2",
            "surrogate/accuracy/step_2",
            "alarm",
            "anchor",
            "reward/mean",
            "grad_norm",
        }
        <= lines[0].keys()
    )
    assert (tmp_path / "run" / "lora").is_dir()


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path):
    first, second, other = (
        numbers(make(load_policy("tiny", device="cpu"), tmp_path / str(number), seed=seed).train())
        for number, seed in enumerate((1, 1, 2))
    )
    assert first == second and first["loss"] != other["loss"]


@pytest.mark.parametrize("fields", [{}, {"surrogate_learns": "head", "num_steps": 1}])
def test_a_resumed_run_is_the_same_run_bit_by_bit(tmp_path, fields):
    straight = make(load_policy("tiny", device="cpu"), tmp_path / "straight", epochs=4, **fields)
    straight.train()
    make(load_policy("tiny", device="cpu"), tmp_path / "broken", epochs=2, **fields).train()
    resumed = make(
        load_policy("tiny", device="cpu"), tmp_path / "broken", epochs=4, resume=str(tmp_path / "broken"), **fields
    )
    resumed.train()
    for one, two in zip(
        (straight.policy.lora_state(), straight.surrogate.state_dict()),
        (resumed.policy.lora_state(), resumed.surrogate.state_dict()),
    ):
        assert all(torch.equal(one[name], two[name]) for name in one) and one.keys() == two.keys()
    assert [numbers(line) for line in read_jsonl(tmp_path / "straight" / "metrics.jsonl")] == [
        numbers(line) for line in read_jsonl(tmp_path / "broken" / "metrics.jsonl")
    ]
    assert (
        torch.equal(straight.replay.pairs.latents, resumed.replay.pairs.latents) and straight.counts == resumed.counts
    )
    assert torch.equal(straight.scale.largest, resumed.scale.largest)
    kept = newest_checkpoint(tmp_path / "broken")["own"]["surrogate"]
    assert (
        any(name.startswith("encoder.") for name in kept) == (fields.get("surrogate_learns") != "head")
        and {"score.weight", "features.1.weight"} <= kept.keys()
    )


def test_the_generator_starts_at_its_anchor_and_is_pulled_back_to_it(policy, tmp_path):
    trainer = make(policy, tmp_path / "run", anchor_weight=1e3, learning_rate=1e-2)
    trainer.pretrain()
    noise = trainer.noise(torch.arange(2), "test")
    assert trainer.generator_loss(prompts, *noise)[2]["anchor"] == 0
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    away = trainer.generator_loss(prompts, *noise)[2]["anchor"]
    for number in range(8):
        trainer.generator_step(0, number)
    assert away > 0 and trainer.generator_loss(prompts, *noise)[2]["anchor"] < away


def test_a_frozen_surrogate_stays_as_it_is_while_the_generator_moves(policy, tmp_path):
    trainer = make(policy, tmp_path / "run", surrogate_steps=0, pretrain_steps=1)
    trainer.train_epoch()
    before, lora = {name: value.clone() for name, value in trainer.surrogate.state_dict().items()}, policy.lora_state()
    metrics = trainer.train_epoch()
    assert (
        all(torch.equal(value, before[name]) for name, value in trainer.surrogate.state_dict().items())
        and metrics["surrogate/loss"] is None
    )
    assert any(not torch.equal(value, lora[name]) for name, value in policy.lora_state().items())
    assert all(parameter.grad is None for parameter in trainer.surrogate.parameters())


def test_portions_add_up_to_the_whole_batch(tmp_path):
    def gradient(**fields):
        trainer, found = (
            make(load_policy("tiny", device="cpu"), tmp_path / "run", generator_batch=4, pairs_per_epoch=4, **fields),
            [],
        )
        trainer.pretrain()
        trainer.surrogate.learning(False)
        trainer.scale.update(
            trainer.surrogate_scores(trainer.before["outputs"], trainer.before["prompts"]), recentre=True
        )
        trainer.optimizer_step = lambda: (
            found.append(torch.cat([parameter.grad.flatten() for parameter in trainer.parameters])) or 0.0
        )
        trainer.generator_step(0, 0)
        return found[0]

    whole, portions = (
        gradient(pairs_per_update=4, micro_batch=4, pretrain_steps=0),
        gradient(pairs_per_update=4, micro_batch=1, pretrain_steps=0),
    )
    torch.testing.assert_close(whole, portions, rtol=1e-3, atol=1e-5 * whole.abs().max().item())


@pytest.mark.parametrize("kind, num_steps", [("sd_turbo", 2), ("sdxl_turbo", 2), ("lcm", 1), ("lcm", 2)])
def test_every_family_of_models_is_trained(folders, tmp_path, kind, num_steps):
    policy = load_policy(folders[kind], device="cpu")
    metrics = make(policy, tmp_path / "run", num_steps=num_steps, epochs=1, candidates=2, generator_steps=1).train()
    assert (
        math.isfinite(metrics["loss"])
        and metrics["grad_norm"] > 0
        and metrics["optimizer_steps"] == 1
        and f"reward/step_{num_steps}" in metrics
    )


@pytest.mark.parametrize("num_steps", [1, 2])
def test_reward_and_anchor_are_means_over_the_outputs(tmp_path, num_steps):
    "So that anchor_weight says the same at one step and at two, and step_weight only shifts weight between outputs"
    for step_weight in (1.0, 0.5):
        trainer = make(
            spoil(load_policy("tiny", device="cpu")),
            tmp_path / "run",
            num_steps=num_steps,
            step_weight=step_weight,
            anchor_weight=1.5,
        )
        trainer.pretrain()
        trainer.scale.mean, trainer.scale.largest = torch.zeros(num_steps), torch.ones(num_steps)
        trainer.surrogate.forward = lambda latents, embedding: torch.full((len(latents),), 0.25)
        loss, _, parts = trainer.generator_loss(prompts, *trainer.noise(torch.arange(2), "test"))
        assert loss.item() == pytest.approx(
            1.5 * parts["anchor"] - 0.25, abs=1e-6
        ) and trainer.weights.sum().item() == pytest.approx(1.0)


def test_a_score_that_overflows_costs_one_update_and_not_the_run(policy, tmp_path):
    trainer = make(policy, tmp_path / "run", generator_steps=3)
    score, calls = trainer.surrogate.forward, []

    def overflow_once(latents, embedding):
        scores = score(latents, embedding)
        calls.append(scores.requires_grad and not trainer.surrogate.score.weight.requires_grad)  # a generator step
        return scores * math.inf if calls[-1] and sum(calls) == 1 else scores

    trainer.surrogate.forward = overflow_once
    metrics = trainer.train()
    assert metrics["skipped_updates"] == 1 and metrics["optimizer_steps"] == 5 and math.isfinite(metrics["loss"])
    assert trainer.scale.mean.isfinite().all() and trainer.scale.largest.isfinite().all()


def test_dropped_steps_of_the_surrogate_are_counted_and_end_in_one_sentence(policy, tmp_path):
    trainer = make(policy, tmp_path / "run", pretrain_steps=0)
    trainer.pretrain()
    trainer.replay.pairs.latents[0, 0] = math.inf
    pairs, before = trainer.replay.pairs, trainer.surrogate.score.weight.clone()
    for number in range(1, most_skipped):
        trainer.surrogate_step(pairs)
        assert (trainer.counts["surrogate_steps"], trainer.counts["surrogate_skipped"]) == (0, number)
    with pytest.raises(
        RuntimeError, match=f"gradient of the surrogate was infinite or NaN {most_skipped} times in a row"
    ):
        trainer.surrogate_step(pairs)
    assert torch.equal(before, trainer.surrogate.score.weight)
    trainer.counts["surrogate_skipped_in_a_row"] = 3
    pairs.latents[0, 0] = 0.0
    trainer.surrogate_step(pairs)
    assert trainer.counts["surrogate_steps"] == 1 and trainer.counts["surrogate_skipped_in_a_row"] == 0


def test_several_processes_are_refused(policy, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    monkeypatch.setattr("sdpo_nb.trainer.check_processes", lambda *given: None)
    monkeypatch.setattr(policy.pipeline, "to", lambda device: policy.pipeline)
    with pytest.raises(ValueError, match="LaSRO runs on one process, not on 2; start it without accelerate launch"):
        make(policy, tmp_path / "run")


def test_gradient_checkpointing_changes_memory_and_not_the_run(tmp_path):
    kept, again = (
        make(load_policy("tiny", device="cpu"), tmp_path / str(on), epochs=1, gradient_checkpointing=on).train()
        for on in (False, True)
    )
    assert kept["loss"] == pytest.approx(again["loss"], abs=1e-4) and kept["grad_norm"] == pytest.approx(
        again["grad_norm"], rel=1e-2
    )


def test_guidance_and_half_precision(folders, tmp_path):
    assert (
        make(load_policy(folders["sd_turbo"], device="cpu"), tmp_path / "guided", epochs=1, guidance_scale=2.0).train()[
            "grad_norm"
        ]
        > 0
    )
    assert (
        make(
            load_policy("tiny", device="cpu", precision="bf16"), tmp_path / "half", epochs=1, precision="bf16"
        ).train()["grad_norm"]
        > 0
    )


# --- the alarm -----------------------------------------------------------------------------------


def test_gains_are_in_standard_deviations_within_a_prompt():
    before, names = torch.tensor([[0.0], [2.0], [10.0], [12.0]]), ["a", "a", "b", "b"]  # means 1 and 11, deviation √2
    gain, error = gains_since(torch.tensor([[1 + 2**0.5], [11 + 2**0.5]]), ["a", "b"], before, names)
    assert gain.item() == pytest.approx(1.0) and error.item() == pytest.approx(0.0, abs=1e-6)
    gain, error = gains_since(torch.tensor([[1.0], [11 + 2 * 2**0.5]]), ["a", "b"], before, names)
    assert gain.item() == pytest.approx(1.0) and error.item() == pytest.approx(
        1.0
    )  # gains 0 and 2: deviation √2, of two prompts


def test_the_error_of_a_gain_comes_from_prompts_and_not_from_samples():
    before, names = torch.tensor([[0.0], [2.0], [10.0], [12.0]]), ["a", "a", "b", "b"]
    few = gains_since(torch.tensor([[1.0], [14.0]]), ["a", "b"], before, names)
    many = gains_since(torch.tensor([[1.0]] * 9 + [[14.0]] * 50), ["a"] * 9 + ["b"] * 50, before, names)
    assert [value.item() for value in few] == pytest.approx([value.item() for value in many])


def test_a_prompt_without_a_past_is_left_out_of_the_gain():
    before, names = torch.tensor([[0.0], [2.0], [10.0], [12.0]]), ["a", "a", "b", "b"]
    known = gains_since(torch.tensor([[2.0], [13.0]]), ["a", "b"], before, names)
    more = gains_since(torch.tensor([[2.0], [1000.0], [13.0]]), ["a", "c", "b"], before, names)
    assert [value.item() for value in known] == [value.item() for value in more]
    gain, error = gains_since(torch.tensor([[6.0]]), ["c"], before, names)
    assert math.isnan(gain.item()) and error.item() == math.inf
    gain, error = gains_since(
        torch.tensor([[1.0]]), ["a"], before, names
    )  # one prompt has no spread to tell an error from
    assert gain.item() == 0.0 and error.item() == math.inf


def test_a_round_of_prompts_without_a_past_trains_and_rings_for_no_fall(policy, tmp_path, monkeypatch):
    trainer = make(policy, tmp_path / "run", pretrain_prompts=1, epochs=1)
    monkeypatch.setattr(
        trainer,
        "draw_units",
        lambda epoch: (torch.arange(2), [next(p for p in prompts if p not in trainer.before["prompts"])] * 2),
    )
    metrics = trainer.train()
    assert (
        metrics["gain/true/step_2"] is None and metrics["gain/error/step_2"] is None and metrics["optimizer_steps"] == 2
    )
    assert trainer.counts["best_true"] == 0


def test_every_prompt_gets_a_past_before_any_comes_twice(policy, tmp_path):
    trainer = make(policy, tmp_path / "run", pretrain_prompts=3, candidates=4)
    trainer.pretrain()
    drawn = trainer.before["prompts"][:3]
    assert {*drawn[:2]} == {*prompts} and trainer.before["prompts"] == drawn * 4
    assert trainer.before["outputs"].shape[:2] == (12, 2) and trainer.before["rewards"].shape == (12, 2)
    assert trainer.before["outputs"].untyped_storage().nbytes() == trainer.before["outputs"].nbytes


def fine(true, error, claimed):
    return true, error, claimed, 0.8, 0.05


def test_the_alarm_rings_when_claims_hold_and_truth_falls_and_may_stop_the_run(policy, tmp_path):
    trainer = make(policy, tmp_path / "run", alarm_patience=2, epochs=9)
    story = [
        (0.5, 0.1, 1.0, 0),
        (1.0, 0.1, 2.0, 0),
        (0.9, 0.1, 3.0, 0),
        (0.7, 0.1, 3.0, 1),
        (0.7, 0.1, 1.5, 0),
        (0.6, 0.1, 4.0, 1),
        (0.5, 0.1, 5.0, 2),
    ]
    for true, error, claimed, expected in story:
        assert not trainer.finished()
        assert trainer.note_claims(*fine(true, error, claimed)) == bool(expected)
        assert trainer.counts["alarms_in_a_row"] == expected
    assert trainer.finished()
    assert not make(policy, tmp_path / "other").finished()


def test_a_lucky_best_is_known_to_be_uncertain(policy, tmp_path):
    for best_error, rings in ((0.1, True), (0.5, False)):
        trainer = make(policy, tmp_path / "run")
        assert not trainer.note_claims(*fine(2.0, best_error, 1.0))
        assert trainer.note_claims(*fine(1.5, 0.1, 2.0)) == rings


def test_the_alarm_rings_for_a_surrogate_like_a_coin(policy, tmp_path):
    trainer = make(policy, tmp_path / "run")
    assert not trainer.note_claims(1.0, 0.1, 1.0, 0.7, 0.06)
    assert trainer.note_claims(2.0, 0.1, 2.0, 0.6, 0.06)  # the truth rises; the surrogate knows nothing any more
    assert not trainer.note_claims(2.0, 0.1, 2.0, 0.6, 0.04)
    for silent in ((math.nan, math.inf, math.nan), (9.0, math.inf, 9.0), (1.0, 0.1, math.nan)):
        assert not trainer.note_claims(*silent, math.nan, math.inf) and trainer.counts["alarms_in_a_row"] == 0
    assert trainer.counts["best_true"] == 2.0


def test_a_run_that_is_led_astray_is_stopped_by_its_alarm(tmp_path):
    "Losers are shown as winners: the generator is led away from the reward by a surrogate that orders fresh samples worse than a coin"

    class SwapLabels(Callback):
        def before_train(self, trainer):
            add = trainer.replay.add
            trainer.replay.add = lambda pairs: add(RankedPairs(pairs.prompts, pairs.latents.flip(0), pairs.rewards))

    def run(name, *callbacks):
        config = LaSROConfig(
            **{
                **small,
                "pairs_per_epoch": 6,
                "candidates": 6,
                "pretrain_prompts": 12,
                "pretrain_steps": 30,
                "alarm_patience": 2,
                "epochs": 3,
                "output_dir": str(tmp_path / name),
            }
        )
        return LaSROTrainer(
            load_policy("tiny", device="cpu"), "shapes_aesthetic", "shapes", config, list(callbacks)
        ).train()

    honest, astray = run("honest"), run("astray", SwapLabels())
    assert (honest["epoch"], honest["alarm"]) == (3, 0) and (astray["epoch"], astray["alarm"]) == (2, 1)
    assert astray["surrogate/accuracy/step_2"] < 0.4 < 0.6 < honest["surrogate/accuracy/step_2"]


# --- settings and the command line ---------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_steps": 3}, "num_steps is 3; give 1 or 2, or use another recipe"),
        ({"candidates": 1}, "candidates is 1; give a whole number from 2 to 64"),
        ({"generator_steps": 0}, "generator_steps is 0; give a whole number from 1"),
        ({"surrogate_steps": 1.5}, "surrogate_steps is 1.5; give a whole number from 0"),
        ({"anchor_weight": -1.0}, "anchor_weight is -1.0; give a number from 0"),
        ({"anchor_weight": math.nan}, "anchor_weight is nan"),
        ({"surrogate_learning_rate": 0.0}, "surrogate_learning_rate is 0.0; give a number above 0"),
        ({"through_noise": "yes"}, "through_noise is 'yes'; give True or False"),
        ({"surrogate_learns": "al"}, "surrogate_learns is 'al', which is none of encoder, head"),
        ({"replay_size": True}, "replay_size is True; give a whole number"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"kl_coefficient": 0.1}, "kl_coefficient is 0.1; give 0, and set anchor_weight instead"),
        ({"pretrain_prompts": 0}, "pretrain_prompts is 0; give a whole number from 1"),
    ],
)
def test_impossible_settings_are_one_sentence(fields, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")) as error:
        resolve(LaSROConfig(**fields))
    assert "\n" not in str(error.value) and str(error.value).endswith(".") or "did you mean" in str(error.value)


def test_recipe_and_settings_belong_together():
    with pytest.raises(ValueError, match="recipe is 'lasro', which goes with LaSROConfig, not TrainConfig"):
        resolve(TrainConfig(recipe="lasro"))
    with pytest.raises(ValueError, match="recipe is 'ddpo', which goes with TrainConfig"):
        resolve(LaSROConfig(recipe="ddpo"))
    assert resolve(LaSROConfig()).num_steps == 2 and resolve(LaSROConfig(num_steps=1)).sampling == "independent_pair"


def test_the_command_line_trains_and_goes_on(tmp_path, capsys):
    folder, options = (
        tmp_path / "run",
        [word for name, value in {**small, "eval_samples": 4}.items() for word in (f"--{name}", str(value))],
    )
    words = ["tiny", "--recipe", "lasro", "--reward", "jpeg_compressibility", "--output_dir", str(folder), *options]
    assert train_command([*words, "--dry_run"]) == 0 and not folder.exists()
    assert "reward queries of the pre-training" in (plan := capsys.readouterr().out) and "all of it learns" in plan
    assert train_command(words) == 0
    assert all(
        (folder / name).exists()
        for name in ("config.json", "metrics.jsonl", "evaluation.json", "report.html", "README.md", "lora")
    )
    assert train_command(["--resume", str(folder), "--epochs", "3"]) == 0
    assert [line["epoch"] for line in read_jsonl(folder / "metrics.jsonl")] == [1, 2, 3]
    assert train_command(["tiny", "--recipe", "lasro", "--num_steps", "4", "--output_dir", str(tmp_path / "no")]) == 2
    assert "num_steps is 4; give 1 or 2" in capsys.readouterr().err


def test_what_only_log_probabilities_need(policy, tmp_path):
    "Deterministic steps, and more pairs behind an update than a round labels, are fine: nothing is compared with what was likely before"
    trainer = make(policy, tmp_path / "run", eta=0.0, pairs_per_update=32, epochs=1)
    assert trainer.train()["optimizer_steps"] == trainer.config.generator_steps
    with pytest.raises(ValueError, match="sampling is 'single'; give 'independent_pair'"):
        resolve(LaSROConfig(sampling="single"))
