"""The trajectory explorer without a browser: what is sampled, what is kept, what is given up and what is refused."""

import ast
import asyncio
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jupyter_client.manager import start_new_kernel

from sdpo_nb import widget as module
from sdpo_nb.dense import interpolate_rewards, select_anchor
from sdpo_nb.explorer import (
    _chart_height,
    _chart_left,
    _chart_points,
    _chart_width,
    _latent_picture,
    _look_at_rewards,
    _sample_slices,
    _static_data,
    explore,
    explore_slices,
    finish,
    save_explorer,
    static_explorer,
    step_html,
)
from sdpo_nb.models import load_policy
from sdpo_nb.widget import TrajectoryExplorer

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["a red circle", "a blue square", "a cat"]


def brightness(images, prompts):
    "A reward without any weights"
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def folder(random_folder):
    "A random pipeline on disk"
    return random_folder()


@pytest.fixture
def plain(folder):
    "A policy without a LoRA"
    return load_policy(folder, device="cpu")


@pytest.fixture
def policy(plain):
    "A policy with a LoRA that changes what it predicts"
    plain.add_lora(rank=2)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in plain.trainable_parameters().items():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    return plain


@pytest.fixture(scope="module")
def explored(folder):
    "A trajectory of five steps"
    return explore(load_policy(folder, device="cpu"), brightness, "a cat", seed=2, num_steps=5, when="before")


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_trajectory_ends_where_the_policy_samples(policy, num_steps):
    latents, pred_x0, timesteps = finish(_sample_slices(policy, "a cat", 7, num_steps, "after"))
    assert latents.shape[0] == num_steps + 1 and pred_x0.shape[0] == len(timesteps) == num_steps
    torch.testing.assert_close(latents[-1:], policy.sample(["a cat"], num_steps, seeds=[7], return_latents=True))


def test_no_pause_leaves_the_policy_changed(policy):
    noise = torch.randn(1, *policy.latent_shape)

    def predict():
        with torch.no_grad():
            return policy.predict(noise, 500, policy.embed(["a cat"]))

    wanted = predict()
    for _ in explore_slices(policy, brightness, "a cat", 0, 3, "before"):
        assert torch.equal(predict(), wanted) and torch.is_grad_enabled()
    assert all(parameter.requires_grad for parameter in policy.trainable_parameters().values())


def test_rewards_are_those_of_the_decoded_clean_latents(policy):
    explored = explore(policy, brightness, "a cat", seed=4, num_steps=6)
    pred_x0 = finish(_sample_slices(policy, "a cat", 4, 6, "after"))[1]
    rewards = brightness(policy.decode(pred_x0), None)
    anchor = select_anchor(pred_x0[None])
    assert explored.anchor == anchor.item()
    assert explored.true_rewards == pytest.approx(rewards.tolist(), abs=1e-6)
    dense = interpolate_rewards(pred_x0[None], anchor, rewards[[0, anchor.item(), 5]][None])[0]
    assert explored.dense_rewards == pytest.approx(dense.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (dict(num_steps=0), "num_steps is 0; give a whole number from 1 to 1000"),
        (dict(num_steps=1001), "num_steps is 1001"),
        (dict(num_steps=2.0), "num_steps is 2.0"),
        (dict(num_steps=True), "num_steps is True"),
        (dict(seed="x"), "seed='x'"),
        (dict(prompt=None), "prompt=None must be a string"),
        (dict(when="after"), "has no LoRA"),
    ],
)
def test_impossible_requests_are_refused_with_a_sentence(plain, wrong, sentence):
    request = dict(prompt="a cat", when="before") | wrong
    with pytest.raises(ValueError, match=re.escape(sentence)):
        explore(plain, brightness, **request)


@pytest.mark.parametrize("prompts", [[], "a cat", [1], ["a cat", None]])
def test_explorer_needs_prompts(plain, prompts):
    with pytest.raises(ValueError, match="must be a list with at least one string"):
        TrajectoryExplorer(plain, brightness, prompts)


def test_explorer_refuses_what_it_cannot_start_with(plain):
    with pytest.raises(ValueError, match="num_steps is 0"):
        TrajectoryExplorer(plain, brightness, PROMPTS, num_steps=0)
    with pytest.raises(ValueError, match="has no LoRA"):
        TrajectoryExplorer(plain, brightness, PROMPTS, when="after")
    with pytest.raises(ValueError, match="cache_size=0"):
        TrajectoryExplorer(plain, brightness, PROMPTS, cache_size=0)
    with pytest.raises(ValueError, match="'no_such' is not known"):
        TrajectoryExplorer(plain, "no_such", PROMPTS)
    with pytest.raises(ValueError, match="squeeze or average"):
        TrajectoryExplorer(plain, lambda images, prompts: images, PROMPTS)


@pytest.mark.parametrize(
    "broken, word", [(torch.nan, "not a number"), (torch.inf, "infinite"), (-torch.inf, "minus infinite")]
)
def test_broken_rewards_are_shown_in_words(plain, broken, word):
    def reward(images, prompts):
        return torch.full((len(images),), broken)

    explorer = TrajectoryExplorer(plain, reward, PROMPTS, num_steps=3)
    assert f">{word}</td>" in explorer.view.value
    assert "not a number" in static_explorer([explorer.explored]) or word != "not a number"


def test_one_broken_reward_does_not_hide_the_others(plain):
    def reward(images, prompts):
        return torch.where(torch.arange(len(images)) == 1, torch.nan, brightness(images, prompts))

    explored = explore(plain, reward, "a cat", num_steps=4, when="before")
    assert [value != value for value in explored.true_rewards] == [False, True, False, False]
    for step in range(4):
        assert "nan" not in re.sub(r'src="[^"]*"', "", step_html(explored, step))


@pytest.mark.parametrize("form", [list, lambda scores: scores.numpy(), lambda scores: scores[:, None]], ids=range(3))
def test_rewards_answer_in_any_form(plain, form):
    "As in training: a list, an array, a column; what is broken is still shown"

    def reward(images, prompts):
        return form(torch.where(torch.arange(len(images)) == 1, torch.nan, brightness(images, prompts)))

    explored = explore(plain, reward, "a cat", num_steps=3, when="before")
    assert [value != value for value in explored.true_rewards] == [False, True, False]


def test_the_explorer_of_its_chapter_is_left_to_the_reader():
    "After `run all` it shows what it showed at first: the checks below it drive another one"
    cells = json.loads((ROOT / "nbs/35_widget.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (shown,) = [number for number, source in enumerate(sources) if source.endswith("\nexplorer")]
    assert not [source for source in sources[shown + 1 :] if re.search(r"\bexplorer\.(?!static_html)", source)]


def test_pictures_that_are_not_finite_are_not_scored():
    images = torch.full((2, 3, 4, 4), 0.5)
    images[0, 0, 0, 0] = torch.nan
    seen = []

    def reward(images, prompts):
        seen.extend(prompts)
        return brightness(images, prompts)

    scores = _look_at_rewards(reward, images, ["one", "two"])
    assert scores[0].isnan() and scores[1] == 0.5 and seen == ["two"]
    assert _look_at_rewards(reward, images[:1], ["one"]).isnan().all() and seen == ["two"]


def test_chart_stays_inside_and_skips_what_is_not_finite():
    points = _chart_points([0.0, float("nan"), 2.0, float("inf")], 0.0, 2.0)
    assert points[1] is None and points[3] is None
    assert all(0 <= x <= _chart_width and 0 <= y <= _chart_height for x, y in filter(None, points))
    assert points[0][1] > points[2][1]  # more is higher
    assert _chart_points([3.0], 3.0, 3.0)[0][0] == _chart_left


@pytest.mark.parametrize("channels, tiles", [(1, (1, 1)), (3, (2, 2)), (4, (2, 2)), (5, (2, 3)), (16, (4, 4))])
def test_latent_channels_become_tiles(channels, tiles):
    picture = _latent_picture(torch.zeros(channels, 2, 2))
    assert picture.shape == (3, 2 * tiles[0], 2 * tiles[1]) and (picture > 0.9).all()


def test_every_picture_has_words(explored):
    for step in range(len(explored)):
        alts = re.findall(r'<img alt="([^"]*)"', step_html(explored, step))
        assert (
            len(alts) == 4 and all(f"step {step}" in alt for alt in alts[:3]) and f"step {explored.anchor}" in alts[3]
        )


def test_prompts_cannot_become_markup(explored):
    hostile = replace(explored, prompt='</script><script>alert(1)</script>"<b>')
    page = static_explorer([hostile]) + step_html(hostile, 0)
    assert page.count("</script>") == 1 and '<b>"' not in page and "alert(1)<" not in page


def test_static_explorer_holds_every_step_and_each_picture_once(explored):
    data = _static_data([explored, explored])
    assert [len(frames) for frames in data["trajectories"]] == [5, 5]
    assert (
        len(set(data["pictures"]))
        == len(data["pictures"])
        == len({png for pngs in explored.pictures.values() for png in pngs})
    )
    page = static_explorer([explored])
    assert page.isascii() and not re.search(r'(?:src|href)="(?!data:)', page)
    assert json.loads(re.search(r"const data = (\{.*\});\n", page)[1])["trajectories"][0][4]["name"].startswith(
        "step 4 of 0 to 4"
    )
    assert static_explorer([explored]) == page != static_explorer([explored, explored])


def test_static_explorer_needs_a_trajectory(tmp_path):
    with pytest.raises(ValueError, match="trajectories is empty"):
        save_explorer([], tmp_path / "empty.html")
    assert not (tmp_path / "empty.html").exists()


def test_a_single_trajectory_and_a_step_that_is_not_there(explored):
    with pytest.raises(ValueError, match="trajectories is a single one: give a list"):
        static_explorer(explored)
    for step in (-1, 5):
        with pytest.raises(ValueError, match=f"step={step} of a trajectory of 5: choose one from 0 to 4"):
            step_html(explored, step)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_page_of_one_or_two_steps_without_a_policy_after(plain, num_steps):
    only = explore(
        plain, lambda images, prompts: images.mean((1, 2, 3)) * torch.nan, "a cat", num_steps=num_steps, when="before"
    )
    assert len(only) == num_steps and ">not a number</td>" in step_html(only, num_steps - 1)
    data = _static_data([only])
    assert [len(frames) for frames in data["trajectories"]] == [
        num_steps
    ] and f'max="{num_steps - 1}"' in static_explorer([only])


def test_saved_page_is_light_and_dark(explored, tmp_path):
    page = save_explorer([explored], tmp_path / "explorer.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "color-scheme:light dark" in page and '<html lang="en">' in page


def test_step_slider_only_looks_up(policy, monkeypatch):
    explorer = TrajectoryExplorer(policy, brightness, PROMPTS, num_steps=4)
    monkeypatch.setattr(policy, "predict", None)
    shown = []
    for step in range(4):
        explorer.controls["step"].value = step
        shown.append(explorer.view.value)
    assert len(set(shown)) == 4 and len(explorer.cache) == 1


def test_choices_show_what_they_say(policy):
    explorer = TrajectoryExplorer(policy, brightness, PROMPTS, num_steps=3)
    for name, value in dict(prompt=PROMPTS[1], seed=5, num_steps=6, when="before").items():
        explorer.controls[name].value = value
        assert explorer.message.value == ""
    explored = explorer.explored
    assert (explored.prompt, explored.seed, len(explored), explored.when) == (PROMPTS[1], 5, 6, "before")
    assert explorer.controls["step"].max == explorer.controls["play"].max == 5
    assert (
        explored.true_rewards
        == explore(policy, brightness, PROMPTS[1], seed=5, num_steps=6, when="before").true_rewards
    )


def test_known_trajectories_are_not_sampled_again_and_old_ones_are_forgotten(policy, monkeypatch):
    sampled = []
    monkeypatch.setattr(
        module,
        "explore_slices",
        lambda policy, reward, *key, eta: sampled.append(key[0]) or explore_slices(policy, reward, *key, eta=eta),
    )
    explorer = TrajectoryExplorer(policy, brightness, PROMPTS, num_steps=2, cache_size=2)
    for index in (1, 0, 2, 0, 1):
        explorer.controls["prompt"].value = PROMPTS[index]
    assert sampled == [PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[1]]
    assert len(explorer.cache) == 2 and explorer.explored.prompt == PROMPTS[1]


def test_repeated_prompts_are_offered_once(plain):
    explorer = TrajectoryExplorer(plain, brightness, ["a cat", "", "a cat"], num_steps=1)
    assert explorer.controls["prompt"].options == (("a cat", "a cat"), ("(empty prompt)", ""))


def test_a_newer_request_supersedes_an_older_one(policy):
    predictions = []
    predict = policy.predict

    async def session():
        explorer = TrajectoryExplorer(policy, brightness, PROMPTS, num_steps=20)
        policy.predict = lambda *arguments: predictions.append(1) or predict(*arguments)
        explorer.controls["seed"].value = 1
        first = explorer._task
        while len(predictions) < 3:
            await asyncio.sleep(0)
        explorer.controls["seed"].value = 2
        await asyncio.gather(first, explorer._task)
        return explorer

    explorer = asyncio.run(session())
    assert explorer.explored.seed == 2 and [explored.seed for explored in explorer.cache.values()] == [0, 2]
    assert 23 <= len(predictions) < 30  # the first request stopped early


KERNEL = """
import time
from sdpo_nb.widget import TrajectoryExplorer
from sdpo_nb.models import load_policy

policy = load_policy({folder!r}, device='cpu')
explorer = TrajectoryExplorer(policy, lambda images, prompts: images.mean((1, 2, 3)), ['a cat'], num_steps=50)
predict, calls = policy.predict, []

def watched(*arguments):
    seed = explorer.controls['seed'].value
    calls.append(seed)
    time.sleep(.1*(seed == 1))   # the first request takes its time
    return predict(*arguments)

policy.predict = watched
"""


@pytest.mark.slow
def test_a_kernel_hears_of_a_newer_request_while_it_samples(folder):
    manager, client = start_new_kernel(kernel_name="python3", env=os.environ | dict(PYTHONPATH=str(ROOT)))

    def ask(expression, code=""):
        reply = client.execute(code, user_expressions=dict(answer=expression), reply=True, timeout=60)["content"]
        assert reply["status"] == "ok", reply
        return ast.literal_eval(reply["user_expressions"]["answer"]["data"]["text/plain"])

    def choose(seed):  # as a browser does
        state = dict(comm_id=widget, data=dict(method="update", state=dict(value=seed), buffer_paths=[]))
        client.shell_channel.send(client.session.msg("comm_msg", state))

    try:
        widget = ask("explorer.controls['seed'].model_id", KERNEL.format(folder=str(folder)))
        choose(1)
        while not ask("calls.count(1)"):
            pass
        choose(2)
        while ask("explorer.explored.seed") != 2:
            pass
        assert 0 < ask("calls.count(1)") < 50 == ask("calls.count(2)")
        assert ask("[explored.seed for explored in explorer.cache.values()]") == [0, 2]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_known_trajectory_supersedes_one_being_sampled(policy):
    async def session():
        explorer = TrajectoryExplorer(policy, brightness, PROMPTS, num_steps=5)
        explorer.controls["seed"].value = 1
        await asyncio.sleep(0)
        assert "sampling, step 1 of 5" in explorer.message.value
        explorer.controls["seed"].value = 0
        await explorer._task
        return explorer

    explorer = asyncio.run(session())
    assert explorer.explored.seed == 0 and explorer.message.value == "" and len(explorer.cache) == 1


def test_a_superseded_request_cannot_report_its_error(policy):
    def reward(images, prompts):
        if prompts[0] == PROMPTS[1]:
            raise RuntimeError("out of luck")
        return brightness(images, prompts)

    async def session(last):
        explorer = TrajectoryExplorer(policy, reward, PROMPTS, num_steps=2)
        for prompt in (PROMPTS[1], last):
            explorer.controls["prompt"].value = prompt
            task = explorer._task
        await task
        return explorer

    assert asyncio.run(session(PROMPTS[2])).message.value == ""
    failed = asyncio.run(session(PROMPTS[1]))
    assert "out of luck" in failed.message.value and failed.explored is None and failed.view.value == ""


def test_a_single_step_switches_the_slider_off(policy):
    explorer = TrajectoryExplorer(policy, brightness, PROMPTS, num_steps=4)
    explorer.controls["step"].value = 3
    explorer.controls["num_steps"].value = 1
    assert (
        explorer.controls["step"].disabled
        and explorer.controls["play"].disabled
        and 'data-step="0"' in explorer.view.value
    )
    explorer.controls["num_steps"].value = 2
    assert not explorer.controls["step"].disabled and explorer.controls["step"].max == 1


def test_without_a_lora_there_is_a_note_until_there_is_one(plain):
    explorer = TrajectoryExplorer(plain, brightness, PROMPTS, num_steps=2)
    assert (
        explorer.controls["when"].disabled
        and explorer.controls["when"].value == "before"
        and "has no LoRA" in explorer.message.value
    )
    plain.add_lora(rank=2)
    explorer.refresh()
    assert not explorer.controls["when"].disabled and explorer.message.value == ""
    explorer.controls["when"].value = "after"
    assert explorer.explored.when == "after"
    plain.remove_lora()
    explorer.controls["seed"].value = 1
    assert "has no LoRA" in explorer.message.value and explorer.explored is None
    explorer.refresh()
    assert explorer.controls["when"].value == explorer.explored.when == "before" and explorer.controls["when"].disabled


def test_refresh_sees_a_changed_policy(policy):
    explorer = TrajectoryExplorer(policy, brightness, PROMPTS, num_steps=3)
    before = explorer.explored.true_rewards
    for parameter in policy.trainable_parameters().values():
        parameter.data.mul_(2)
    explorer.refresh()
    assert explorer.explored.true_rewards != before and len(explorer.cache) == 1


def test_static_html_holds_what_was_seen(policy):
    explorer = TrajectoryExplorer(policy, brightness, PROMPTS, num_steps=2)
    explorer.controls["prompt"].value = PROMPTS[1]
    assert (
        explorer.static_html() == static_explorer(explorer.cache.values())
        and explorer.static_html().count("<option>") == 2
    )
