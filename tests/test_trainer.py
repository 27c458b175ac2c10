"""The epoch of the trainer, on a random pipeline: what is sampled, asked, credited and learnt, alone and together."""

import math
import threading
import time
from functools import partial

import pytest
import torch
from comparisons import same_learning, weights, without_clock
from diffusers import DDIMScheduler
from processes import Child, two_processes
from small_runs import PROMPTS, first_gradient, learn, perturb, redness, rolled, small_trainer

from sdpo_nb.batching import Minibatch
from sdpo_nb.callbacks import EvaluationCallback, ReportCallback
from sdpo_nb.dense import pair_diversity
from sdpo_nb.evaluate import step_generalization
from sdpo_nb.files import read_json
from sdpo_nb.mdp import ddim_step
from sdpo_nb.models import load_policy
from sdpo_nb.plan import queries_per_epoch
from sdpo_nb.recipes import recipes
from sdpo_nb.run import newest_checkpoint
from sdpo_nb.trainer import Rollout, Trainer


@pytest.fixture
def make(pipeline, tmp_path):
    "Make a trainer of a small run"
    return partial(small_trainer, pipeline, tmp_path)


# --- sampling, queries, credit

NEEDED = "epoch samples reward_queries optimizer_steps reward/mean reward/std loss log_ratio/max_before_update"
NEEDED += " clip_fraction grad_norm diversity seconds/sample seconds/reward seconds/train"


@pytest.mark.parametrize("name", [name for name, recipe in recipes.items() if recipe.settings == "TrainConfig"])
def test_every_recipe_trains(make, name):
    trainer = make(recipe=name)
    start, metrics = weights(trainer), trainer.train()
    assert any(not torch.equal(value, start[name]) for name, value in weights(trainer).items())
    assert metrics["log_ratio/max_before_update"] == 0 and metrics["log_ratio/recomputed"] == 0
    assert metrics["samples"] == 8 and metrics["reward_queries"] <= queries_per_epoch(trainer.config)
    updates = 2 * len(trainer.trained_steps) if trainer.config.order == "step_shuffled" else 2
    assert metrics["optimizer_steps"] == updates
    assert set(NEEDED.split()) <= metrics.keys() and all(math.isfinite(metrics[name]) for name in NEEDED.split())


@pytest.mark.parametrize(
    "settings",
    [
        dict(num_steps=5),
        dict(num_steps=5, queries="5"),
        dict(num_steps=4, queries="5"),
        dict(queries="all"),
        dict(queries="terminal"),
        dict(sampling="independent_pair"),
        dict(credit="reward_to_go"),
        dict(credit="causal", train_last_step=True),
        dict(credit="gae", train_last_step=True),
        dict(recipe="ddpo"),
        dict(recipe="ddpo", num_steps=1),
        dict(recipe="rebel"),
        dict(num_steps=1, credit="causal", train_last_step=True),
        dict(num_steps=1, credit="gain", train_last_step=True),
        dict(num_steps=2),
        dict(num_steps=2, credit="gain"),
        dict(num_steps=5, anchor="random"),
    ],
    ids=str,
)
def test_every_picture_is_queried_once(make, settings):
    asked = []

    def counting(images, prompts):
        asked.append(len(images))
        return redness(images, prompts)

    trainer = make(reward=counting, pairs_per_update=4, micro_batch=4, **settings)
    metrics, rollout = trainer.train_epoch(), trainer.last_rollout
    # the expected number: pairs that share their first noise share one query
    expected = queries_per_epoch(trainer.config)
    assert sum(asked) == rollout.queries == metrics["reward_queries"] == trainer.counts["reward_queries"] == expected
    assert rollout.advantages.isfinite().all() and rollout.advantages.shape == rollout.log_prob.shape
    assert (rollout.final_reward is None) == (not trainer.needs_final)
    assert math.isfinite(metrics["loss"])


def test_the_reference_asks_less_where_anchors_lie_at_the_ends(make):
    rollout = rolled(make(recipe="sdpo_reference", num_steps=5))
    assert rollout.queries <= 4 * 5
    assert rollout.indices[..., 0].eq(0).all() and rollout.indices[..., 2].eq(4).all()


def test_pairs_share_prompt_first_noise_and_first_reward(make):
    trainer = make(pairs_per_epoch=6)
    rollout = rolled(trainer)
    latents, rewards = rollout.latents, rollout.rewards
    assert torch.equal(latents[0, :, 0], latents[1, :, 0]) and not torch.equal(latents[0, :, 1], latents[1, :, 1])
    assert torch.equal(rewards[0, :, 0], rewards[1, :, 0]) and not torch.equal(rewards[0, :, -1], rewards[1, :, -1])
    assert rollout.prompts == trainer.draw_groups()[1]
    trainer.counts["epoch"] = 1
    assert rollout.prompts != trainer.draw_groups()[1]


def test_rewards_belong_to_their_pictures_and_prompts(make):
    "The layout [K,B,Q] survives flattening and deduplication: each reward is that of its own picture and prompt"

    def named(images, prompts):
        return redness(images, prompts) + torch.tensor([100.0 * PROMPTS.index(prompt) for prompt in prompts])

    trainer = make(reward=named, num_steps=5)
    rollout, close = rolled(trainer), partial(torch.testing.assert_close, rtol=1e-5, atol=1e-4)
    for k in range(2):
        for group, prompt in enumerate(rollout.prompts):
            for query, step in enumerate(rollout.indices[k, group].tolist()):
                image = trainer.policy.decode(rollout.pred_x0[k, group, step][None])
                close(rollout.rewards[k, group, query], named(image, [prompt])[0])
                torch.testing.assert_close(rollout.dense[k, group, step], rollout.rewards[k, group, query])


def test_final_samples_are_scored_where_the_recipe_says(make):
    trainer = make(recipe="ddpo")
    rollout = rolled(trainer)
    expected = redness(trainer.policy.decode(rollout.latents[0, :, -1]), rollout.prompts)
    torch.testing.assert_close(rollout.final_reward[0], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(rollout.outcome, rollout.final_reward)
    assert rollout.advantages[0].std(1).max() < 1e-5  # one reward a trajectory, undiscounted


def test_a_step_without_density_is_left_out(random_folder, make):
    policy = load_policy(random_folder(prediction_type="epsilon", set_alpha_to_one=True), device="cpu")
    trainer = make(policy=policy, num_steps=5, credit="causal", train_last_step=True)
    assert trainer.trained_steps == [0, 1, 2, 3] and not trainer.needs_final
    assert math.isfinite(trainer.train()["loss"])


def test_diversity():
    apart = torch.zeros(2, 1, 1, 2, 2)
    apart[1] = 3
    assert pair_diversity(["x"], apart) == pytest.approx(3)
    assert pair_diversity(["x", "y"], torch.zeros(1, 2, 1, 2, 2)) is None


# --- the update


def loss_of(trainer, rollout, *transitions, **more):
    "The loss of some (group, step) transitions, and what is logged about it"
    groups, steps = map(torch.tensor, zip(*transitions))
    loss = trainer.loss(rollout, Minibatch(groups, steps, **more))
    return loss, trainer.logs[-1][1]


def by_hand(trainer):
    "The public function of a single step, at the settings of this trainer"
    scheduler = DDIMScheduler.from_config(trainer.policy.pipeline.scheduler.config)
    scheduler.set_timesteps(trainer.config.num_steps)
    return scheduler.timesteps, partial(ddim_step, scheduler)


def test_loss_of_one_transition_by_hand(make):
    trainer = make(clip_range=1e-4, step_weight=0.9, num_steps=5)
    rollout, (group, step), (timesteps, ddim) = rolled(trainer), (1, 3), by_hand(trainer)
    perturb(trainer)
    ratio, timestep = [], timesteps[step].item()
    for k in range(2):
        state, action = rollout.latents[k, group, step][None], rollout.latents[k, group, step + 1][None]
        with torch.no_grad():
            output = trainer.policy.predict(state, timestep, trainer.policy.embed([rollout.prompts[group]]))
        log_prob = ddim(output, timestep, state, prev_sample=action).log_prob
        ratio.append((trainer.scales[step] * (log_prob - rollout.log_prob[k, group, step])).item())
    held = [max(-1e-4, min(1e-4, r)) for r in ratio]
    advantages = rollout.advantages[:, group, step].clamp(-5, 5).tolist()
    target, levelled = advantages[0] - advantages[1], dict(weight=torch.tensor([2.0]))
    for weight, more in ((0.9**step, {}), (2 * 0.9**step, levelled)):
        expected = max((weight * (r[0] - r[1]) - target) ** 2 for r in (ratio, held))
        loss, log = loss_of(trainer, rollout, (group, step), **more)
        assert loss.item() == log["loss"].item() == pytest.approx(expected, rel=1e-4)
    assert max(map(abs, ratio)) > 1e-3 and log["clip_fraction"] == 1


@pytest.mark.parametrize("recipe", ["sdpo", "ddpo", "d3po", "prdp"])
def test_micro_batches_do_not_change_the_gradient(make, recipe):
    trainer = make(recipe=recipe, kl_coefficient=0.1, pairs_per_epoch=2, micro_batch=2)
    rollout, sizes = rolled(trainer), []
    perturb(trainer)
    seen, real = {}, trainer.loss
    trainer.loss = lambda rollout, part: sizes.append(len(part)) or real(rollout, part)
    for trainer.micro_batch in (2 * trainer.groups_per_pair, 1):
        seen[trainer.micro_batch] = first_gradient(trainer, rollout)
    whole, pieces = seen.values()
    assert len(set(sizes)) == 2 and whole.abs().max() > 0
    torch.testing.assert_close(pieces, whole, rtol=1e-3, atol=1e-3 * whole.abs().max().item())


@pytest.mark.parametrize("recipe", ["sdpo", "ddpo"])
def test_a_sampling_batch_of_its_own(make, recipe):
    "Other batches, the same trajectories up to rounding, and a log-ratio within its bound"
    alike, own = make(recipe=recipe, micro_batch=1), make(recipe=recipe, micro_batch=1, sampling_batch=4)
    first, seen = rolled(alike), []
    handle = own.policy.denoiser.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    second = rolled(own)
    handle.remove()
    assert seen == [4 * own.groups_per_pair * own.group_size] * own.config.num_steps
    torch.testing.assert_close(second.latents, first.latents, rtol=1e-3, atol=1e-3)
    assert learn(own, second)["log_ratio/max_before_update"] <= own.log_ratio_bound()


def test_two_passes_give_the_gradient_of_the_full_graph(make):
    trainer = make(recipe="prdp", pairs_per_update=4, clip_range=1e-2)
    rollout = rolled(trainer)
    perturb(trainer)
    groups, steps = minibatch = trainer.schedule(rollout)[0]
    log_prob = torch.zeros_like(rollout.log_prob)
    log_prob[:, groups, steps] = trainer.action_log_prob(rollout, minibatch)[0]
    ratio = log_prob - rollout.log_prob
    target = (rollout.advantages[0] - rollout.advantages[1]).mean(1)
    squares = [((r[0] - r[1]).sum(1) - target).square() for r in (ratio, ratio.clamp(-1e-2, 1e-2))]
    loss = torch.maximum(*squares).mean()
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in trainer.parameters])
    trainer.optimizer.zero_grad()
    found = first_gradient(trainer, rollout)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert len(trainer.logs) > 1
    assert [log["loss"].item() for _, log in trainer.logs] == pytest.approx([loss.item()] * len(trainer.logs), rel=1e-4)


def test_an_update_lowers_its_loss(make):
    trainer = make(learning_rate=1e-5, clip_range=0, pairs_per_update=4, micro_batch=4)
    rollout = rolled(trainer)
    minibatch = trainer.schedule(rollout)[0]
    before = trainer.loss(rollout, minibatch)
    trainer.accelerator.backward(before)
    trainer.optimizer_step()
    assert trainer.loss(rollout, minibatch) < before


def test_the_log_ratio_is_exactly_zero_before_anything_is_learnt(make):
    trainer = make(micro_batch=1, clip_range=1e-4)
    rollout = rolled(trainer)
    assert torch.equal(trainer.all_log_probs(rollout)[..., :2], rollout.log_prob[..., :2])
    trainer.micro_batch = 2  # other kernels: at most a hundredth of the clip
    assert (trainer.all_log_probs(rollout) - rollout.log_prob)[..., :2].abs().max() <= 1e-6


@pytest.mark.parametrize("recipe", ["sdpo", "ddpo", "prdp"])
def test_noise_of_the_log_ratio_is_noted_and_repaired(make, recipe):
    trainer = make(recipe=recipe, clip_range=1e-2)
    rollout = rolled(trainer)
    exact = rollout.log_prob.clone()
    rollout.log_prob = exact + 1e-5  # below a hundredth of the clip: it stays
    log = learn(trainer, rollout)
    largest = 1e-5 * trainer.scales[trainer.trained_steps].max().item()
    assert log["log_ratio/max_before_update"] <= 1.1 * largest and log["log_ratio/recomputed"] == 0
    again = make(recipe=recipe, clip_range=1e-2)
    rollout.log_prob = exact + 1e-2
    log = learn(again, rollout)
    assert log["log_ratio/recomputed"] == 1 and log["log_ratio/max_before_update"] == 0
    trained = again.trained_steps
    assert torch.equal(rollout.log_prob[..., trained], exact[..., trained])


@pytest.mark.parametrize("recipe", ["sdpo", "ddpo", "prdp", "d3po"])
def test_noise_that_depends_on_the_place_in_a_batch_is_repaired(make, recipe):
    "A GPU rounds a sample differently at another place, and an update shuffles the places"
    trainer = make(recipe=recipe, clip_range=1e-2, pairs_per_update=4, micro_batch=2)
    plain = trainer.policy.predict

    def predict(latents, timestep, embedding):
        places = torch.arange(len(latents))[:, None, None, None]
        return plain(latents, timestep, embedding) + 1e-2 * places

    trainer.policy.predict = predict
    rollout = rolled(trainer)
    if trainer.objective.reference:  # which takes the place of the log-probabilities that were stored
        next(iter(trainer.minibatches(rollout)))
        part = trainer.schedule(rollout)[0].split(trainer.micro_batch)[0]
        log_prob = trainer.action_log_prob(rollout, part)[0]
        return torch.testing.assert_close(
            log_prob, rollout.reference_log_prob[:, part.group, part.step], rtol=0, atol=0
        )
    log = learn(trainer, rollout)
    assert log["log_ratio/recomputed"] == 1 and log["log_ratio/max_before_update"] == 0


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("recipe", ["sdpo", "d3po", "prdp"])
def test_the_schedule_of_an_epoch_is_drawn_up_once(make, recipe, empty):
    "Also for repairs, for the reference, and where it is empty: an override may draw random numbers, or warn"
    trainer, asked = make(recipe=recipe, clip_range=1e-2), []
    plain, rollout = trainer.schedule, rolled(trainer)
    rollout.log_prob = rollout.log_prob + 1e-2  # above the bound
    trainer.schedule = lambda rollout: asked.append(1) or ([] if empty else plain(rollout))
    learn(trainer, rollout)
    assert asked == [1]


@pytest.mark.parametrize("settings", [{}, dict(lora_rank=0, learning_rate=1e-3)], ids=["lora", "whole"])
def test_reference_log_probs_stay_those_of_the_first_policy(make, settings):
    trainer = make(recipe="d3po", epochs=2, **settings)
    trainer.train()
    rollout = trainer.last_rollout
    with trainer.policy.without_lora():
        assert torch.equal(rollout.reference_log_prob, trainer.all_log_probs(rollout))
    assert not torch.equal(rollout.reference_log_prob, rollout.log_prob)


def test_divergence_by_hand(make):
    "Zero at the start; then half the squared distance of the two means, in units of τ"
    trainer = make(kl_coefficient=1.0, num_steps=5)
    rollout, transitions, (timesteps, ddim) = rolled(trainer), ((0, 1), (1, 2)), by_hand(trainer)
    assert loss_of(trainer, rollout, *transitions)[1]["kl"] == 0
    perturb(trainer)
    loss, log = loss_of(trainer, rollout, *transitions)
    groups, steps = map(torch.tensor, zip(*transitions))
    _, output = trainer.action_log_prob(rollout, (groups, steps))
    with trainer.policy.without_lora():
        _, reference = trainer.action_log_prob(rollout, (groups, steps))
    state, timestep = rollout.latents[:, groups, steps].flatten(0, 1), timesteps[steps].repeat(2)
    mean, other, one = (
        ddim(x, timestep, state, noise=torch.full_like(state, size)).prev_sample
        for x, size in ((output, 0), (reference, 0), (output, 1))
    )
    expected = ((mean - other) / (one - mean)).square().mean() / 2
    assert log["kl"].item() == pytest.approx(expected.item(), rel=1e-2) and log["kl"] > 0
    assert loss.item() == pytest.approx((log["loss"] + log["kl"]).item(), rel=1e-5)
    assert all(parameter.requires_grad for parameter in trainer.parameters)


def test_last_step_is_left_out_and_scales_average_one(make):
    trainer = make(num_steps=5)
    assert trainer.trained_steps == [0, 1, 2, 3]
    assert trainer.scales[trainer.trained_steps].mean().item() == pytest.approx(1)
    steps = torch.cat([minibatch.step for minibatch in trainer.schedule(rolled(trainer))])
    assert steps.bincount().tolist() == [4, 4, 4, 4]
    assert make(recipe="sdpo_reference").scales.tolist() == [1] * 3


# --- the reward in a thread


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(queries="all", sampling="independent_pair"),
        dict(queries="terminal", credit="causal", train_last_step=True),
        dict(recipe="ddpo"),
    ],
    ids=str,
)
def test_the_reward_may_work_while_sampling_goes_on(make, settings):
    "The same scores as one after the other, up to the rounding of decoding in other batches, for the same pictures"
    plain, meanwhile = (rolled(make(micro_batch=1, reward_worker=worker, **settings)) for worker in (False, True))
    assert (meanwhile.prompts, meanwhile.queries, meanwhile.pending) == (plain.prompts, plain.queries, None)
    assert torch.equal(meanwhile.embedding.prompt_embeds, plain.embedding.prompt_embeds)
    for name in ("latents", "pred_x0", "log_prob", "indices", "states", "actions"):
        assert torch.equal(getattr(meanwhile, name), getattr(plain, name)), name
    for name in ("rewards", "final_reward", "dense", "advantages"):
        one, other = getattr(plain, name), getattr(meanwhile, name)
        assert other is None if one is None else torch.allclose(other, one, rtol=1e-3, atol=1e-4), name


def empty_parts(trainer, before=lambda number: None):
    "What sampling yields, without the network: batches of the right sizes; `before(number)` is called at each of them"
    groups, T = torch.arange(trainer.groups_per_epoch), trainer.config.num_steps
    embedding = trainer.policy.embed(["a cat"] * len(groups))
    for number, chunk in enumerate(groups.split(trainer.micro_batch)):
        before(number)
        trajectories = torch.zeros(trainer.group_size, len(chunk), T + 1, *trainer.policy.latent_shape)
        log_prob = torch.zeros(*trajectories.shape[:2], T)
        yield Rollout(["a cat"] * len(chunk), embedding[chunk], trajectories, trajectories[:, :, :-1], log_prob)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_random_anchors_do_not_depend_on_batches(make, micro_batch):
    settings = dict(anchor="random", num_steps=20, pairs_per_epoch=8)
    plain, meanwhile = make(**settings), make(**settings, micro_batch=micro_batch, reward_worker=True)
    expected = plain.scored(Rollout.cat(list(empty_parts(plain)))).indices
    rollout = meanwhile.submit(empty_parts(meanwhile))
    meanwhile.score(rollout)
    assert torch.equal(rollout.indices, expected) and expected[..., 1].unique().numel() > 4


def test_sampling_does_go_on(make):
    "A reward that answers for the first batch only when the second is being sampled"
    begun, threads = threading.Event(), []

    def patient(images, prompts):
        threads.append(threading.current_thread())
        assert begun.wait(60)
        return redness(images, prompts)

    trainer = make(reward=patient, micro_batch=2, reward_worker=True)
    trainer.sample_parts = lambda: empty_parts(trainer, lambda number: begun.set() if number else None)
    trainer.score(trainer.sample())
    assert len(threads) == 2 and len({*threads, threading.main_thread()}) == 2


@pytest.mark.parametrize(
    "settings, groups",
    [
        (dict(micro_batch=1), [2, 2]),
        (dict(micro_batch=1, pairs_per_epoch=6, pairs_per_update=6), [3, 3]),
        (dict(micro_batch=1, pairs_per_epoch=40), [12, 12, 12, 4]),  # five pictures a pair
        (dict(micro_batch=2, pairs_per_epoch=40), [12, 12, 12, 4]),
        (dict(micro_batch=2, pairs_per_epoch=8, queries="all", num_steps=50), [2] * 4),
        (dict(micro_batch=1, recipe="ddpo"), [4, 4]),
    ],
    ids=str,
)
def test_calls_do_not_become_small(make, settings, groups):
    "Batches are put together up to 64 pictures, as long as two groups are left"
    trainer = make(reward_worker=True, **{"num_steps": 5, **settings})
    trainer.scored_in_thread = lambda part, places: (len(part.prompts), places.tolist())
    answers = [job.get() for job in trainer.submit(empty_parts(trainer)).pending]
    trainer.pool.terminate()
    assert [number for number, _ in answers] == groups
    assert sum([places for _, places in answers], []) == list(range(trainer.groups_per_epoch))


def test_a_reward_that_fails_in_the_thread_ends_the_epoch(make, tmp_path):
    calls, sampled, asked = [], [], threading.Event()

    def failing(images, prompts):
        calls.append(len(images))
        asked.set()
        raise RuntimeError("out of ideas")

    def before(number):
        sampled.append(number)
        if number == 12:
            assert asked.wait(60)
            time.sleep(0.2)

    trainer = make(reward=failing, micro_batch=1, pairs_per_epoch=40, num_steps=5, reward_worker=True)
    trainer.sample_parts = lambda: empty_parts(trainer, before)
    with pytest.raises(ValueError, match="reward 'failing' failed: RuntimeError: out of ideas"):
        trainer.train()
    assert newest_checkpoint(tmp_path / "run")["counts"]["epoch"] == 0
    assert len(calls) == 1 and len(sampled) <= 24  # of 40: those that were asked for, and the twelve after them


@pytest.mark.parametrize("error", [MemoryError("no room"), SystemExit("no room")], ids=["error", "exit"])
def test_an_accident_of_the_thread_itself_is_not_overlooked(make, error):
    "Out of memory while batches are put together, say: an epoch with trajectories missing must not go on"

    def fail(part, groups):
        raise error

    trainer, caught = make(micro_batch=1, reward_worker=True), []
    trainer.sample_parts, trainer.scored = lambda: empty_parts(trainer), fail

    def epoch():
        try:
            trainer.score(trainer.sample())
        except BaseException as problem:
            caught.append(problem)

    attempt = threading.Thread(target=epoch, daemon=True)  # so that a wait without end is a failure, not a wait
    attempt.start()
    attempt.join(10)
    assert not attempt.is_alive() and [(type(problem), str(problem)) for problem in caught] == [
        (type(error), "no room")
    ]


def test_an_interrupted_epoch_asks_for_no_more_scores(make):
    "Ctrl-C while sampling: the reward finishes the call it is at, and the batches that wait for it are forgotten"
    calls, asked, released = [], threading.Event(), threading.Event()

    def slow(images, prompts):
        calls.append(len(images))
        asked.set()
        assert released.wait(60)
        return redness(images, prompts)

    def before(number):
        if number == 25:  # two groups of twelve have been handed over
            assert asked.wait(60)
            raise KeyboardInterrupt

    trainer = make(reward=slow, micro_batch=1, pairs_per_epoch=40, num_steps=5, reward_worker=True)
    trainer.sample_parts = lambda: empty_parts(trainer, before)
    with pytest.raises(KeyboardInterrupt):
        trainer.sample()
    released.set()
    time.sleep(0.5)
    assert len(calls) == 1


def interrupted(pipeline, folder):
    "A reward that hangs, and SIGTERM"
    import os
    import signal

    def hanging(images, prompts):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(10000)

    try:
        small_trainer(pipeline, folder, reward=hanging, micro_batch=1, reward_worker=True).train()
    except KeyboardInterrupt as stop:
        return str(stop)


def test_a_hanging_reward_does_not_keep_an_interrupted_run_alive(pipeline, tmp_path):
    child = Child(interrupted, str(pipeline), str(tmp_path), folder=tmp_path)
    assert child.wait(60) == 0, child.said
    assert child.result == "terminated" and newest_checkpoint(tmp_path / "run")["counts"]["epoch"] == 0


def test_a_thread_without_anything_to_do_is_refused(make):
    with pytest.raises(ValueError, match="reward_worker is true, but a process samples its 4 pairs in one batch"):
        make(pairs_per_update=4, micro_batch=4, reward_worker=True)


# --- several processes

TOGETHER = dict(num_steps=2, pairs_per_epoch=4, pairs_per_update=4, micro_batch=1, epochs=2, normalizer="step")
FOLLOWED = dict(pairs_per_epoch=8, pairs_per_update=8, order="step_accumulated", buffer_size=6)


def look(trainer):
    "Three epochs without an update, and the gradient of one: the memory of the normaliser has begun to forget"
    for epoch in range(3):
        rollout = rolled(trainer, epoch)
    gradient = first_gradient(trainer, rollout)
    return dict(latents=rollout.latents, advantages=rollout.advantages, gradient=gradient)


def train_and_look(pipeline, folder):
    "What two processes do together"
    trainer = small_trainer(pipeline, folder, **TOGETHER)
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    return weights(trainer), look(small_trainer(pipeline, f"{folder}/other", **FOLLOWED))


def test_two_processes_do_what_one_does(pipeline, tmp_path):
    """One update of the whole epoch: then the order does not matter, and the gradient is the mean over processes.

    And trajectories, advantages and the gradient of an update are the same to the last digits."""
    (first, one), (second, other) = two_processes(train_and_look, str(pipeline), str(tmp_path), folder=tmp_path)
    alone = small_trainer(pipeline, tmp_path / "alone", **TOGETHER)
    untrained = weights(alone)
    alone.train()
    same_learning(first, second, weights(alone), untrained)
    records, of_two = without_clock(alone.folder), without_clock(tmp_path / "run")
    for name in ("samples", "reward_queries", "optimizer_steps"):
        assert [record[name] for record in records] == [record[name] for record in of_two]
    for name in ("reward/mean", "loss"):
        assert [record[name] for record in of_two] == pytest.approx([record[name] for record in records], rel=1e-3)
    assert len(newest_checkpoint(tmp_path / "run")["random"]) == 2

    def difference(a, b):
        return ((a - b).norm() / b.norm()).item()

    expected = look(small_trainer(pipeline, tmp_path / "look", **FOLLOWED))
    for name in ("latents", "advantages"):
        assert difference(torch.cat([one[name], other[name]], 1), expected[name]) < 1e-6
    assert torch.equal(one["gradient"], other["gradient"])
    assert difference(one["gradient"], expected["gradient"]) < 1e-6


def shared(pipeline, folder, **settings):
    "A trainer whose weights the processes share; what is missing on this one is on the other"
    trainer = small_trainer(pipeline, folder, **settings)
    parameters = trainer.parameters[:9]
    processes = trainer.accelerator.num_processes
    assert processes == 2 and [p.numel() for p in parameters] == [p.to_local().numel() * 2 for p in parameters]
    return trainer


def watch_quickly():
    "Callbacks with evaluations at two numbers of steps alone"
    import sdpo_nb.callbacks

    sdpo_nb.callbacks.step_generalization = partial(step_generalization, steps=(1, 3))
    return [EvaluationCallback(), ReportCallback()]


def check_learning(pipeline, folder, settings, first, second):
    "The same learning as in one process, with evaluation, pictures and report by the first of the two alone"
    alone = small_trainer(pipeline, folder / "alone", callbacks=[EvaluationCallback()], eval_samples=2, **settings)
    untrained = weights(alone)
    alone.train()
    same_learning(first, second, weights(alone), untrained)
    run, whole = folder / "run", settings.get("lora_rank") == 0
    records, of_two = without_clock(alone.folder), without_clock(run)
    for name in ("reward/mean", "loss", "grad_norm"):
        assert [record[name] for record in of_two] == pytest.approx([record[name] for record in records], rel=1e-3)
    assert read_json(run / "evaluation.json")["before"] == read_json(alone.folder / "evaluation.json")["before"]
    made = {"README.md", "unet" if whole else "lora", "report.html", "progress"}
    assert made <= {path.name for path in run.iterdir()}
    policy = load_policy(pipeline, device="cpu")
    policy.load_whole(run / "unet") if whole else policy.load_lora(run / "lora")
    saved = policy.lora_state()
    assert saved.keys() == first.keys() and all(torch.equal(saved[name], first[name]) for name in first)


def misuse(trainer, folder):
    "What would go wrong, in one sentence each: saving a part, loading what would be lost, a second trainer"
    policy, told = trainer.policy, []

    def attempt(action):
        try:
            action()
        except (ValueError, RuntimeError) as error:
            told.append(str(error))

    attempt(lambda: policy.save_lora(f"{folder}/lora"))
    with policy.gathered():
        attempt(lambda: policy.load_lora_state(policy.lora_state()))
    attempt(lambda: Trainer(policy, redness, PROMPTS, trainer.config))
    return told


def overflow(trainer):
    "The loss scale after an update whose gradient is infinite in the part of one process alone"
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    rollout = rolled(trainer)
    loss = trainer.loss(rollout, next(trainer.minibatches(rollout)))
    trainer.accelerator.backward(trainer.scaler.scale(loss))
    if trainer.accelerator.process_index:
        trainer.parameters[0].grad.to_local().fill_(math.inf)
    before = weights(trainer)
    assert trainer.optimizer_step() == math.inf and trainer.counts["skipped_updates"] == 1
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    return trainer.scaler.get_scale()


def share(pipeline, folder, settings):
    "A run with everything that watches, and one that is resumed after its first epoch; then what goes wrong"
    whole = shared(pipeline, folder, callbacks=watch_quickly(), eval_samples=2, log_images_every=2, **settings)
    whole.train()
    parts = f"{folder}/parts"
    shared(pipeline, parts, **{**settings, "epochs": 1}).train()
    resumed = shared(pipeline, parts, resume=f"{parts}/run", **settings)
    resumed.train()
    learnt = weights(whole), weights(resumed)
    return *learnt, overflow(resumed), misuse(resumed, folder) if resumed.config.lora_rank else None


@pytest.mark.parametrize(
    "settings",
    [
        dict(kl_coefficient=0.1, gradient_checkpointing=True),
        pytest.param(dict(recipe="d3po"), marks=pytest.mark.slow),
        pytest.param(dict(lora_rank=0, kl_coefficient=0.1, learning_rate=1e-4), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_processes_that_share_the_weights(pipeline, tmp_path, monkeypatch, settings):
    "They learn what one learns, go on bit by bit, agree on what is dropped, and say what they cannot do"
    settings, here = TOGETHER | settings, (str(pipeline), str(tmp_path))
    one, other = two_processes(share, *here, settings, folder=tmp_path, sharing=True)
    (first, resumed, scale, told), (second, resumed_too, scale_too, told_too) = one, other
    monkeypatch.setattr("sdpo_nb.callbacks.step_generalization", partial(step_generalization, steps=(1, 3)))
    check_learning(pipeline, tmp_path, settings, first, second)
    assert all(torch.equal(value, found[name]) for name, value in first.items() for found in (resumed, resumed_too))
    assert without_clock(tmp_path / "run") == without_clock(tmp_path / "parts/run")
    assert scale == scale_too == 2 and told == told_too
    if told:
        saving, loading, building = told
        assert saving.startswith("save_lora ") and "with policy.gathered():" in saving
        assert loading.startswith("load_lora_state ") and "outside of `gathered` and of callbacks" in loading
        assert building.startswith("The ") and "load the policy anew" in building


def test_sharing_without_gpus_is_refused(make, monkeypatch):
    for variable, setting in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2")):
        monkeypatch.setenv(variable, setting)
    with pytest.raises(ValueError, match="accelerate splits weights among GPUs only, and there are none here"):
        make()
