"The shapes world: signed distances, rendering, captions, and the oracle that reads renders back."

import math
import subprocess
import sys

import pytest
import torch

from sdpo_nb.shapes import (
    Scenes,
    all_captions,
    backgrounds,
    caption,
    colors,
    load_network,
    parse_caption,
    random_scenes,
    render,
    scenes_from_uniform,
    shapes,
    signed_distances,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def one_scene(**fields):
    "A red circle of radius 8 in the middle of white; `fields` change it"
    values = dict(shape=0, color=0, background=0, x=16.0, y=16.0, size=8.0, angle=0.0, shade=1.0, light=0.0) | fields
    return Scenes(**{name: torch.tensor([value]) for name, value in values.items()})


def test_module_knows_nothing_of_diffusion():
    code = "import sys, sdpo_nb.shapes; assert not {'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# signed distances


@pytest.mark.parametrize("index, name", list(enumerate(shapes)))
def test_distance_is_negative_inside_and_positive_outside(index, name):
    def distance(x, y):
        return signed_distances(torch.tensor(x), torch.tensor(y), torch.tensor(10.0))[index].item()

    assert (distance(0.0, 0.0) > 0) == (name == "ring")
    assert all(distance(15 * math.cos(a), 15 * math.sin(a)) > 0 for a in torch.linspace(0, 6.28, 25).tolist())
    assert distance(0.0, -7.4) < 0  # every shape reaches upwards


def test_distance_of_points_on_the_axes():
    at = signed_distances(torch.tensor([13.0, 10.0, 0.0]), torch.zeros(3), torch.tensor(10.0))
    assert torch.allclose(at[0], torch.tensor([3.0, 0.0, -10.0]), atol=1e-5)  # circle
    assert torch.allclose(at[1], torch.tensor([4.5, 1.5, -8.5]), atol=1e-5)  # square, half side .85 r
    assert torch.allclose(at[5], torch.tensor([3.0, 0.0, 4.8]), atol=1e-5)  # ring, from .48 r to r


# scenes


def test_scenes_lie_in_their_ranges_and_are_uniform():
    scenes = random_scenes(30_000, seeded())
    for name, low, high in (
        ("x", 11.5, 20.5),
        ("y", 11.5, 20.5),
        ("size", 6.5, 11.0),
        ("angle", -0.3, 0.3),
        ("shade", 0.7, 1.0),
        ("light", -0.05, 0.05),
    ):
        values = getattr(scenes, name)
        assert (
            low <= values.min() and values.max() <= high and abs(values.mean() - (low + high) / 2) < 0.02 * (high - low)
        )
    for name, options in (("shape", 6), ("color", 6), ("background", 5)):
        assert torch.allclose(
            getattr(scenes, name).bincount(minlength=options) / 30_000, torch.full((options,), 1 / options), atol=0.01
        )


def test_scenes_are_reproducible_and_can_be_indexed():
    first, second = random_scenes(8, seeded(3)), random_scenes(8, seeded(3))
    assert len(first) == 8 and len(first[2:5]) == 3
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in first.__dataclass_fields__)
    assert first[5].x == second.x[5]


@pytest.mark.parametrize(
    "u, sentence",
    [
        (torch.rand(4, 8), r"u has shape \[4, 8\]; give \[B,9\]"),
        (torch.rand(9), "give .B,9."),
        (torch.full((2, 9), 1.5), "u ranges from 1.5 to 1.5; give numbers from 0 to 1"),
        (torch.full((1, 9), math.nan), "u ranges"),
    ],
)
def test_points_outside_the_cube_are_refused(u, sentence):
    with pytest.raises(ValueError, match=sentence):
        scenes_from_uniform(u)


@pytest.mark.parametrize("n", [-1, 2.5, True, "ten"])
def test_impossible_numbers_of_scenes_are_refused(n):
    with pytest.raises(ValueError, match="give a whole number of scenes"):
        random_scenes(n)


# rendering


def test_render_gives_float_images_between_zero_and_one():
    images = render(random_scenes(500, seeded()))
    assert images.shape == (500, 3, 32, 32) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1


def test_render_draws_from_no_random_source():
    scenes, before = random_scenes(4, seeded()), torch.get_rng_state()
    render(scenes)
    assert torch.equal(before, torch.get_rng_state())


def test_centre_has_the_paint_and_corner_the_background():
    image = render(one_scene(color=4, background=4, shade=0.8, light=0.03))[0]
    assert torch.allclose(image[:, 16, 16], 0.8 * torch.tensor(colors["blue"]))
    assert torch.allclose(image[:, 0, 0], torch.tensor(backgrounds["brown"]) + 0.03)


def test_a_shape_moves_with_its_centre_and_grows_with_its_size():
    dark = lambda image: 1 - image[0, 1]  # red on white: green is missing where the shape is
    pixels = torch.arange(32) + 0.5
    cover = dark(render(one_scene(x=14.0)))
    cover = (cover - cover.min()) / (cover.max() - cover.min())
    assert abs((cover.sum(0) * pixels).sum() / cover.sum() - 14) < 0.02
    assert abs((cover.sum(1) * pixels).sum() / cover.sum() - 16) < 0.02
    assert abs(cover.sum() - math.pi * 64) < 1.5
    assert dark(render(one_scene(size=10.0))).sum() > dark(render(one_scene(size=8.0))).sum()


def test_stars_and_triangles_point_upwards():
    for shape in ("triangle", "star"):
        rows = (render(one_scene(shape=shapes.index(shape)))[0, 1] < 0.5).any(1).nonzero()[:, 0]
        widths = (render(one_scene(shape=shapes.index(shape)))[0, 1] < 0.5).sum(1)
        assert widths[rows[0]] <= 2


@pytest.mark.parametrize("shift", [0.25, 0.5, 0.75])
def test_an_upright_edge_covers_exactly_its_share_of_a_pixel(shift):
    image = (
        1 - render(one_scene(shape=1, size=8 / 0.85, x=16.0 + shift, shade=0.0, light=1.0))[0, 0]
    )  # half side 8, black on white
    assert torch.allclose(image[16, 7:10], torch.tensor([0.0, 1 - shift, 1.0]), atol=1e-5)
    assert torch.allclose(image[16, 23:26], torch.tensor([1.0, shift, 0.0]), atol=1e-5)


# captions


def test_parsing_undoes_captioning():
    for s, shape in enumerate(shapes):
        for c, color in enumerate([None, *colors], -1):
            for b, background in enumerate([None, *backgrounds], -1):
                named = {"shape": s, "color": c, "background": b}
                assert parse_caption(caption(shape, color, background)) == {
                    name: index for name, index in named.items() if index >= 0
                }


@pytest.mark.parametrize(
    "words, sentence",
    [
        (dict(shape="ring", color="pink"), "color is 'pink'; choose one of red"),
        (dict(shape="ring", background="sky"), "background is 'sky'; choose one of white"),
        (dict(color="red"), "shape is None beside 'red'; name a shape too"),
        (dict(background="navy"), "shape is None beside 'navy'"),
    ],
)
def test_captions_that_cannot_be_said_are_refused(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        caption(**words)


def test_all_captions_are_all_and_different():
    for named, count in (
        (("shape", "color", "background"), 180),
        (("shape", "color"), 36),
        (("shape", "background"), 30),
        (("shape",), 6),
    ):
        captions = all_captions(named)
        assert len(captions) == len(set(captions)) == count
        assert all(set(parse_caption(text)) == set(named) for text in captions)
    with pytest.raises(ValueError, match="named holds 'colour'"):
        all_captions(("shape", "colour"))


# networks


def test_shipped_oracle_reads_renders_that_are_a_little_soft_or_noisy():
    scenes, oracle = random_scenes(256, seeded(99)), load_network("oracle")
    images = render(scenes)
    soft = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(images, (1,) * 4, mode="replicate"), 3, 1)
    noisy = (images + 0.08 * torch.randn(images.shape, generator=seeded())).clamp(0, 1)
    for spoiled in (soft, noisy):
        for name, logits in oracle(spoiled).items():
            assert (logits.argmax(1) == getattr(scenes, name)).float().mean() > 0.9
