"""The GPU check's frame: parts with limits of their own, rows that are kept, goals beside what was measured."""

import json
import time
import warnings
from functools import partial

import gpu_check
import options
import pytest
import torch

from sdpo_nb.models import load_policy


def rehearsal(tmp_path, *words):
    return ["--device", "cpu", "--small", "--output", str(tmp_path / "check.json"), *words]


def rows(tmp_path):
    found = json.loads((tmp_path / "check.json").read_text())
    return found, {name: part["rows"] for name, part in found["parts"].items()}


def use(monkeypatch, **parts):
    monkeypatch.setattr(gpu_check, "parts", {name: (part, 1.25) for name, part in parts.items()})


def quick(given):
    yield dict(row="one", seconds=1.0)


def slow(given):
    yield dict(row="before", number=2)
    time.sleep(60)


def failing(given):
    raise ValueError("this went wrong\nin two lines")


def missing(given):
    raise gpu_check.NotMeasured("there is none")
    yield


def test_every_part_leaves_rows_whatever_happens_to_it(monkeypatch, tmp_path, capfd):
    use(monkeypatch, quick=quick, slow=slow, failing=failing, missing=missing, skipped=quick)
    gpu_check.main(rehearsal(tmp_path, "--skip", "skipped"))
    found, by_part = rows(tmp_path)
    assert by_part["quick"] == [dict(row="one", seconds=1.0)]
    assert by_part["slow"] == [dict(row="before", number=2), dict(row="the rest", not_measured="out of its 5 seconds")]
    assert by_part["failing"][0]["not_measured"] == "it failed: ValueError: this went wrong"
    assert by_part["missing"][0]["not_measured"] == "there is none"
    assert by_part["skipped"][0]["not_measured"] == "skipped"
    assert found["machine"]["cores"] and {"device", "small", "versions", "seconds", "goals"} <= set(found)
    assert all(goal["measured"] is None for goal in found["goals"]) and "not measured" in capfd.readouterr().out


def test_the_limit_of_all_parts_counts(monkeypatch, tmp_path):
    use(monkeypatch, quick=quick)
    gpu_check.main(rehearsal(tmp_path, "--limit", "1"))
    assert rows(tmp_path)[1]["quick"][0]["not_measured"] == "out of the 1 seconds in all"


def test_rows_of_an_earlier_call_stay_on_the_same_machine(monkeypatch, tmp_path):
    def changing(given):
        yield dict(row="one", seconds=2.0)
        yield dict(row="two", not_measured="no time")

    use(monkeypatch, quick=quick, other=quick)
    gpu_check.main(rehearsal(tmp_path))
    use(monkeypatch, quick=changing, other=quick)
    gpu_check.main(rehearsal(tmp_path, "--parts", "quick"))
    again = dict(row="two", not_measured="no time")
    assert rows(tmp_path)[1] == dict(quick=[dict(row="one", seconds=2.0), again], other=[dict(row="one", seconds=1.0)])
    found = json.loads((tmp_path / "check.json").read_text())
    found["parts"]["other"]["machine"]["device"] = "another GPU"
    found["parts"]["quick"]["machine"]["device"] = "another GPU"
    (tmp_path / "check.json").write_text(json.dumps(found))
    gpu_check.main(rehearsal(tmp_path, "--parts", "quick"))
    assert rows(tmp_path)[1]["other"][0]["not_measured"] == "skipped"
    assert rows(tmp_path)[1]["quick"] == [dict(row="one", seconds=2.0), again]


@pytest.mark.parametrize("text", ["[1, 2]", '{"a": 1}', "{", '{"device": "cuda", "small": true, "parts": {}}', None])
def test_a_file_of_something_else_is_left_alone(tmp_path, capsys, text):
    path = tmp_path / "check.json"
    path.mkdir() if text is None else path.write_text(text)
    with pytest.raises(SystemExit):
        gpu_check.main(rehearsal(tmp_path))
    assert "check.json" in capsys.readouterr().err and (text is None or path.read_text() == text)


def test_goals_are_read_from_the_rows():
    given = gpu_check.arguments(["--device", "cpu", "--small"])
    given.device, given.small = "cuda", False

    def row(pairs, rate, share, **more):
        shares = {"unet sampling": 1 - share, "everything else": share}
        speed = dict(training_steps_per_second=rate, sampling_of_peak=rate / 100, training_of_peak=rate / 200)
        return dict(row="", precision="bf16", micro_batch=pairs, shares=shares, peak_gb=7.5 * pairs, **speed)

    results = {"sd_turbo": dict(rows=[row(1, 20, 0.3), row(32, 60, 0.04), dict(row="x", not_measured="memory")])}
    results["sync"] = dict(rows=[dict(row="sampling", times=0), dict(row="updates", times=3)])
    found = [(goal["measured"], goal["met"]) for goal in gpu_check.judged(results, given)]
    assert found == [(0.6, True), (0.3, False), (0.04, True), (None, None), (7.5, True), (3, False), (None, None)]
    given.small = True
    assert all(goal["measured"] is None for goal in gpu_check.judged(results, given))


def test_a_full_size_on_a_cpu_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_check.arguments(["--device", "cpu"])
    assert "--device cpu would take hours at full size; add --small." in capsys.readouterr().err


def test_parameters_are_filled_and_those_of_two_modules_once():
    with gpu_check.init_empty_weights():
        network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 64))
    network[2].weight = network[0].weight
    gpu_check.fill(network, "cpu", torch.bfloat16)
    assert network[2].weight is network[0].weight and not network[0].weight.requires_grad
    assert network[0].weight.std().item() == pytest.approx(0.125, rel=0.1)  # 1 / √64
    assert network[1].weight.eq(1).all() and network[0].bias.eq(0).all() and network[0].bias.dtype == torch.bfloat16


def test_options_say_why_they_are_not_measured():
    known = options.Option(settings=dict(gradient_checkpointing=True))
    assert options.why_not(known, "cpu") == options.why_not(known, "cuda") == ""
    unknown = options.Option(settings=dict(a_setting_of_the_future=True))
    assert options.why_not(unknown, "cuda") == "the package has no such setting"
    assert options.why_not(options.options["TF32"], "cpu") == "only on a GPU"
    assert options.why_not(options.options["whole denoiser compiled"], "cuda").startswith("only on a CPU")


SMALL = dict(prompts=["a cat", "a dog"], reward="warmth", num_steps=2, pairs_per_epoch=2, pairs_per_update=2)
SMALL |= dict(micro_batch=2, min_count=1, learning_rate=1e-2)


def test_an_option_and_its_absence_take_turns(pipeline):
    row = options.compare(options.options["gradient checkpointing"], partial(load_policy, pipeline), SMALL, 2)
    assert len(row["sampling_ratios"]) == len(row["training_ratios"]) == 2 and row["first_epoch"] > 0
    assert row["log_ratio"] == row["log_ratio_without"] == row["recomputed"] == 0 and row["within_bound"]


def test_a_fused_lora_leaves_the_weights_as_they_were(pipeline, tmp_path):
    policy, option = load_policy(pipeline), options.options["LoRA fused while sampling"]
    trainer = options.build(option, policy, SMALL, tmp_path, True)
    before = {name: weight.clone() for name, weight in policy.denoiser.named_parameters()}
    for weight in trainer.parameters:
        weight.data += 0.1
    trainer.begin_epoch()
    fused, plain = trainer.sample(), type(trainer).sample(trainer)
    for name, weight in policy.denoiser.named_parameters():
        assert torch.equal(weight, before[name]) or "lora" in name
    torch.testing.assert_close(fused.latents, plain.latents, rtol=1e-3, atol=1e-3)
    assert not torch.equal(fused.latents, plain.latents)


def test_the_parts_fit_into_ten_minutes():
    assert sum(limit for _, limit in gpu_check.parts.values()) <= 600


@pytest.mark.parametrize("mode", ["error", "warn"])
def test_what_waits_for_the_gpu_is_counted_by_its_place(monkeypatch, mode):
    modes, found = [], gpu_check.Counter()
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits(x):
        if mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        warnings.warn("called a synchronizing CUDA operation")
        warnings.warn("something else")
        return x

    watched = gpu_check.guarded(waits, mode, found)
    if mode == "error":
        with pytest.raises(RuntimeError):
            watched(1)
    else:
        assert watched(1) == 1
    assert modes == [mode, "default"] and found.total() == 1
    assert ("outside sdpo_nb" if mode == "error" else "test_gpu_check.py:") in next(iter(found))
