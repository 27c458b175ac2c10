"""Every figure draws what it is given, refuses nonsense with a sentence, and the report and the card hold together without any of their parts."""

import base64
import re
from html.parser import HTMLParser
from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image

from sdpo_nb import figures as viz
from sdpo_nb.files import append_jsonl, write_json, write_jsonl

NAN = float("nan")
PANEL = {"mean": [1.0, 2.0], "std": [0.5, 0.5]}
COMPARISON = {
    "steps": [1, 50],
    "n": 16,
    "reward": "taste",
    "sampler": "DDIM, η=1",
    "before": PANEL,
    "after": {"mean": [2.0, 2.5], "std": [0.5, None]},
    "gain": {"mean": [1.0, 0.5], "se": [0.1, None]},
    "agreement": {"before": [0.9, 1.0], "after": [0.5, 0.6]},
    "diversity": {"before": [0.2, 0.3], "after": [0.1, 0.2]},
}
RECORDS = [
    {
        "epoch": epoch,
        "samples": 8 * (epoch + 1),
        "reward_queries": 24 * (epoch + 1),
        "optimizer_steps": 2 * (epoch + 1),
        "reward/mean": epoch / 2.0,
        "reward/std": 1.0,
        "loss": 1.0,
        "diversity": None if epoch == 2 else 0.2,
    }
    for epoch in range(4)
]
CONFIG = {
    "policy": "stabilityai/sd-turbo",
    "recipe": "sdpo",
    "reward": "0.5*a+0.5*<b>",
    "prompts": ["cat", "dog", "bat", "ant"],
    "num_steps": 8,
    "epochs": 4,
    "learning_rate": 1e-4,
    "lora_rank": 4,
    "seed": 1,
}


def drawn(figure):
    "The figure as a picture, to make sure that it can be drawn at all"
    assert isinstance(figure, Figure)
    return Image.open(BytesIO(viz.png_bytes(figure, 60)))


def values(axis):
    "The numbers of the first picture in an axis"
    return axis.get_images()[0].get_array()


@pytest.mark.parametrize(
    "shape", [(1, 3, 32, 32), (2, 3, 16, 16), (10, 3, 512, 512), (50, 3, 32, 32), (3, 3, 64, 96), (4, 10, 3, 32, 32)]
)
def test_film_strip_of_any_size(shape):
    images = torch.rand(shape)
    rewards = torch.rand(shape[:-3])
    anchor = shape[-4] - 1 if len(shape) == 4 else torch.arange(shape[0])
    picture = drawn(viz.film_strip(images, rewards, anchor))
    assert 60 < picture.width < 700 and picture.height < 700
    drawn(viz.film_strip(images))


def test_film_strip_shows_every_anchor_with_its_reward():
    rewards = torch.arange(100.0).view(2, 50)
    axis = viz.film_strip(torch.rand(2, 50, 3, 8, 8), rewards, [17, 31], labels=["a", "b"]).axes[0]
    texts = [text.get_text() for text in axis.texts]
    assert "17.00\nanchor" in texts and "81.00\nanchor" in texts and "17.00" not in texts and "31.00" in texts
    assert len(axis.patches) == 2 and {"step 0", "step 17", "step 31", "step 49"} <= {
        label.get_text() for label in axis.get_xticklabels()
    }


def test_figures_in_notebooks_look_the_same_and_are_smaller():
    strip, curves = (
        viz.film_strip(torch.nn.functional.interpolate(torch.rand(6, 3, 4, 4), 32, mode="bicubic").clamp(0, 1)),
        viz.training_curves(RECORDS),
    )
    for figure in (strip, curves):
        whole, small = viz.png_bytes(figure, 90), figure._repr_png_()
        before, after = (np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int) for png in (whole, small))
        assert before.shape == after.shape and np.abs(before - after).max() <= 4 and len(small) < 0.8 * len(whole)
        assert (after[before.min(-1) == 255] == 255).all()  # white paper stays white


def test_notebooks_show_figures_as_they_are_made_here(monkeypatch):
    "pyplot, once imported, would draw them anew in another size"
    from IPython.core.formatters import DisplayFormatter

    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    figure = viz.training_curves(RECORDS)
    assert DisplayFormatter().format(figure) == ({}, {}) and [picture.data for picture in shown] == [
        figure._repr_png_()
    ]


def test_pixels_arrive_unchanged():
    images = torch.rand(2, 3, 3, 8, 8)
    axis = Figure().subplots()
    x, y = viz.draw_tiles(axis, images)
    canvas = np.asarray(values(axis))
    top, left = int(y[1] - 3.5), int(x[2] - 3.5)
    assert np.allclose(canvas[top : top + 8, left : left + 8], images[1, 2].permute(1, 2, 0)) and canvas[8].min() == 1


def test_half_precision_and_broken_pixels_are_drawn():
    images = torch.rand(3, 3, 8, 8).half().requires_grad_()
    drawn(viz.film_strip(images, [NAN, 1.0, float("inf")]))
    drawn(viz.film_strip(torch.full((2, 3, 8, 8), NAN)))


def test_maps():
    pred_x0 = torch.randn(6, 4, 8, 8)
    axis = viz.similarity_map(pred_x0, 2).axes[0]
    flat = torch.nn.functional.normalize(pred_x0.flatten(1), dim=1)
    assert np.allclose(values(axis), flat @ flat.T, atol=1e-5)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["first (0)", "last (5)", "anchor (2)"]
    table = torch.tensor([[1.0, NAN, -3.0], [0.0, 2.0, NAN]])
    rewards, advantages = viz.reward_map(table).axes[0], viz.advantage_map(table).axes[0]
    assert np.ma.getmaskarray(values(rewards)).tolist() == table.isnan().tolist()
    assert rewards.get_images()[0].get_clim() == (-3, 2) and advantages.get_images()[0].get_clim() == (-3, 3)
    for figure in (
        viz.reward_map(torch.full((1, 1), NAN)),
        viz.advantage_map(torch.zeros(300, 50)),
        viz.similarity_map(pred_x0[:1]),
    ):
        drawn(figure)


def test_anchor_histogram_counts():
    axis = viz.anchor_histogram(torch.tensor([1, 1, 3]), 5).axes[0]
    assert [bar.get_height() for bar in axis.patches] == [0, 2, 0, 1, 0]


def test_figures_can_share_a_page():
    figure = Figure()
    for ax, draw in zip(
        figure.subplots(1, 4),
        [
            lambda ax: viz.similarity_map(torch.randn(3, 2, 2, 2), ax=ax),
            lambda ax: viz.reward_map([[1.0]], ax=ax),
            lambda ax: viz.anchor_histogram([0], 2, ax=ax),
            lambda ax: viz.diversity_curve(COMPARISON, ax=ax),
        ],
    ):
        assert draw(ax) is figure
    drawn(figure)


def test_nothing_is_left_open_in_pyplot():
    before = plt.get_fignums()
    viz.training_curves(RECORDS), viz.step_curves(COMPARISON)
    assert plt.get_fignums() == before


def test_training_curves_of_one_run():
    figure = viz.training_curves(RECORDS, "reward_queries")
    assert [axis.get_title() for axis in figure.axes] == ["mean reward", "diversity", "loss"]
    line = figure.axes[0].lines[0]
    assert line.get_xdata().tolist() == [24, 48, 72, 96] and line.get_ydata().tolist() == [0, 0.5, 1, 1.5]
    drawn(figure)


def test_training_curves_of_several_runs(tmp_path):
    shorter = [record | {"reward/mean": record["reward/mean"] + 1} for record in RECORDS[:3]]
    write_jsonl(tmp_path / "run" / "metrics.jsonl", shorter)
    for second in (shorter, tmp_path / "run", tmp_path / "run" / "metrics.jsonl", str(tmp_path / "run")):
        axis = viz.training_curves({"ours": [RECORDS, second], "theirs": RECORDS}, names=["reward/mean"]).axes[0]
        assert [line.get_label() for line in axis.lines] == ["ours", "theirs"]
        assert axis.lines[0].get_ydata().tolist() == [0.5, 1, 1.5]  # the mean, as far as both go
        low, high = (
            axis.collections[0].get_paths()[0].vertices[:, 1].min(),
            axis.collections[0].get_paths()[0].vertices[:, 1].max(),
        )
        assert (low, high) == (0, 2)


@pytest.mark.parametrize(
    "shape, after",
    [((6, 8, 3, 32, 32), True), ((1, 1, 3, 32, 32), True), ((2, 3, 3, 256, 256), False), ((6, 2, 3, 64, 48), True)],
)
def test_step_grid(shape, after):
    images = torch.rand(shape)
    figure = viz.step_grid(
        images,
        images if after else None,
        [2**index for index in range(shape[0])],
        ["a rather long prompt about a yellow star on a brown background"] * shape[1],
    )
    assert [axis.get_title() for axis in figure.axes] == ["before", "after"][: 1 + after]
    assert drawn(figure).width < 700


def test_step_curves_show_what_was_measured():
    assert len(viz.step_curves(COMPARISON).axes) == 4
    unmeasured = COMPARISON | {
        "agreement": {"before": None, "after": None},
        "diversity": {"before": [None, NAN], "after": [None, None]},
        "after": None,
        "gain": None,
    }
    drawn(viz.step_curves(unmeasured))
    assert len(viz.step_curves(unmeasured).axes) == 1


@pytest.mark.parametrize(
    "draw, sentence",
    [
        (lambda: viz.film_strip(torch.zeros(0, 3, 8, 8)), "images has shape .*at least one"),
        (lambda: viz.film_strip(torch.zeros(2, 4, 8, 8)), "images has shape .*3,H,W"),
        (lambda: viz.film_strip(torch.zeros(2, 3, 8, 8), [1.0]), "rewards has shape"),
        (lambda: viz.film_strip(torch.zeros(2, 3, 8, 8), anchor=5), "anchor is"),
        (lambda: viz.film_strip(torch.zeros(2, 2, 3, 8, 8), anchor=0), "anchor is"),
        (lambda: viz.film_strip(torch.zeros(2, 2, 3, 8, 8), labels=["a"]), "labels are 1 for 2 rows"),
        (lambda: viz.similarity_map(torch.zeros(3, 4, 8, 8), 3), "anchor is 3; give a step from 0 to 2"),
        (lambda: viz.similarity_map(torch.zeros(0, 4, 8, 8)), "pred_x0 has shape"),
        (lambda: viz.reward_map(torch.zeros(3)), "values has shape"),
        (lambda: viz.reward_map([]), "values has shape"),
        (lambda: viz.advantage_map(torch.zeros(3, 0)), "values has shape"),
        (lambda: viz.anchor_histogram([], 3), "anchors has shape"),
        (lambda: viz.anchor_histogram([3], 3), "anchors run"),
        (lambda: viz.anchor_histogram([1, NAN], 3), "anchors run from nan"),
        (lambda: viz.anchor_histogram([1, 1.5], 3), "give whole steps"),
        (lambda: viz.training_curves([]), "no epoch yet"),
        (lambda: viz.training_curves({}), "no epoch yet"),
        (lambda: viz.training_curves([RECORDS, []]), "no epoch yet"),
        (lambda: viz.training_curves([1, 2]), "something else than records"),
        (lambda: viz.training_curves([{"epoch": 1, "loss": 1.0}]), "x is 'samples', which the metrics do not hold"),
        (lambda: viz.training_curves([{"samples": 1, "reward/mean": NAN}]), "none of reward/mean"),
        (lambda: viz.training_curves(RECORDS, "time"), "x is 'time'"),
        (lambda: viz.training_curves(RECORDS, names=["kl"]), "none of kl"),
        (lambda: viz.step_grid(torch.zeros(2, 1, 3, 8, 8), None, [1], ["a"]), "1 step counts"),
        (lambda: viz.step_grid(torch.zeros(1, 1, 3, 8, 8), torch.zeros(1, 2, 3, 8, 8), [1], ["a"]), "after has shape"),
        (lambda: viz.step_grid(torch.zeros(0, 1, 3, 8, 8), None, [], ["a"]), "before has shape"),
        (lambda: viz.step_grid(torch.zeros(1, 1, 3, 8, 8), torch.zeros(0, 1, 3, 8, 8), [1], ["a"]), "after has shape"),
        (lambda: viz.diversity_curve({"steps": [1]}), "diversity was not measured"),
        (lambda: viz.diversity_curve({}), "diversity was not measured"),
        (lambda: viz.step_curves({}), "the comparison lacks steps"),
        (lambda: viz.step_curves({"steps": [1], "n": 1, "reward": "x", "after": PANEL}), "the comparison lacks before"),
        (lambda: viz.save_figure(Figure(), "figure.pdf"), "PNG"),
    ],
)
def test_nonsense_is_refused_with_a_sentence(draw, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        draw()
    assert "\n" not in str(error.value)


IMAGE, LATENT = torch.rand(1, 3, 8, 8), torch.randn(1, 4, 8, 8)
ONE_STEP = {"steps": [1], "n": 2, "reward": "x", "before": {"mean": [1.0], "std": [0.1]}, "after": None}


@pytest.mark.parametrize(
    "draw",
    [
        lambda: viz.film_strip(IMAGE),
        lambda: viz.film_strip(IMAGE, [NAN], 0),
        lambda: viz.similarity_map(LATENT, 0),
        lambda: viz.reward_map([[1.0]]),
        lambda: viz.advantage_map([[0.0]]),
        lambda: viz.anchor_histogram([0], 1),
        lambda: viz.training_curves(RECORDS[:1]),
        lambda: viz.step_grid(IMAGE[None], None, [1], ["a"]),
        lambda: viz.diversity_curve(ONE_STEP | {"diversity": {"before": [0.1], "after": None}}),
        lambda: viz.step_curves(ONE_STEP),
    ],
    ids=range(10),
)
def test_one_step_and_no_policy_after_are_drawn(draw):
    drawn(draw())


@pytest.mark.parametrize(
    "draw",
    [
        lambda: viz.film_strip(IMAGE * NAN, [NAN]),
        lambda: viz.similarity_map(LATENT.expand(3, -1, -1, -1) * NAN, 1),
        lambda: viz.reward_map([[NAN, NAN]]),
        lambda: viz.reward_map([[NAN, 1.0, float("inf")]]),
        lambda: viz.advantage_map([[NAN, -1.0]]),
        lambda: viz.training_curves([*RECORDS, {"samples": 40, "reward/mean": NAN}]),
        lambda: viz.training_curves([RECORDS, [record | {"reward/std": NAN} for record in RECORDS]]),
        lambda: viz.step_grid(IMAGE[None] * NAN, IMAGE[None], [1], ["a"]),
        lambda: viz.diversity_curve(COMPARISON | {"diversity": {"before": [0.1, NAN], "after": [None, 0.2]}}),
        lambda: viz.step_curves(
            COMPARISON
            | {"before": {"mean": [NAN, 1.0], "std": [NAN, None]}, "gain": {"mean": [NAN, 1.0], "se": [NAN, 0.1]}}
        ),
    ],
    ids=range(10),
)
def test_numbers_that_are_missing_leave_a_gap(draw):
    drawn(draw())


def test_what_is_not_a_number_is_hatched_and_the_rest_is_shown():
    latents = torch.randn(4, 2, 3, 3)
    latents[2] = NAN
    axis = viz.similarity_map(latents).axes[0]
    masked = np.ma.getmaskarray(values(axis))
    assert masked[2].all() and masked[:, 2].all() and masked.sum() == 7 and axis.patch.get_hatch()


def test_shares_and_distances_start_at_zero():
    figure = viz.training_curves(
        [record | {"clip_fraction": 0.0} for record in RECORDS], names=["diversity", "clip_fraction", "loss"]
    )
    assert [axis.get_ylim()[0] == 0 for axis in figure.axes] == [True, True, False]
    assert all(axis.get_ylim()[1] > 0 for axis in figure.axes)


@pytest.fixture
def run_folder(tmp_path):
    "What a trainer leaves behind"
    folder = tmp_path / "my & run"
    write_json(folder / "config.json", CONFIG)
    write_jsonl(folder / "metrics.jsonl", RECORDS)
    write_json(
        folder / "evaluation.json",
        COMPARISON | {"own_scheduler": COMPARISON | {"n": 8, "sampler": "EulerDiscreteScheduler"}},
    )
    for name in ("step_grid", "a_thing_of_mine"):
        viz.save_figure(viz.reward_map([[1.0]]), folder / "pictures" / f"{name}.png")
    return folder


class Page(HTMLParser):
    "Checks that tags are balanced, and collects what the page loads"

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.images = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loads += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_whole_and_self_contained(run_folder):
    path = viz.write_report(run_folder)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert (
        path == run_folder / "report.html"
        and "Not available" not in text
        and "my &amp; run" in text
        and "&lt;b&gt;" in text
        and "<b>" not in text
    )
    assert (
        len(page.images) == 5
        and all(image["alt"] for image in page.images)
        and all(load.startswith("data:image/png;base64,") for load in page.loads)
    )
    for load in page.loads:
        Image.open(BytesIO(base64.b64decode(load.split(",")[1]))).verify()
    assert not re.search(r"url\(|@import|<script|<link", text) and "prefers-color-scheme" in text
    assert (
        text.index("Before and after at every step count") < text.index("A thing of mine")
        and "EulerDiscreteScheduler" in text
    )
    assert "+1.000 at 1" in text and "from 0.000 to 1.500" in text and "learning_rate" in text
    assert not list(run_folder.glob(".report*"))


@pytest.mark.parametrize("part", ["config.json", "metrics.jsonl", "evaluation.json", "pictures"])
@pytest.mark.parametrize("damage", ["missing", "broken", "empty"])
def test_report_does_without_any_part(run_folder, part, damage):
    path = run_folder / part
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
    elif damage == "missing":
        path.unlink()
    else:
        path.write_text('{"a": \n' if damage == "broken" else "{}" if path.suffix == ".json" else "")
    text = viz.write_report(run_folder).read_text(encoding="utf-8")
    Page(text)
    assert text.count("Not available") == (0 if (part, damage) == ("config.json", "empty") else 1)


def test_report_of_a_run_that_has_just_begun(tmp_path):
    append_jsonl(tmp_path / "metrics.jsonl", RECORDS[0])
    assert viz.write_report(tmp_path).read_text().count("Not available") == 3
    with pytest.raises(FileNotFoundError, match="no run folder"):
        viz.write_report(tmp_path / "nowhere")


def test_model_card(run_folder):
    card = viz.model_card(run_folder)
    header, body = card.removeprefix("---\n").split("\n---\n", 1)
    header = yaml.safe_load(header)
    assert (
        header["base_model"] == "stabilityai/sd-turbo"
        and header["library_name"] == "diffusers"
        and "lora" in header["tags"]
    )
    code = re.search(r"```python\n(.*?)```", body, flags=re.DOTALL)[1]
    compile(code, "card", "exec")
    assert (
        "from_pretrained('stabilityai/sd-turbo')" in code
        and 'load_lora_weights("lora")' in code
        and "num_inference_steps=8" in code
    )
    assert (
        "| prompts | cat, dog, bat, … (4 in all) |" in body
        and "| steps | before | after |" in body
        and "+1.000 ± 0.100" in body
        and "EulerDiscreteScheduler" in body
        and "licence" in body
    )


def test_model_card_of_the_embedded_policy_without_evaluation(tmp_path):
    write_json(tmp_path / "config.json", CONFIG | {"policy": "tiny"})
    card = viz.model_card(tmp_path)
    assert "base_model" not in card and 'policy_folder("tiny")' in card and "has not been evaluated" in card
    with pytest.raises(FileNotFoundError):
        viz.model_card(tmp_path / "nowhere")
    write_json(tmp_path / "config.json", {"policy": "tiny"})
    with pytest.raises(ValueError, match="lacks recipe; give the folder of a run"):
        viz.model_card(tmp_path)
