"One step and whole trajectories: against the numbers of the reference, stock diffusers and autograd"

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from sdpo_nb.mdp import ddim_step, keyed_noise, log_ratio_scales, mixture_denoiser, pair_noise, sample_trajectories
from sdpo_nb.samplers import few_step_timesteps, make_sampler

FOLDER = Path(__file__).parent / "reference_vectors"
INDEX = json.loads((FOLDER / "sdpo_vectors.json").read_text())
VECTORS = np.load(FOLDER / "sdpo_vectors.npz")
CASES = [case for case in INDEX["cases"] if case.startswith("ddim/")]
SD_TURBO = INDEX["schedulers"]["sdturbo"]


def vector(name):
    return torch.from_numpy(VECTORS[name])


def scheduler_for(num_steps, **changes):
    scheduler = DDIMScheduler(**{**SD_TURBO, **changes})
    few_step_timesteps(scheduler, num_steps)
    return scheduler


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert ((actual - expected).abs() <= tolerance * expected.abs().clamp(min=1)).all()


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- the reference implementation's numbers


def test_every_kind_of_case_is_present():
    assert len(CASES) == 36


@pytest.mark.parametrize("case", CASES)
def test_reference_vectors(case):
    _, name, num_steps, eta = case.split("/")
    scheduler, num_steps, eta = DDIMScheduler(**INDEX["schedulers"][name]), int(num_steps[1:]), float(eta[3:])
    chosen = few_step_timesteps(scheduler, num_steps)
    timesteps, sample, output = (vector(f"{case}/{key}") for key in ("timesteps", "sample", "model_output"))
    assert set(timesteps.tolist()) <= set(chosen.tolist())
    scored = ddim_step(
        scheduler,
        output,
        timesteps,
        sample,
        eta=eta,
        prev_sample=vector(f"{case}/prev_sample"),
        prev_timestep="reference",
    )
    assert torch.equal(scored.prev_sample, vector(f"{case}/prev_sample"))
    close(scored.pred_x0, vector(f"{case}/pred_x0"), 1e-5)
    close(scored.log_prob, vector(f"{case}/log_prob"), 1e-4)
    drawn = ddim_step(
        scheduler, output, timesteps, sample, eta=eta, noise=vector(f"{case}/noise"), prev_timestep="reference"
    )
    close(drawn.prev_sample, vector(f"{case}/drawn_prev_sample"), 1e-5)
    close(drawn.log_prob, vector(f"{case}/drawn_log_prob"), 1e-4)


# --- log-ratios


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_gradient_flows_through_the_mean_only(prediction_type):
    scheduler = scheduler_for(10, prediction_type=prediction_type)
    sample, noise = randn(10, 4, 3, 3, dtype=torch.float64), randn(10, 4, 3, 3, seed=1, dtype=torch.float64)
    output = randn(10, 4, 3, 3, seed=2, dtype=torch.float64).requires_grad_()
    drawn = ddim_step(scheduler, output, scheduler.timesteps, sample, noise=noise)
    assert not drawn.prev_sample.requires_grad and drawn.log_prob.dtype == torch.float64
    (from_drawing,) = torch.autograd.grad(drawn.log_prob.sum(), output)
    score = lambda o: ddim_step(scheduler, o, scheduler.timesteps, sample, prev_sample=drawn.prev_sample).log_prob
    (from_scoring,) = torch.autograd.grad(score(output).sum(), output)
    assert torch.equal(from_drawing, from_scoring)
    sensitivity = make_sampler(scheduler, 10).sensitivity()
    close(from_scoring.abs(), (sensitivity.view(-1, 1, 1, 1) * noise / 36).abs(), 1e-8)
    assert torch.autograd.gradcheck(score, output)


@pytest.mark.parametrize(
    "prediction_type,expected", [("epsilon", (1.45, 1.33, 11.7)), ("v_prediction", (0.10, 1.16, 11.0))]
)
def test_log_ratio_scales_equalise_sensitivity(prediction_type, expected):
    sampler = make_sampler(scheduler_for(10, prediction_type=prediction_type), 10)
    sensitivity = sampler.sensitivity()
    assert torch.allclose(sensitivity[[0, 8, 9]], torch.tensor(expected, dtype=torch.float64), rtol=0.02)
    trained = torch.arange(10) < 9
    scales = log_ratio_scales(sampler, trained)
    assert scales.dtype == torch.float32 and abs(scales[trained].mean() - 1) < 1e-6
    close(scales * sensitivity.float(), (scales * sensitivity.float())[:1].expand(10), 1e-5)


def test_log_ratio_scales_skip_steps_without_density():
    sampler = make_sampler(scheduler_for(4, set_alpha_to_one=True), 4)
    scales = log_ratio_scales(sampler)
    assert scales[3] == 0 and abs(scales[:3].mean() - 1) < 1e-6 and scales.isfinite().all()
    with pytest.raises(ValueError, match="no step with a density"):
        log_ratio_scales(sampler, torch.arange(4) == 3)


# --- noise


def test_noise_belongs_to_samples_whatever_the_layout():
    whole = pair_noise(7, 3, range(8), 4, (3, 8, 8))
    halves = [pair_noise(7, 3, torch.arange(8)[part::2], 4, (3, 8, 8)) for part in (0, 1)]
    for i in range(2):
        assert torch.equal(whole[i][:, 0::2], halves[0][i]) and torch.equal(whole[i][:, 1::2], halves[1][i])
    initial, noises = whole
    assert torch.equal(initial[0], initial[1])
    streams = torch.cat([initial[:1].flatten(2), noises.transpose(1, 2).flatten(0, 1).flatten(2)]).flatten(1)
    assert (torch.corrcoef(streams) - torch.eye(len(streams))).abs().max() < 0.12
    assert abs(streams.mean()) < 0.02 and abs(streams.std() - 1) < 0.02
    apart, same = pair_noise(7, 3, range(8), 4, (3, 8, 8), shared_initial=False)
    assert torch.equal(same, noises) and torch.equal(apart[0], initial[0]) and not torch.equal(apart[1], initial[1])
    assert not torch.equal(pair_noise(7, 4, range(8), 4, (3, 8, 8))[0], initial)
    assert not torch.equal(pair_noise(8, 3, range(8), 4, (3, 8, 8))[0], initial)


def test_noise_is_the_same_in_another_process():
    program = "from sdpo_nb.mdp import keyed_noise; print(keyed_noise(1, [5], (4,))[0].tolist())"
    answers = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert answers == {str(keyed_noise(1, [5], (4,))[0].tolist()) + "\n"}


def test_noise_in_half_precision_is_the_rounded_float_noise():
    assert torch.equal(keyed_noise(0, [1, 2], (4, 8, 8), dtype=torch.float16), keyed_noise(0, [1, 2], (4, 8, 8)).half())
    assert keyed_noise(0, [], (4, 8, 8)).shape == (0, 4, 8, 8)


# --- trajectories


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 16, 50])
def test_trajectories_equal_stock_diffusers(num_steps):
    weight = randn(4, 4, seed=1) / 2

    def predict(sample, timestep):
        return torch.tanh(torch.einsum("oc,bchw->bohw", weight, sample) + timestep / 1000)

    stock = DDIMScheduler(**SD_TURBO)
    initial, noises = randn(3, 4, 8, 8, seed=2), randn(3, num_steps, 4, 8, 8, seed=3)
    ours = sample_trajectories(predict, make_sampler(stock, num_steps), initial, noises)
    stock.set_timesteps(num_steps)
    sample = initial
    for i, timestep in enumerate(stock.timesteps):
        step = stock.step(predict(sample, int(timestep)), int(timestep), sample, eta=1.0, variance_noise=noises[:, i])
        sample = step.prev_sample
        close(ours.latents[:, i + 1], sample, 1e-6)
        close(ours.pred_x0[:, i], step.pred_original_sample, 1e-6)
    assert torch.equal(ours.timesteps, stock.timesteps) and torch.equal(ours.final_sample, ours.latents[:, -1])


def test_trajectory_makes_one_batched_call_a_step_without_gradient():
    calls = []

    def predict(sample, timestep):
        calls.append((tuple(sample.shape), timestep, torch.is_grad_enabled()))
        return sample * scale

    sampler, scale = make_sampler(scheduler_for(4), 4), torch.ones((), requires_grad=True)
    sampled = sample_trajectories(predict, sampler, randn(6, 4, 8, 8), randn(6, 4, 4, 8, 8, seed=1))
    assert calls == [((6, 4, 8, 8), t, False) for t in (999, 749, 499, 249)]
    shapes = (sampled.latents.shape, sampled.pred_x0.shape, sampled.log_prob.shape)
    assert shapes == ((6, 5, 4, 8, 8), (6, 4, 4, 8, 8), (6, 4))
    for i in range(4):  # what training recomputes
        x, action = sampled.latents[:, i], sampled.latents[:, i + 1]
        assert torch.equal(sampler.step(x * scale, x, i, action=action).log_prob, sampled.log_prob[:, i])


@pytest.mark.parametrize("num_steps", [1, 2, 8])
def test_exact_denoiser_reaches_its_world(num_steps):
    scheduler, world = scheduler_for(num_steps), randn(5, 3, 8, 8).sign()
    initial, noises = randn(16, 3, 8, 8, seed=1), randn(16, num_steps, 3, 8, 8, seed=2)
    exact = mixture_denoiser(world, scheduler)
    ends = sample_trajectories(exact, make_sampler(scheduler, num_steps), initial, noises).final_sample
    distance = (ends[:, None] - world).flatten(2)
    assert (distance.abs().mean(2).amin(1) < 0.15).all() if num_steps == 8 else distance.isfinite().all()
    if num_steps == 8:
        assert len(distance.norm(dim=2).argmin(1).unique()) > 2


def test_trajectory_refuses_noise_of_the_wrong_length():
    sampler = make_sampler(scheduler_for(4), 4)
    with pytest.raises(ValueError, match=r"noises has shape .* give \[B,T,C,H,W\] = \[2, 4, 4, 8, 8\]"):
        sample_trajectories(lambda x, t: x, sampler, randn(2, 4, 8, 8), randn(2, 5, 4, 8, 8))


# --- what is refused, and how


@pytest.mark.parametrize(
    "inputs,message",
    [
        (dict(eta=1.5), "eta is 1.5"),
        (dict(timestep=1000), r"timestep is \[1000\]"),
        (dict(timestep=-1), r"timestep is \[-1\]"),
        (dict(timestep=torch.tensor([1, 2, 3])), "3 entries for 2 samples"),
        (dict(prev_timestep="mine"), "prev_timestep is 'mine'"),
        (dict(noise=torch.zeros(2, 4, 8, 7)), "noise has shape"),
        (dict(model_output=torch.zeros(1, 4, 8, 8)), "model_output has shape"),
        (
            dict(noise=torch.zeros(2, 4, 8, 8), prev_sample=torch.zeros(2, 4, 8, 8)),
            "prev_sample and noise are all given",
        ),
        (dict(scheduler=DDIMScheduler()), "num_inference_steps is None"),
        (dict(scheduler=EulerDiscreteScheduler()), "EulerDiscreteScheduler"),
        (dict(scheduler=DDIMScheduler(thresholding=True)), "thresholding is True"),
        (dict(scheduler=DDIMScheduler(prediction_type="flow")), "prediction_type is 'flow'"),
    ],
)
def test_bad_steps_are_refused_with_a_sentence(inputs, message):
    arguments = (
        dict(
            scheduler=scheduler_for(4),
            model_output=torch.zeros(2, 4, 8, 8),
            timestep=999,
            sample=torch.zeros(2, 4, 8, 8),
        )
        | inputs
    )
    with pytest.raises(ValueError, match=message):
        ddim_step(**arguments)
