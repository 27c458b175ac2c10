"One denoising step and whole trajectories: against the reference's numbers, stock diffusers, autograd and torch.distributions"

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from sdpo_nb.mdp import (
    ddim_step,
    few_step_timesteps,
    gaussian_log_prob,
    has_density,
    keyed_noise,
    log_ratio_scales,
    make_ddim,
    mixture_denoiser,
    output_sensitivity,
    pair_noise,
    sample_trajectories,
    step_coefficients,
)

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


# --- stock diffusers


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 16, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "extra", [{}, dict(clip_sample=True, clip_sample_range=1.5, set_alpha_to_one=True)], ids=["plain", "clipped"]
)
def test_samples_equal_stock_diffusers(num_steps, prediction_type, extra):
    scheduler = scheduler_for(num_steps, prediction_type=prediction_type, **extra)
    weight = randn(4, 4, seed=1) / 2

    def predict(sample, timestep):
        return torch.tanh(torch.einsum("oc,bchw->bohw", weight, sample) + timestep / 1000)

    initial, noises = randn(3, 4, 8, 8, seed=2), randn(3, num_steps, 4, 8, 8, seed=3)
    ours = sample_trajectories(predict, scheduler, initial, noises)
    stock = DDIMScheduler(**{**SD_TURBO, "prediction_type": prediction_type, **extra})
    stock.set_timesteps(num_steps)
    sample = initial
    for i, timestep in enumerate(stock.timesteps):
        step = stock.step(predict(sample, int(timestep)), int(timestep), sample, eta=1.0, variance_noise=noises[:, i])
        sample = step.prev_sample
        close(ours.latents[:, i + 1], sample, 1e-6)
        close(ours.pred_x0[:, i], step.pred_original_sample, 1e-6)
    assert torch.equal(ours.timesteps, stock.timesteps) and torch.equal(ours.final_sample, ours.latents[:, -1])


def test_deterministic_samples_equal_stock_diffusers():
    scheduler, sample, output = scheduler_for(4), randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    for timestep in scheduler.timesteps:
        step = ddim_step(scheduler, output, timestep, sample, eta=0.0)
        assert torch.equal(step.prev_sample, scheduler.step(output, int(timestep), sample, eta=0.0).prev_sample)
        assert step.log_prob.isnan().all()


@pytest.mark.parametrize("num_steps,reference_differs", [(1, True), (4, True)])
def test_conventions_for_the_previous_timestep_differ_only_at_the_end(num_steps, reference_differs):
    scheduler = scheduler_for(num_steps, set_alpha_to_one=True)
    ours, theirs = (step_coefficients(scheduler, scheduler.timesteps, 1.0, p) for p in ("diffusers", "reference"))
    assert torch.equal(ours.std[:-1], theirs.std[:-1])
    assert (ours.prev_alpha_bar[-1] == 1) and (theirs.prev_alpha_bar[-1] == scheduler.alphas_cumprod[0])
    scheduler = scheduler_for(num_steps)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            *(step_coefficients(scheduler, scheduler.timesteps, 1.0, p) for p in ("diffusers", "reference"))
        )
    )


def test_stride_at_sixteen_steps_is_diffusers_own():
    scheduler = scheduler_for(16)
    assert scheduler.timesteps[2:4].tolist() == [874, 811]  # yet the step from 874 goes to 812
    assert step_coefficients(scheduler, 874).prev_alpha_bar == scheduler.alphas_cumprod[812]


# --- log-probabilities and gradients


def test_log_prob_is_the_mean_gaussian_log_density():
    x, mean, std = randn(5, 4, 8, 8), randn(5, 4, 8, 8, seed=1), torch.rand(5, 1, 1, 1) + 0.1
    expected = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x).mean((1, 2, 3))
    close(gaussian_log_prob(x, mean, std), expected, 1e-5)


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
    slope = output_sensitivity(scheduler, scheduler.timesteps)
    std = step_coefficients(scheduler, scheduler.timesteps, dtype=torch.float64).std
    expected = ((slope / std).view(-1, 1, 1, 1) * noise / 36).abs()
    close(from_scoring.abs(), expected, 1e-8)
    assert torch.autograd.gradcheck(score, output)


def test_mixed_timesteps_equal_one_sample_at_a_time():
    scheduler, sample, output, noise = scheduler_for(50), *(randn(6, 4, 8, 8, seed=s) for s in range(3))
    timesteps = scheduler.timesteps[[49, 0, 7, 7, 30, 21]]
    batch = ddim_step(scheduler, output, timesteps, sample, noise=noise)
    for i, timestep in enumerate(timesteps.tolist()):
        one = ddim_step(scheduler, output[i : i + 1], timestep, sample[i : i + 1], noise=noise[i : i + 1])
        assert all(torch.equal(a[i], b[0]) for a, b in zip(batch, one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("output_dtype", [torch.float32, torch.float16])
def test_log_ratio_is_zero_from_what_is_stored(dtype, output_dtype):
    scheduler = scheduler_for(10)
    sample, output = randn(10, 4, 8, 8).to(dtype), randn(10, 4, 8, 8, seed=1).to(output_dtype)
    drawn = ddim_step(scheduler, output, scheduler.timesteps, sample, generator=torch.Generator().manual_seed(0))
    assert drawn.prev_sample.dtype == drawn.pred_x0.dtype == dtype and drawn.log_prob.dtype == torch.float32
    again = ddim_step(scheduler, output, scheduler.timesteps, sample, prev_sample=drawn.prev_sample)
    assert torch.equal(again.log_prob, drawn.log_prob)
    exact = ddim_step(
        scheduler, output.double(), scheduler.timesteps, sample.double(), prev_sample=drawn.prev_sample.double()
    )
    close(drawn.log_prob.double(), exact.log_prob, 1e-4)


def test_a_step_without_density_says_so_and_poisons_no_gradient():
    scheduler = scheduler_for(4, set_alpha_to_one=True)
    assert has_density(scheduler, scheduler.timesteps).tolist() == [True, True, True, False]
    assert has_density(scheduler, scheduler.timesteps, prev_timestep="reference").all()
    assert not has_density(scheduler, scheduler.timesteps, eta=0.0).any()
    output = randn(4, 4, 8, 8).requires_grad_()
    log_prob = ddim_step(
        scheduler, output, scheduler.timesteps, randn(4, 4, 8, 8, seed=1), prev_sample=randn(4, 4, 8, 8, seed=2)
    ).log_prob
    assert log_prob.isnan().tolist() == [False, False, False, True]
    log_prob[:3].sum().backward()
    assert output.grad.isfinite().all() and (output.grad[3] == 0).all() and (output.grad[:3] != 0).any()


@pytest.mark.parametrize("num_steps", [1, 3, 6, 7, 16, 50])
def test_steps_from_pure_noise_are_finite(num_steps):
    "ᾱ is 0 at the first timestep, where 1-ᾱ'-σ² is 0 but for rounding, which may take it below"
    scheduler = scheduler_for(num_steps, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    step = ddim_step(scheduler, randn(2, 4, 8, 8), 999, randn(2, 4, 8, 8, seed=1), noise=randn(2, 4, 8, 8, seed=2))
    assert all(value.isfinite().all() for value in step)


@pytest.mark.parametrize(
    "prediction_type,expected", [("epsilon", (1.45, 1.33, 11.7)), ("v_prediction", (0.10, 1.16, 11.0))]
)
def test_log_ratio_scales_equalise_sensitivity(prediction_type, expected):
    scheduler = scheduler_for(10, prediction_type=prediction_type)
    sensitivity = (
        output_sensitivity(scheduler, scheduler.timesteps) / step_coefficients(scheduler, scheduler.timesteps).std
    )
    assert torch.allclose(sensitivity[[0, 8, 9]], torch.tensor(expected, dtype=torch.float64), rtol=0.02)
    trained = torch.arange(10) < 9
    scales = log_ratio_scales(scheduler, scheduler.timesteps, trained=trained)
    assert scales.dtype == torch.float32 and abs(scales[trained].mean() - 1) < 1e-6
    close(scales * sensitivity.float(), (scales * sensitivity.float())[:1].expand(10), 1e-5)


def test_log_ratio_scales_skip_steps_without_density():
    scheduler = scheduler_for(4, set_alpha_to_one=True)
    scales = log_ratio_scales(scheduler, scheduler.timesteps)
    assert scales[3] == 0 and abs(scales[:3].mean() - 1) < 1e-6 and scales.isfinite().all()
    with pytest.raises(ValueError, match="no step with a density"):
        log_ratio_scales(scheduler, scheduler.timesteps, trained=torch.arange(4) == 3)


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


def test_trajectory_makes_one_batched_call_a_step_without_gradient():
    calls = []

    def predict(sample, timestep):
        calls.append((tuple(sample.shape), timestep, torch.is_grad_enabled()))
        return sample * scale

    scheduler, scale = scheduler_for(4), torch.ones((), requires_grad=True)
    game = sample_trajectories(predict, scheduler, randn(6, 4, 8, 8), randn(6, 4, 4, 8, 8, seed=1))
    assert calls == [((6, 4, 8, 8), t, False) for t in (999, 749, 499, 249)]
    assert (game.latents.shape, game.pred_x0.shape, game.log_prob.shape) == ((6, 5, 4, 8, 8), (6, 4, 4, 8, 8), (6, 4))
    for i, timestep in enumerate(scheduler.timesteps):  # what training recomputes
        x = game.latents[:, i]
        assert torch.equal(
            ddim_step(scheduler, x * scale, timestep, x, prev_sample=game.latents[:, i + 1]).log_prob,
            game.log_prob[:, i],
        )


@pytest.mark.parametrize("num_steps", [1, 2, 8])
def test_exact_denoiser_reaches_its_world(num_steps):
    scheduler, world = scheduler_for(num_steps), randn(5, 3, 8, 8).sign()
    game = sample_trajectories(
        mixture_denoiser(world, scheduler), scheduler, randn(16, 3, 8, 8, seed=1), randn(16, num_steps, 3, 8, 8, seed=2)
    )
    distance = (game.final_sample[:, None] - world).flatten(2).abs().mean(2).amin(1)
    assert (distance < 0.15).all() if num_steps == 8 else distance.isfinite().all()
    if num_steps == 8:
        assert len((game.final_sample[:, None] - world).flatten(2).norm(dim=2).argmin(1).unique()) > 2


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


@pytest.mark.parametrize("num_steps", [0, -3, 1001, 2.5, True, "4"])
def test_impossible_numbers_of_steps_are_refused(num_steps):
    with pytest.raises(ValueError, match="num_steps is"):
        few_step_timesteps(DDIMScheduler(), num_steps)


def test_trajectory_refuses_noise_of_the_wrong_length():
    with pytest.raises(ValueError, match=r"noises has shape .* give \[B,T,C,H,W\] = \[2, 4, 4, 8, 8\]"):
        sample_trajectories(lambda x, t: x, scheduler_for(4), randn(2, 4, 8, 8), randn(2, 5, 4, 8, 8))
    with pytest.raises(ValueError, match="num_inference_steps is None"):
        sample_trajectories(lambda x, t: x, DDIMScheduler(), randn(2, 4, 8, 8), randn(2, 4, 4, 8, 8))


def test_make_ddim_from_other_schedulers():
    betas = {key: SD_TURBO[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ddim = make_ddim(
            EulerDiscreteScheduler(**betas, timestep_spacing="trailing", prediction_type="v_prediction"), 4
        )
    assert (
        ddim.config.prediction_type == "v_prediction"
        and not ddim.config.clip_sample
        and has_density(ddim, ddim.timesteps).all()
    )
    assert torch.equal(ddim.alphas_cumprod, DDIMScheduler(**SD_TURBO).alphas_cumprod)
    with pytest.warns(UserWarning, match="changed from 'leading' to 'trailing'"):
        ddim = make_ddim(DDIMScheduler(clip_sample=True))
    assert ddim.config.clip_sample and ddim.config.set_alpha_to_one and ddim.num_inference_steps is None
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler without beta_schedule"):
        make_ddim(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        make_ddim(DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"))
