"""Every figure draws what it is given, and refuses nonsense with a sentence."""

import warnings
from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from sample_records import COMPARISON, PANEL, RECORDS

from sdpo_nb import drawing, figures
from sdpo_nb.files import write_jsonl

NAN = float("nan")


def drawn(figure):
    "The figure as a picture, to make sure that it can be drawn at all"
    assert isinstance(figure, Figure)
    return Image.open(BytesIO(drawing.png_bytes(figure, 60)))


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
    picture = drawn(figures.film_strip(images, rewards, anchor))
    assert 60 < picture.width < 700 and picture.height < 700
    drawn(figures.film_strip(images))


def test_film_strip_shows_every_anchor_with_its_reward():
    rewards = torch.arange(100.0).view(2, 50)
    axis = figures.film_strip(torch.rand(2, 50, 3, 8, 8), rewards, [17, 31], labels=["a", "b"]).axes[0]
    texts = [text.get_text() for text in axis.texts]
    assert "17.00\nanchor" in texts and "81.00\nanchor" in texts and "17.00" not in texts and "31.00" in texts
    assert len(axis.patches) == 2 and {"step 0", "step 17", "step 31", "step 49"} <= {
        label.get_text() for label in axis.get_xticklabels()
    }


def test_figures_in_notebooks_look_the_same_and_are_sharp_and_small():
    strip, curves = (
        figures.film_strip(torch.nn.functional.interpolate(torch.rand(6, 3, 4, 4), 32, mode="bicubic").clamp(0, 1)),
        figures.training_curves(RECORDS),
    )
    for figure in (strip, curves):
        whole, (small, shown) = drawing.png_bytes(figure, 180), drawing.notebook_png(figure)
        before, after = (np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int) for png in (whole, small))
        assert before.shape == after.shape and np.abs(before - after).max() <= 4 and len(small) < 0.8 * len(whole)
        assert (after[before.min(-1) == 255] == 255).all()  # white paper stays white
        assert shown == dict(width=after.shape[1] // 2, height=after.shape[0] // 2)


def test_notebooks_show_figures_as_they_are_made_here(monkeypatch):
    "pyplot, once imported, would draw them anew in another size"
    from IPython.core.formatters import DisplayFormatter

    displayed = []
    monkeypatch.setattr("IPython.display.display", displayed.append)
    figure = figures.training_curves(RECORDS)
    file, shown = drawing.notebook_png(figure)
    assert DisplayFormatter().format(figure) == ({}, {}) and len(displayed) == 1
    assert displayed[0]._repr_mimebundle_()[1] == {"image/png": shown} and displayed[0].data == file


def test_pyplot_is_sharp_in_a_notebook_and_untouched_elsewhere(monkeypatch):
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.core.pylabtools import select_figure_formats

    shell, displayed = InteractiveShell(), []
    monkeypatch.setattr("IPython.display.display", displayed.append)
    monkeypatch.setattr("IPython.get_ipython", lambda: None)
    with plt.rc_context():
        drawing.sharp_figures(60)
        figure = plt.figure(figsize=(2, 1))
        figure.add_subplot().plot([1, 2])
        assert figure.dpi == 60 and shell.display_formatter.format(figure)[0] and not displayed
        monkeypatch.setattr("IPython.get_ipython", lambda: shell)
        drawing.sharp_figures(60)
        select_figure_formats(shell, {"png"})  # as pyplot does with the first figure, later than this
        shell.display_formatter.format(figure)
        shell.display_formatter.format(figures.advantage_map([[1.0, -1.0]]))
    plt.close(figure)
    (wide, own), sizes = displayed, [picture._repr_mimebundle_()[1]["image/png"] for picture in displayed]
    for picture, size in zip((wide, own), sizes):
        assert size["width"] == Image.open(BytesIO(picture.data)).width // 2
    assert 100 < sizes[0]["width"] < 140 and 460 < sizes[1]["width"] < 540  # 2 inches of 60, 5.6 of 90


def test_a_figure_keeps_its_ground():
    with plt.style.context("dark_background"):
        dark = drawing.png_bytes(plt.figure(figsize=(1, 1)), 20)
    clear = drawing.png_bytes(Figure(figsize=(1, 1), facecolor=(0, 0, 0, 0)), 20)
    plt.close("all")
    corners = [Image.open(BytesIO(file)).convert("RGB").getpixel((0, 0)) for file in (dark, clear)]
    assert corners == [(0, 0, 0), (255, 255, 255)]


def test_pixels_arrive_unchanged():
    images = torch.rand(2, 3, 3, 8, 8)
    axis = Figure().subplots()
    x, y = figures._draw_tiles(axis, images)
    canvas = np.asarray(values(axis))
    top, left = int(y[1] - 3.5), int(x[2] - 3.5)
    assert np.allclose(canvas[top : top + 8, left : left + 8], images[1, 2].permute(1, 2, 0)) and canvas[8].min() == 1


def test_half_precision_and_broken_pixels_are_drawn():
    images = torch.rand(3, 3, 8, 8).half().requires_grad_()
    drawn(figures.film_strip(images, [NAN, 1.0, float("inf")]))
    drawn(figures.film_strip(torch.full((2, 3, 8, 8), NAN)))


def test_maps():
    pred_x0 = torch.randn(6, 4, 8, 8)
    axis = figures.similarity_map(pred_x0, 2).axes[0]
    flat = torch.nn.functional.normalize(pred_x0.flatten(1), dim=1)
    assert np.allclose(values(axis), flat @ flat.T, atol=1e-5)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["first (0)", "last (5)", "anchor (2)"]
    table = torch.tensor([[1.0, NAN, -3.0], [0.0, 2.0, NAN]])
    rewards, advantages = figures.reward_map(table).axes[0], figures.advantage_map(table).axes[0]
    assert np.ma.getmaskarray(values(rewards)).tolist() == table.isnan().tolist()
    assert rewards.get_images()[0].get_clim() == (-3, 2) and advantages.get_images()[0].get_clim() == (-3, 3)
    for figure in (
        figures.reward_map(torch.full((1, 1), NAN)),
        figures.advantage_map(torch.zeros(300, 50)),
        figures.similarity_map(pred_x0[:1]),
    ):
        drawn(figure)


def test_anchor_histogram_counts():
    axis = figures.anchor_histogram(torch.tensor([1, 1, 3]), 5).axes[0]
    assert [bar.get_height() for bar in axis.patches] == [0, 2, 0, 1, 0]


def test_figures_can_share_a_page():
    figure = Figure()
    for ax, draw in zip(
        figure.subplots(1, 4),
        [
            lambda ax: figures.similarity_map(torch.randn(3, 2, 2, 2), ax=ax),
            lambda ax: figures.reward_map([[1.0]], ax=ax),
            lambda ax: figures.anchor_histogram([0], 2, ax=ax),
            lambda ax: figures.diversity_curve(COMPARISON, ax=ax),
        ],
    ):
        assert draw(ax) is figure
    drawn(figure)


def test_nothing_is_left_open_in_pyplot():
    before = plt.get_fignums()
    figures.training_curves(RECORDS), figures.step_curves(COMPARISON)
    assert plt.get_fignums() == before


def test_training_curves_of_one_run():
    figure = figures.training_curves(RECORDS, "reward_queries")
    assert [axis.get_title() for axis in figure.axes] == ["mean reward", "diversity", "loss"]
    line = figure.axes[0].lines[0]
    assert line.get_xdata().tolist() == [24, 48, 72, 96] and line.get_ydata().tolist() == [0, 0.5, 1, 1.5]
    drawn(figure)


def test_training_curves_of_several_runs(tmp_path):
    shorter = [record | {"reward/mean": record["reward/mean"] + 1} for record in RECORDS[:3]]
    write_jsonl(tmp_path / "run" / "metrics.jsonl", shorter)
    for second in (shorter, tmp_path / "run", tmp_path / "run" / "metrics.jsonl", str(tmp_path / "run")):
        axis = figures.training_curves({"ours": [RECORDS, second], "theirs": RECORDS}, names=["reward/mean"]).axes[0]
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
    figure = figures.step_grid(
        images,
        images if after else None,
        [2**index for index in range(shape[0])],
        ["a rather long prompt about a yellow star on a brown background"] * shape[1],
    )
    assert [axis.get_title() for axis in figure.axes] == ["before", "after"][: 1 + after]
    assert drawn(figure).width < 700


def test_step_curves_show_what_was_measured():
    assert len(figures.step_curves(COMPARISON).axes) == 4
    unmeasured = COMPARISON | {
        "agreement": {"before": None, "after": None},
        "diversity": {"before": [None, NAN], "after": [None, None]},
        "after": None,
        "gain": None,
    }
    drawn(figures.step_curves(unmeasured))
    assert len(figures.step_curves(unmeasured).axes) == 1


@pytest.mark.parametrize(
    "draw, sentence",
    [
        (lambda: figures.film_strip(torch.zeros(0, 3, 8, 8)), "images has shape .*at least one"),
        (lambda: figures.film_strip(torch.zeros(2, 4, 8, 8)), "images has shape .*3,H,W"),
        (lambda: figures.film_strip(torch.zeros(2, 3, 8, 8), [1.0]), "rewards has shape"),
        (lambda: figures.film_strip(torch.zeros(2, 3, 8, 8), anchor=5), "anchor is"),
        (lambda: figures.film_strip(torch.zeros(2, 2, 3, 8, 8), anchor=0), "anchor is"),
        (lambda: figures.film_strip(torch.zeros(2, 2, 3, 8, 8), labels=["a"]), "labels are 1 for 2 rows"),
        (lambda: figures.similarity_map(torch.zeros(3, 4, 8, 8), 3), "anchor is 3; give a step from 0 to 2"),
        (lambda: figures.similarity_map(torch.zeros(0, 4, 8, 8)), "pred_x0 has shape"),
        (lambda: figures.reward_map(torch.zeros(3)), "values has shape"),
        (lambda: figures.reward_map([]), "values has shape"),
        (lambda: figures.advantage_map(torch.zeros(3, 0)), "values has shape"),
        (lambda: figures.anchor_histogram([], 3), "anchors has shape"),
        (lambda: figures.anchor_histogram([3], 3), "anchors run"),
        (lambda: figures.anchor_histogram([1, NAN], 3), "anchors run from nan"),
        (lambda: figures.anchor_histogram([1, 1.5], 3), "give whole steps"),
        (lambda: figures.training_curves([]), "no epoch yet"),
        (lambda: figures.training_curves({}), "no epoch yet"),
        (lambda: figures.training_curves([RECORDS, []]), "no epoch yet"),
        (lambda: figures.training_curves([1, 2]), "something else than records"),
        (lambda: figures.training_curves([{"epoch": 1, "loss": 1.0}]), "x is 'samples', which the metrics do not hold"),
        (lambda: figures.training_curves([{"samples": 1, "reward/mean": NAN}]), "none of reward/mean"),
        (lambda: figures.training_curves(RECORDS, "time"), "x is 'time'"),
        (lambda: figures.training_curves(RECORDS, names=["kl"]), "none of kl"),
        (lambda: figures.step_grid(torch.zeros(2, 1, 3, 8, 8), None, [1], ["a"]), "1 step counts"),
        (
            lambda: figures.step_grid(torch.zeros(1, 1, 3, 8, 8), torch.zeros(1, 2, 3, 8, 8), [1], ["a"]),
            "after has shape",
        ),
        (lambda: figures.step_grid(torch.zeros(0, 1, 3, 8, 8), None, [], ["a"]), "before has shape"),
        (
            lambda: figures.step_grid(torch.zeros(1, 1, 3, 8, 8), torch.zeros(0, 1, 3, 8, 8), [1], ["a"]),
            "after has shape",
        ),
        (lambda: figures.diversity_curve({"steps": [1]}), "diversity was not measured"),
        (lambda: figures.diversity_curve({}), "diversity was not measured"),
        (lambda: figures.step_curves({}), "the comparison lacks steps"),
        (
            lambda: figures.step_curves({"steps": [1], "n": 1, "reward": "x", "after": PANEL}),
            "the comparison lacks before",
        ),
        (lambda: drawing.save_figure(Figure(), "figure.pdf"), "PNG"),
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
        lambda: figures.film_strip(IMAGE),
        lambda: figures.film_strip(IMAGE, [NAN], 0),
        lambda: figures.similarity_map(LATENT, 0),
        lambda: figures.reward_map([[1.0]]),
        lambda: figures.advantage_map([[0.0]]),
        lambda: figures.anchor_histogram([0], 1),
        lambda: figures.training_curves(RECORDS[:1]),
        lambda: figures.step_grid(IMAGE[None], None, [1], ["a"]),
        lambda: figures.diversity_curve(ONE_STEP | {"diversity": {"before": [0.1], "after": None}}),
        lambda: figures.step_curves(ONE_STEP),
    ],
    ids=range(10),
)
def test_one_step_and_no_policy_after_are_drawn(draw):
    drawn(draw())


USERS = ["$$", "price tag $20 #1 $30", r"\\frac{1}{2} \q", "_mine_", "%s {} & <b> `x` | y", "", "$\\frac$", "^_^", "#"]


def texts_of(figure):
    return [text for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.parametrize("text", USERS)
def test_texts_of_users_are_drawn_as_they_are(text):
    "Prompts, names of rewards, of rows and of runs: no formula, no markup, none left out"
    comparison = COMPARISON | {"reward": text or "x"}
    grid = figures.step_grid(IMAGE[None], None, [1], [text])
    curves = figures.training_curves({text or "x": RECORDS, "other": RECORDS}, names=["reward/mean"])
    strip = figures.film_strip(IMAGE[None], labels=[text])
    for figure in (grid, curves, strip, figures.step_curves(comparison)):
        drawn(figure)
        figure.canvas.draw()  # whoever draws it otherwise
        shown = "".join(found.get_text() for found in texts_of(figure))
        assert "".join(text.split()) in "".join(shown.split())
        assert not any(found.get_parse_math() for found in texts_of(figure))


def test_a_name_of_metrics_is_a_text_too():
    drawn(figures.training_curves([record | {"$x": 1.0, "$$": 2.0} for record in RECORDS], names=["$x", "$$"]))


def test_missing_characters_get_one_note(monkeypatch):
    "Not a warning for each character of each figure; other warnings go on"
    monkeypatch.setattr(drawing.NotebookFigure, "noted", False)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(2):
            drawn(figures.step_grid(IMAGE[None], None, [1], ["\u732b\u304c\u8d64\u3044\u5e3d\u5b50"]))
    assert len(heard) == 1 and "font" in str(heard[0].message) and "\n" not in str(heard[0].message)
    figure = figures.reward_map([[1.0]])
    figure.get_layout_engine().execute = lambda fig: warnings.warn("of another kind")
    with pytest.warns(UserWarning, match="of another kind"):
        drawn(figure)


def test_agreement_is_seen_on_its_whole_scale():
    "From .95 to 1.00 nothing would look like something; and a reward may have any name"
    high = COMPARISON | {"agreement": {"before": [0.99, 1.0], "after": [0.96, 0.98]}, "reward": "agreement"}
    reward, _, agreement, diversity = figures.step_curves(high).axes
    assert agreement.get_ylim() == (0, 1) and diversity.get_ylim()[0] == 0 and reward.get_ylim()[1] > 2


def test_curves_name_the_number_of_pairs():
    assert "16 pairs of prompt and noise" in [text.get_text() for text in texts_of(figures.step_curves(COMPARISON))]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.film_strip(IMAGE * NAN, [NAN]),
        lambda: figures.similarity_map(LATENT.expand(3, -1, -1, -1) * NAN, 1),
        lambda: figures.reward_map([[NAN, NAN]]),
        lambda: figures.reward_map([[NAN, 1.0, float("inf")]]),
        lambda: figures.advantage_map([[NAN, -1.0]]),
        lambda: figures.training_curves([*RECORDS, {"samples": 40, "reward/mean": NAN}]),
        lambda: figures.training_curves([RECORDS, [record | {"reward/std": NAN} for record in RECORDS]]),
        lambda: figures.step_grid(IMAGE[None] * NAN, IMAGE[None], [1], ["a"]),
        lambda: figures.diversity_curve(COMPARISON | {"diversity": {"before": [0.1, NAN], "after": [None, 0.2]}}),
        lambda: figures.step_curves(
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
    axis = figures.similarity_map(latents).axes[0]
    masked = np.ma.getmaskarray(values(axis))
    assert masked[2].all() and masked[:, 2].all() and masked.sum() == 7 and axis.patch.get_hatch()


def test_shares_and_distances_start_at_zero():
    figure = figures.training_curves(
        [record | {"clip_fraction": 0.0} for record in RECORDS], names=["diversity", "clip_fraction", "loss"]
    )
    assert [axis.get_ylim()[0] == 0 for axis in figure.axes] == [True, True, False]
    assert all(axis.get_ylim()[1] > 0 for axis in figure.axes)
