"""LaSRO: gradients through few steps, the alternation, exact resume, the alarm that may stop a run."""

import json
import math

import pytest
import torch

from sdpo_nb.config import TrainConfig, resolve
from sdpo_nb.files import read_jsonl
from sdpo_nb.lasro import LaSROConfig, LaSROTrainer, few_step_outputs
from sdpo_nb.mdp import sample_trajectories
from sdpo_nb.models import load_policy
from sdpo_nb.plan import batch_plan
from sdpo_nb.rewards import jpeg_compressibility
from sdpo_nb.run import Callback, _most_skipped, newest_checkpoint
from sdpo_nb.surrogate import RankedPairs

PROMPTS = ["a cat", "two dogs"]
SMALL = dict(epochs=2, pairs_per_epoch=2, candidates=3, generator_batch=3, generator_steps=2, eval_samples=0, seed=1)
SMALL |= dict(surrogate_steps=2, pretrain_prompts=3, pretrain_steps=2)


@pytest.fixture
def policy():
    return load_policy("tiny", device="cpu")


def black_box(images, prompts):
    "A reward that notes how many pictures it has seen, and is not asked for a gradient"
    assert not images.requires_grad and not torch.is_grad_enabled()
    black_box.seen += len(images)
    return jpeg_compressibility(images, prompts)


def make(policy, folder, reward="jpeg_compressibility", callbacks=(), **fields):
    settings = {**SMALL, "policy": policy.name, "output_dir": str(folder), **fields}
    return LaSROTrainer(policy, reward, PROMPTS, LaSROConfig(**settings), list(callbacks))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A trainer after two rounds, and the metrics of the second; only to be looked at"
    black_box.seen = 0
    trainer = make(load_policy("tiny", device="cpu"), tmp_path_factory.mktemp("lasro") / "run", black_box)
    return trainer, trainer.train()


def spoil(policy, size=1.0):
    "A LoRA that changes everything"
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            if "lora_B" in name:
                parameter.normal_(0, size, generator=torch.Generator().manual_seed(0))


def numbers(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("seconds")}


# --- gradients through few steps


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind, num_steps", [("tiny", 1), ("sdxl_turbo", 2), ("lcm", 1), ("lcm", 2)])
@torch.no_grad()
def test_outputs_are_those_of_the_sampler(random_folder, kind, num_steps):
    policy = load_policy("tiny" if kind == "tiny" else random_folder(kind), device="cpu")
    sampler, embedding, shape = policy.sampler(num_steps), policy.embed(PROMPTS), policy.latent_shape
    initial, noises = draw(2, *shape), draw(2, num_steps, *shape, seed=1)
    predict = lambda x, t: policy.predict(x, t, embedding)
    outputs, reference = few_step_outputs(predict, sampler, initial, noises, reference=predict)
    expected = sample_trajectories(predict, sampler, initial, noises).pred_x0
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    torch.testing.assert_close(reference, outputs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["tiny", "lcm"])
def test_where_the_gradient_goes(random_folder, kind):
    sampler = load_policy("tiny" if kind == "tiny" else random_folder(kind), device="cpu").sampler(2)
    initial, noises, first = draw(2, 4, 2, 2), draw(2, 2, 4, 2, 2, seed=1), sampler.timesteps[0].item()

    def second_output(a, b, through):
        predict = lambda x, t: (a if t == first else b) * x
        return few_step_outputs(predict, sampler, initial, noises, through_noise=through)[0][:, 1].sum()

    for through in (True, False):
        a, b = torch.tensor(0.3, requires_grad=True), torch.tensor(0.2, requires_grad=True)
        from_a, from_b = torch.autograd.grad(second_output(a, b, through), (a, b), allow_unused=True)
        with torch.no_grad():
            slope = (second_output(a + 1e-2, b, True) - second_output(a - 1e-2, b, True)) / 2e-2
        assert abs(slope) > 1e-2 and from_b.abs() > 1e-3
        assert from_a.item() == pytest.approx(slope.item() if through else 0, rel=1e-2)


# --- the alternation


def test_counts_are_those_of_the_plan(finished):
    trainer, metrics = finished
    plan, lines = batch_plan(trainer.config), read_jsonl(trainer.folder / "metrics.jsonl")
    assert plan["reward queries per epoch"] == 2 * 3 * 2 and plan["reward queries of the pre-training"] == 3 * 3 * 2
    assert metrics["reward_queries"] == black_box.seen == 18 + 2 * 12
    assert metrics["samples"] == 3 * 3 + 2 * (2 * 3 + 2 * 3) and metrics["surrogate_steps"] == 2 + 2 * 2
    assert metrics["optimizer_steps"] == 2 * plan["optimizer steps per epoch"] == 4
    assert (len(trainer.replay), trainer.replay.pairs.latents.shape[2]) == (3 + 2 * 2, 2)
    assert lines[-1] == json.loads(json.dumps(metrics)) and (trainer.folder / "lora").is_dir()
    columns = "gain/true/step_1 gain/claimed/step_2 surrogate/accuracy/step_2 alarm reference_penalty reward/mean"
    assert {*columns.split()} <= lines[0].keys()


@pytest.mark.parametrize("fields", [{}, {"surrogate_learns": "head", "num_steps": 1}], ids=["all learns", "head, T=1"])
def test_a_resumed_run_is_the_same_run_bit_by_bit(tmp_path, fields):
    def run(folder, **more):
        trainer = make(load_policy("tiny", device="cpu"), tmp_path / folder, **fields, **more)
        trainer.train()
        return trainer

    straight, _ = run("straight"), run("broken", epochs=1)
    resumed = run("broken", resume=str(tmp_path / "broken"))
    states = [(trainer.policy.lora_state(), trainer.surrogate.state_dict()) for trainer in (straight, resumed)]
    for one, two in zip(*states):
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    first, second = (read_jsonl(tmp_path / folder / "metrics.jsonl") for folder in ("straight", "broken"))
    assert list(map(numbers, first)) == list(map(numbers, second)) and straight.counts == resumed.counts
    assert torch.equal(straight.replay.pairs.latents, resumed.replay.pairs.latents)
    assert torch.equal(straight.scale.largest, resumed.scale.largest)
    kept = newest_checkpoint(tmp_path / "broken")["extra"]["surrogate"]
    assert {"score.weight", "features.1.weight"} <= kept.keys()
    assert any(name.startswith("encoder.") for name in kept) == (not fields)


def test_the_generator_starts_at_its_reference_and_is_pulled_back_to_it(policy, tmp_path):
    trainer = make(policy, tmp_path / "run", reference_penalty=1e3, learning_rate=1e-2)
    trainer.pretrain()
    noise = trainer.noise(torch.arange(2), "test")
    assert trainer.generator_loss(PROMPTS, *noise)[2]["reference_penalty"] == 0
    spoil(policy, 0.3)
    away = trainer.generator_loss(PROMPTS, *noise)[2]["reference_penalty"]
    for number in range(8):
        trainer.generator_step(number)
    assert 0 < trainer.generator_loss(PROMPTS, *noise)[2]["reference_penalty"] < away


def test_a_frozen_surrogate_stays_as_it_is_while_the_generator_moves(policy, tmp_path):
    trainer = make(policy, tmp_path / "run", surrogate_steps=0, pretrain_steps=1)
    trainer.train_epoch()
    before, lora = {name: value.clone() for name, value in trainer.surrogate.state_dict().items()}, policy.lora_state()
    metrics = trainer.train_epoch()
    assert all(torch.equal(value, before[name]) for name, value in trainer.surrogate.state_dict().items())
    assert any(not torch.equal(value, lora[name]) for name, value in policy.lora_state().items())
    assert metrics["surrogate/loss"] is None
    assert all(parameter.grad is None for parameter in trainer.surrogate.parameters())


def test_micro_batches_add_up_to_the_whole_batch(tmp_path):
    def gradient(micro_batch):
        sizes = dict(generator_batch=4, pairs_per_epoch=4, micro_batch=micro_batch, pretrain_steps=0)
        trainer, found = make(load_policy("tiny", device="cpu"), tmp_path / "run", **sizes), []
        trainer.pretrain()
        scores = trainer.surrogate_scores(trainer.before["outputs"], trainer.before["prompts"])
        trainer.scale.update(scores, recentre=True)
        note = lambda: found.append(torch.cat([parameter.grad.flatten() for parameter in trainer.parameters]))
        trainer.optimizer_step = lambda: note() or 0.0
        trainer.follow()
        return found[0]

    whole, parts = gradient(4), gradient(1)
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-5 * whole.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("kind, num_steps", [("sd_turbo", 2), ("sdxl_turbo", 2), ("lcm", 1), ("lcm", 2)])
def test_every_family_of_models_is_trained(random_folder, tmp_path, kind, num_steps):
    policy = load_policy(random_folder(kind), device="cpu")
    sizes = dict(num_steps=num_steps, epochs=1, candidates=2, generator_steps=1)
    metrics = make(policy, tmp_path / "run", **sizes).train()
    assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0 and f"reward/step_{num_steps}" in metrics


@pytest.mark.parametrize("num_steps, step_weight", [(1, 1.0), (2, 1.0), (2, 0.5)])
def test_reward_and_penalty_are_means_over_the_outputs(policy, tmp_path, num_steps, step_weight):
    "So that the penalty weighs the same at one step and at two, and step_weight only shifts weight between outputs"
    trainer = make(policy, tmp_path / "run", num_steps=num_steps, step_weight=step_weight, pretrain_steps=0)
    spoil(policy)
    trainer.scale.mean, trainer.scale.largest = torch.zeros(num_steps), torch.ones(num_steps)
    trainer.surrogate.forward = lambda latents, embedding: torch.full((len(latents),), 0.25)
    loss, _, parts = trainer.generator_loss(PROMPTS, *trainer.noise(torch.arange(2), "test"))
    assert loss.item() == pytest.approx(1.5 * parts["reference_penalty"] - 0.25, abs=1e-6)
    assert trainer.weights.sum().item() == pytest.approx(1.0)


def test_a_score_that_overflows_costs_one_update_and_not_the_run(policy, tmp_path):
    trainer = make(policy, tmp_path / "run", generator_steps=3, epochs=1)
    score, calls = trainer.surrogate.forward, []

    def overflow_once(latents, embedding):
        scores = score(latents, embedding)
        calls.append(scores.requires_grad and not trainer.surrogate.score.weight.requires_grad)  # a generator step
        return scores * math.inf if calls[-1] and sum(calls) == 1 else scores

    trainer.surrogate.forward = overflow_once
    metrics = trainer.train()
    assert metrics["skipped_updates"] == 1 and metrics["optimizer_steps"] == 2
    assert trainer.scale.mean.isfinite().all() and trainer.scale.largest.isfinite().all()


def test_dropped_steps_of_the_surrogate_are_counted_and_end_in_one_sentence(policy, tmp_path):
    trainer = make(policy, tmp_path / "run", pretrain_steps=0)
    trainer.pretrain()
    trainer.replay.pairs.latents[0, 0] = math.inf
    pairs, before, counts = trainer.replay.pairs, trainer.surrogate.score.weight.clone(), trainer.counts
    for number in range(1, _most_skipped):
        trainer.surrogate_step(pairs)
        assert (counts["surrogate_steps"], counts["surrogate_skipped"]) == (0, number)
    sentence = f"gradient of the surrogate was infinite or NaN {_most_skipped} times in a row"
    with pytest.raises(RuntimeError, match=sentence):
        trainer.surrogate_step(pairs)
    assert torch.equal(before, trainer.surrogate.score.weight)
    counts["surrogate_skipped_in_a_row"] = 3
    pairs.latents[0, 0] = 0.0
    trainer.surrogate_step(pairs)
    assert counts["surrogate_steps"] == 1 and counts["surrogate_skipped_in_a_row"] == 0


def test_several_processes_are_refused(policy, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    monkeypatch.setattr("sdpo_nb.run.check_processes", lambda *given: None)
    monkeypatch.setattr(policy.pipeline, "to", lambda device: policy.pipeline)
    with pytest.raises(ValueError, match="LaSRO runs on one process, not on 2; start it without accelerate launch"):
        make(policy, tmp_path / "run")


@pytest.mark.slow
def test_gradient_checkpointing_changes_memory_and_not_the_run(tmp_path):
    kept, again = (
        make(load_policy("tiny", device="cpu"), tmp_path / str(on), epochs=1, gradient_checkpointing=on).train()
        for on in (False, True)
    )
    assert kept["loss"] == pytest.approx(again["loss"], abs=1e-4)
    assert kept["grad_norm"] == pytest.approx(again["grad_norm"], rel=1e-2)


@pytest.mark.slow
def test_guidance_and_half_precision(random_folder, tmp_path):
    guided = load_policy(random_folder("sd_turbo"), device="cpu")
    assert make(guided, tmp_path / "guided", epochs=1, guidance_scale=2.0).train()["grad_norm"] > 0
    half = load_policy("tiny", device="cpu", precision="bf16")
    assert make(half, tmp_path / "half", epochs=1, precision="bf16").train()["grad_norm"] > 0


# --- the alarm


def test_a_round_of_prompts_without_a_past_trains_and_rings_for_no_fall(policy, tmp_path):
    trainer = make(policy, tmp_path / "run", pretrain_prompts=1, epochs=1)

    def draw_groups():
        return torch.arange(2), [next(prompt for prompt in PROMPTS if prompt not in trainer.before["prompts"])] * 2

    trainer.draw_groups = draw_groups
    metrics = trainer.train()
    assert metrics["gain/true/step_2"] is metrics["gain/error/step_2"] is None and metrics["optimizer_steps"] == 2
    assert trainer.counts["best_true"] == 0


def test_every_prompt_gets_a_past_before_any_comes_twice(finished):
    trainer, _ = finished
    drawn = trainer.before["prompts"][:3]
    assert {*drawn[:2]} == {*PROMPTS} and trainer.before["prompts"] == drawn * 3
    assert trainer.before["outputs"].shape[:2] == (9, 2) and trainer.before["rewards"].shape == (9, 2)
    assert trainer.before["outputs"].untyped_storage().nbytes() == trainer.before["outputs"].nbytes


def test_alarms_in_a_row_end_a_run_that_asks_for_it(finished):
    trainer, _ = finished
    for patience, alarms, ends in ((2, 1, False), (2, 2, True), (0, 9, False)):
        config, counts = LaSROConfig(alarm_patience=patience), {**trainer.counts, "alarms_in_a_row": alarms, "epoch": 1}
        changed = object.__new__(LaSROTrainer)
        changed.__dict__ |= dict(config=config, counts=counts)
        assert changed.finished() == ends


class SwapLabels(Callback):
    "Losers are shown as winners"

    def before_train(self, trainer):
        add = trainer.replay.add
        trainer.replay.add = lambda pairs: add(RankedPairs(pairs.prompts, pairs.latents.flip(0), pairs.rewards))


@pytest.mark.slow
def test_a_run_that_is_led_astray_is_stopped_by_its_alarm(tmp_path):
    "The generator is led away from the reward by a surrogate that orders fresh samples worse than a coin"
    sizes = dict(pairs_per_epoch=6, candidates=6, pretrain_prompts=12, pretrain_steps=30, alarm_patience=2, epochs=3)

    def run(name, *callbacks):
        config = LaSROConfig(**{**SMALL, **sizes, "output_dir": str(tmp_path / name)})
        policy = load_policy("tiny", device="cpu")
        return LaSROTrainer(policy, "shapes_aesthetic", "shapes", config, list(callbacks)).train()

    honest, astray = run("honest"), run("astray", SwapLabels())
    assert (honest["epoch"], honest["alarm"]) == (3, 0) and (astray["epoch"], astray["alarm"]) == (2, 1)
    assert astray["surrogate/accuracy/step_2"] < 0.4 < 0.6 < honest["surrogate/accuracy/step_2"]


# --- settings and the command line


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_steps": 3}, "num_steps is 3; give 1 or 2, or use another recipe"),
        ({"candidates": 1}, "candidates is 1; give a whole number from 2 to 64"),
        ({"surrogate_steps": 1.5}, "surrogate_steps is 1.5; give a whole number from 0"),
        ({"reference_penalty": math.nan}, "reference_penalty is nan; give a number from 0"),
        ({"through_noise": "yes"}, "through_noise is 'yes'; give True or False"),
        ({"surrogate_learns": "al"}, "surrogate_learns is 'al', which is none of encoder, head"),
        ({"lora_rank": 0}, "lora_rank is 0; give at least 1: the reference is the policy with its LoRA switched off."),
        (
            {"kl_coefficient": 0.1},
            "kl_coefficient is a setting of the recipes .*, which the recipe 'lasro' does not use",
        ),
        ({"sampling": "single"}, "sampling is a setting of the recipes"),
    ],
)
def test_impossible_settings_are_one_sentence(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        resolve(LaSROConfig(**fields))
    assert "\n" not in str(error.value)


def test_recipe_and_settings_belong_together():
    with pytest.raises(ValueError, match="recipe is 'lasro', which goes with LaSROConfig, not TrainConfig"):
        resolve(TrainConfig(recipe="lasro"))
    with pytest.raises(ValueError, match="recipe is 'ddpo', which goes with TrainConfig"):
        resolve(LaSROConfig(recipe="ddpo"))


def test_sizes_that_were_left_open():
    "Pairs behind a step of the surrogate need not divide those of a round: they are drawn from the memory"
    for given, expected in (({}, (8, 8)), ({"pairs_per_epoch": 24}, (12, 12)), ({"surrogate_batch": 20}, (20, 10))):
        config = resolve(LaSROConfig(**given))
        assert (config.surrogate_batch, config.micro_batch) == expected


def test_steps_need_no_density(policy, tmp_path):
    "Nothing is compared with what was likely before, so a deterministic sampler is fine"
    trainer = make(policy, tmp_path / "run", eta=0.0, surrogate_batch=32, epochs=1)
    assert trainer.train()["optimizer_steps"] == trainer.config.generator_steps


@pytest.mark.slow
def test_the_command_line_trains_and_goes_on(tmp_path, capsys):
    from sdpo_nb.cli import train_command

    settings = {**SMALL, "eval_samples": 4, "output_dir": tmp_path / "run", "reward": "jpeg_compressibility"}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    words, folder = ["tiny", "--recipe", "lasro", *flags], tmp_path / "run"
    assert train_command([*words, "--dry_run"]) == 0 and not folder.exists()
    assert "reward queries of the pre-training" in (plan := capsys.readouterr().out) and "all of it learns" in plan
    assert train_command(words) == 0
    files = ("config.json", "metrics.jsonl", "evaluation.json", "report.html", "README.md", "lora")
    assert all((folder / name).exists() for name in files)
    assert train_command(["--resume", str(folder), "--epochs", "3"]) == 0
    assert [line["epoch"] for line in read_jsonl(folder / "metrics.jsonl")] == [1, 2, 3]


def test_the_command_line_refuses(tmp_path, capsys):
    from sdpo_nb.cli import train_command

    assert train_command(["tiny", "--recipe", "lasro", "--num_steps", "4", "--output_dir", str(tmp_path / "no")]) == 2
    assert "num_steps is 4; give 1 or 2" in capsys.readouterr().err
