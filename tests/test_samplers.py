"The samplers of all families: against independent derivations in float64 and stock diffusers, at many step counts"

import math
import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SCMScheduler,
    TCDScheduler,
)

from sdpo_nb.samplers import DDIMSampler, FlowSampler, LCMSampler, Sampler, TCDSampler, TrigFlowSampler
from sdpo_nb.samplers import few_step_timesteps, make_ddim, make_sampler

LEVELS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SD_TURBO = dict(LEVELS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing")
COUNTS = [1, 2, 3, 4, 7, 16, 50, 1000]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert ((actual - expected).abs() <= tolerance * expected.abs().clamp(min=1)).all()


def ddim(num_steps, eta=1.0, prev_timestep="diffusers", dtype=torch.float32, **changes):
    scheduler = DDIMScheduler(**{**SD_TURBO, **changes})
    few_step_timesteps(scheduler, num_steps)
    return DDIMSampler(scheduler, eta=eta, prev_timestep=prev_timestep, dtype=dtype)


def flow(num_steps, **options):
    return FlowSampler(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), **options)


def trig(num_steps, **options):
    return TrigFlowSampler(torch.linspace(math.pi / 2, 0, num_steps + 1, dtype=torch.float64), **options)


def lcm(num_steps, **options):
    scheduler = LCMScheduler(**LEVELS)
    few_step_timesteps(scheduler, num_steps)
    return LCMSampler(scheduler, **options)


def tcd(num_steps, **options):
    scheduler = TCDScheduler(**LEVELS)
    few_step_timesteps(scheduler, num_steps)
    return TCDSampler(scheduler, **options)


FAMILIES = {
    "ddim": ddim,
    "ddim half": lambda T, **o: ddim(T, eta=0.5, **o),
    "flow cps": flow,
    "flow cps .8": lambda T, **o: flow(T, eta=0.8, **o),
    "flow ddim": lambda T, **o: flow(T, rule="ddim", **o),
    "trig": trig,
    "lcm": lcm,
    "tcd": tcd,
    "tcd .3": lambda T, **o: tcd(T, eta=0.3, **o),
}


def output_for(sampler, name, clean, noise, i):
    "What a network that knows the clean sample and the noise has to answer"
    if name.startswith("flow"):
        return noise - clean
    if name == "trig":
        t = sampler.angles[i].view(-1, 1, 1, 1) if isinstance(i, torch.Tensor) else sampler.angles[i]
        return t.cos() * sampler.data_std * noise - t.sin() * clean
    return noise


# --- every family: the same properties


@pytest.mark.parametrize("num_steps", COUNTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_perfect_network_keeps_every_state_on_the_schedule(name, num_steps):
    "From x = a·x0 + s·ε the step must make a'·x0 plus noise of size s', and predict x0 and ε"
    num_steps = min(num_steps, 50) if name[:3] in ("lcm", "tcd") else num_steps  # distilled on 50 steps
    sampler = FAMILIES[name](num_steps, dtype=torch.float64)
    steps = torch.tensor(sorted({0, num_steps // 2, num_steps - 1}))
    clean, noise, fresh = (randn(len(steps), 4, 8, 8, seed=seed, dtype=torch.float64) for seed in range(3))
    x = sampler.add_noise(clean, noise, steps)
    pred_x0, pred_noise = sampler.predict(output_for(sampler, name, clean, noise, steps), x, steps)
    if name != "lcm":  # whose skip connection is exact at t=0 only
        close(pred_x0, clean, 1e-6)
        close(pred_noise, noise, 1e-6)
    drawn = sampler.step(output_for(sampler, name, clean, noise, steps), x, steps, noise=fresh)
    tables = (sampler.next_signal, sampler.direction, sampler.std)
    a, kept, tau = (table[steps].view(-1, 1, 1, 1) for table in tables)
    close(drawn.prev_sample, a * pred_x0 + kept * pred_noise + tau * fresh, 1e-9)
    total = (sampler.direction**2 + sampler.std**2) ** 0.5
    close(total, sampler.next_noise, 1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_sampling_and_scoring_are_one_function(name):
    sampler = FAMILIES[name](4)
    x, output = randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1)
    for i in range(4):
        drawn = sampler.step(output, x, i, generator=torch.Generator().manual_seed(0))
        scored = sampler.step(output, x, i, action=drawn.prev_sample)
        assert torch.equal(drawn.log_prob, scored.log_prob) or drawn.log_prob.isnan().all()
        assert drawn.log_prob.isnan().any() == (not sampler.has_density[i])
        density = torch.distributions.Normal(
            sampler.mean(*sampler.predict(output, x, i), i), sampler.std[i].clamp(min=1e-9)
        )
        if sampler.has_density[i]:
            close(drawn.log_prob, density.log_prob(drawn.prev_sample).mean((1, 2, 3)), 1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_slopes_are_those_of_autograd(name):
    sampler = FAMILIES[name](7, dtype=torch.float64)
    for i, slope in enumerate(sampler.slope()):
        output = randn(1, 4, 2, 2, seed=i, dtype=torch.float64).requires_grad_()
        mean = sampler.mean(*sampler.predict(output, randn(1, 4, 2, 2, seed=9, dtype=torch.float64), i), i)
        (gradient,) = torch.autograd.grad(mean.sum(), output)
        close(gradient.abs(), slope.expand_as(gradient), 1e-6)
    assert torch.equal(sampler.sensitivity() == torch.inf, ~sampler.has_density)


def test_moved_samplers_have_the_same_schedule():
    for build in FAMILIES.values():
        sampler = build(4)
        again = sampler.to(dtype=torch.float64).to(dtype=torch.float32)
        assert all(torch.equal(getattr(sampler, n), getattr(again, n)) for n in ("signal", "noise", "std", "direction"))
        assert sampler.to(dtype=torch.float64).std.dtype == torch.float64 and sampler.std.dtype == torch.float32


# --- independent derivations


def posterior(a, s, a_next, s_next, clean, x):
    "Mean and deviation of x' given x and x0 in the chain x = (a/a')·x' + noise, by Bayes' rule for Gaussians"
    share = a / a_next
    added = s**2 - (share * s_next) ** 2
    variance = 1 / (1 / s_next**2 + share**2 / added)
    return variance * (a_next * clean / s_next**2 + share * x / added), variance**0.5


@pytest.mark.parametrize("num_steps", COUNTS)
@pytest.mark.parametrize("name", ["ddim", "flow ddim"])
def test_the_rule_of_ddim_is_the_posterior(name, num_steps):
    sampler = FAMILIES[name](num_steps, dtype=torch.float64)
    assert (sampler.std[:-1] > 0).all() or num_steps == 1000
    for i in sorted({0, num_steps // 2, num_steps - 1}):
        if sampler.std[i] == 0 or sampler.signal[i] == 0:  # no fresh noise, or nothing but noise: no posterior
            continue
        clean, noise = randn(1, 4, 8, 8, dtype=torch.float64), randn(1, 4, 8, 8, seed=1, dtype=torch.float64)
        x = sampler.add_noise(clean, noise, i)
        mean = sampler.mean(*sampler.predict(output_for(sampler, name, clean, noise, i), x, i), i)
        levels = (sampler.signal[i], sampler.noise[i], sampler.next_signal[i], sampler.next_noise[i])
        wanted, deviation = posterior(*levels, clean, x)
        close(mean, wanted, 1e-6)
        close(sampler.std[i], deviation, 1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.5, 0.8, 1.0])
def test_cps_shares_the_noise_by_an_angle(eta):
    sampler, after = flow(7, eta=eta, dtype=torch.float64), torch.linspace(1, 0, 8, dtype=torch.float64)[1:]
    close(sampler.std, after * math.sin(eta * math.pi / 2), 1e-12)
    close(sampler.direction, after * math.cos(eta * math.pi / 2), 1e-12)
    assert sampler.std[-1] == 0 and not sampler.has_density[-1]


# --- stock diffusers


@pytest.mark.parametrize("num_steps", COUNTS)
@pytest.mark.parametrize("extra", [{}, dict(clip_sample=True, clip_sample_range=1.5, set_alpha_to_one=True)], ids=str)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_equals_stock_diffusers(num_steps, prediction_type, extra):
    sampler = ddim(num_steps, prediction_type=prediction_type, **extra)
    stock = DDIMScheduler(**{**SD_TURBO, "prediction_type": prediction_type, **extra})
    few_step_timesteps(stock, num_steps)
    assert torch.equal(sampler.timesteps, stock.timesteps)
    for i in sorted({0, num_steps // 2, num_steps - 1}):
        x, output, noise = (randn(2, 4, 8, 8, seed=10 * i + s) for s in range(3))
        ours = sampler.step(output, x, i, noise=noise)
        theirs = stock.step(output, int(stock.timesteps[i]), x, eta=1.0, variance_noise=noise)
        close(ours.prev_sample, theirs.prev_sample, 1e-6)
        close(ours.pred_x0, theirs.pred_original_sample, 1e-6)
        still = stock.step(output, int(stock.timesteps[i]), x, eta=0.0)
        assert torch.equal(
            ddim(num_steps, 0.0, prediction_type=prediction_type, **extra).step(output, x, i).prev_sample,
            still.prev_sample,
        )


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7, 16, 50])
def test_lcm_equals_stock_diffusers(num_steps):
    stock, sampler = LCMScheduler(**LEVELS), lcm(num_steps, dtype=torch.float64)
    stock.set_timesteps(num_steps)
    x = randn(2, 4, 8, 8, dtype=torch.float64)
    for i, timestep in enumerate(stock.timesteps):
        output = randn(2, 4, 8, 8, seed=i, dtype=torch.float64)
        theirs = stock.step(output, timestep, x, generator=torch.Generator().manual_seed(i))
        ours = sampler.step(output, x, i, generator=torch.Generator().manual_seed(i))
        close(ours.pred_x0, theirs.denoised, 1e-5)
        close(ours.prev_sample, theirs.prev_sample, 1e-5)
        x = theirs.prev_sample
    assert sampler.has_density.tolist() == [True] * (num_steps - 1) + [False]


@pytest.mark.parametrize("num_steps", COUNTS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_flow_equals_stock_diffusers(num_steps, stochastic):
    stock = FlowMatchEulerDiscreteScheduler(stochastic_sampling=stochastic)
    stock.set_timesteps(num_steps)
    sampler, x = FlowSampler(stock.sigmas, eta=float(stochastic)), randn(2, 4, 8, 8)
    for i, timestep in enumerate(stock.timesteps[:16]):
        output = randn(2, 4, 8, 8, seed=i)
        theirs = stock.step(output, timestep, x, generator=torch.Generator().manual_seed(i)).prev_sample
        close(sampler.step(output, x, i, generator=torch.Generator().manual_seed(i)).prev_sample, theirs, 1e-5)
        x = theirs
    close(sampler.timesteps, stock.timesteps, 1e-5)


@pytest.mark.parametrize("num_steps", COUNTS)
def test_trigflow_equals_stock_diffusers(num_steps):
    stock = SCMScheduler()
    stock.set_timesteps(num_steps, intermediate_timesteps=1.3 if num_steps == 2 else None)
    sampler, x = make_sampler(SCMScheduler(), num_steps), randn(2, 4, 8, 8)
    for i, timestep in enumerate(stock.timesteps[:-1][:16]):
        output = randn(2, 4, 8, 8, seed=i)
        theirs = stock.step(output, timestep, x, generator=torch.Generator().manual_seed(i))
        ours = sampler.step(output, x, i, generator=torch.Generator().manual_seed(i))
        close(ours.pred_x0, theirs.pred_original_sample, 1e-5)
        close(ours.prev_sample, theirs.prev_sample, 1e-5)
        x = theirs.prev_sample


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_trajectory_consistency_equals_stock_diffusers(eta, prediction_type):
    stock = TCDScheduler(**LEVELS, prediction_type=prediction_type)
    for num_steps in (1, 2, 3, 7, 50):
        stock.set_timesteps(num_steps)
        sampler, x = make_sampler(stock, num_steps, eta=eta), randn(2, 4, 8, 8)
        for i, timestep in enumerate(stock.timesteps[:16]):
            output = randn(2, 4, 8, 8, seed=i)
            theirs = stock.step(output, timestep, x, eta=eta, generator=torch.Generator().manual_seed(i)).prev_sample
            close(sampler.step(output, x, i, generator=torch.Generator().manual_seed(i)).prev_sample, theirs, 1e-4)
            x = theirs
    listed = make_sampler(stock, 3, eta=eta, timesteps=[999, 500, 100])
    assert listed.timesteps.tolist() == [999, 500, 100] and listed.has_density.tolist() == [eta > 0, eta > 0, False]


def test_a_scheduler_that_shifts_twice_is_followed_only_when_it_is_asked():
    twice = make_sampler(FlowMatchEulerDiscreteScheduler(shift=3), 4)
    close(twice.sigmas, torch.tensor([1, 0.8579, 0.6022, 0.0090, 0], dtype=torch.float64), 1e-3)
    even = torch.linspace(1, 0.25, 4, dtype=torch.float64)
    once = FlowSampler(torch.cat([3 * even / (1 + 2 * even), torch.zeros(1)]))
    close(once.noise, torch.tensor([1, 0.9, 0.75, 0.5]), 1e-6)


# --- DDIM in particular


@pytest.mark.parametrize("num_steps", [1, 4])
def test_conventions_for_the_previous_timestep_differ_only_at_the_end(num_steps):
    ours, theirs = (ddim(num_steps, 1.0, p, set_alpha_to_one=True) for p in ("diffusers", "reference"))
    assert torch.equal(ours.std[:-1], theirs.std[:-1])
    first = DDIMScheduler(**SD_TURBO).alphas_cumprod[0]
    assert ours.next_signal[-1] == 1 and theirs.next_signal[-1] == first**0.5
    assert not ours.has_density[-1] and theirs.has_density.all()
    ours, theirs = (ddim(num_steps, 1.0, p) for p in ("diffusers", "reference"))
    assert torch.equal(ours.std, theirs.std) and torch.equal(ours.next_signal, theirs.next_signal)


def test_stride_at_sixteen_steps_is_diffusers_own():
    sampler = ddim(16)
    assert sampler.timesteps[2:4].tolist() == [874, 811]  # yet the step from 874 goes to 812
    assert sampler.next_signal[2] == DDIMScheduler(**SD_TURBO).alphas_cumprod[812] ** 0.5


@pytest.mark.parametrize("num_steps", [1, 3, 6, 7, 16, 50])
def test_steps_from_pure_noise_are_finite(num_steps):
    "ᾱ is 0 at the first timestep, where s'²−τ² is 0 but for rounding, which may take it below"
    sampler = ddim(num_steps, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    step = sampler.step(randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), 0, noise=randn(2, 4, 8, 8, seed=2))
    assert all(value.isfinite().all() for value in step)


def test_a_step_without_density_poisons_no_gradient():
    sampler, output = ddim(4, set_alpha_to_one=True), randn(4, 4, 8, 8).requires_grad_()
    x, action = randn(4, 4, 8, 8, seed=1), randn(4, 4, 8, 8, seed=2)
    log_prob = sampler.step(output, x, torch.arange(4), action=action).log_prob
    assert log_prob.isnan().tolist() == [False, False, False, True]
    log_prob[:3].sum().backward()
    assert output.grad.isfinite().all() and (output.grad[3] == 0).all() and (output.grad[:3] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("output_dtype", [torch.float32, torch.float16])
def test_log_ratio_is_zero_from_what_is_stored(dtype, output_dtype):
    sampler, steps = ddim(10), torch.arange(10)
    x, output = randn(10, 4, 8, 8).to(dtype), randn(10, 4, 8, 8, seed=1).to(output_dtype)
    drawn = sampler.step(output, x, steps, generator=torch.Generator().manual_seed(0))
    assert drawn.prev_sample.dtype == drawn.pred_x0.dtype == dtype and drawn.log_prob.dtype == torch.float32
    assert torch.equal(sampler.step(output, x, steps, action=drawn.prev_sample).log_prob, drawn.log_prob)
    exact = ddim(10, dtype=torch.float64).step(output.double(), x.double(), steps, action=drawn.prev_sample.double())
    close(drawn.log_prob.double(), exact.log_prob, 1e-4)


# --- what is refused, and how


@pytest.mark.parametrize("num_steps", [0, -3, 1001, 2.5, True, "4"])
@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler(**SD_TURBO), FlowMatchEulerDiscreteScheduler(), SCMScheduler()], ids=lambda s: type(s)
)
def test_impossible_numbers_of_steps_are_refused(scheduler, num_steps):
    with pytest.raises(ValueError, match="num_steps is"):
        make_sampler(scheduler, num_steps)


@pytest.mark.parametrize(
    "build,message",
    [
        (lambda: Sampler(torch.arange(3)), None),
        (lambda: ddim(4, eta=1.5), "eta is 1.5"),
        (lambda: ddim(4, prev_timestep="mine"), "prev_timestep is 'mine'"),
        (lambda: DDIMSampler(DDIMScheduler()), "num_inference_steps is None"),
        (lambda: DDIMSampler(EulerDiscreteScheduler()), "EulerDiscreteScheduler"),
        (lambda: ddim(4, thresholding=True), "thresholding is True"),
        (lambda: ddim(4, prediction_type="flow"), "prediction_type is 'flow'"),
        (lambda: flow(4, eta=-1), "eta is -1"),
        (lambda: flow(4, rule="sde"), "rule is 'sde'"),
        (lambda: FlowSampler([1.0, 1.0, 0.0]), "sigmas is"),
        (lambda: trig(4, eta=0.5), "eta is 0.5"),
        (lambda: TrigFlowSampler([1.0, 0.5]), "angles is"),
        (lambda: make_sampler({"shift": 1.0}, 4), "without beta_schedule"),
        (lambda: ddim(4).step(randn(1, 4, 8, 8), randn(1, 4, 8, 8), 4), "i is 4"),
        (lambda: ddim(4).step(randn(1, 4, 8, 8), randn(1, 4, 8, 8), torch.tensor([0.5])), "i is of type"),
    ],
)
def test_refusals_are_sentences(build, message):
    with pytest.raises(ValueError if message else TypeError, match=message):
        build()


def test_make_ddim_from_other_schedulers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = make_ddim(EulerDiscreteScheduler(**LEVELS, timestep_spacing="trailing", prediction_type="v_prediction"))
    assert made.config.prediction_type == "v_prediction" and not made.config.clip_sample
    assert torch.equal(made.alphas_cumprod, DDIMScheduler(**SD_TURBO).alphas_cumprod)
    with pytest.warns(UserWarning, match="changed from 'leading' to 'trailing'"):
        made = make_ddim(DDIMScheduler(clip_sample=True))
    assert made.config.clip_sample and made.config.set_alpha_to_one and made.num_inference_steps is None
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        make_ddim(DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"))
