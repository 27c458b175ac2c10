"""Draw the picture that a link to the site shows, and the icon of its tab, from what the shipped model predicts.

python .ci/card.py            # writes nbs/images/card.png and nbs/images/icon.png
python .ci/card.py FOLDER     # writes them there
"""

import io
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from sdpo_nb.dense import select_anchor
from sdpo_nb.files import atomic_write
from sdpo_nb.mdp import pair_noise, sample_trajectories
from sdpo_nb.models import load_policy

images = Path(__file__).resolve().parent.parent / "nbs" / "images"
prompt, num_steps = "a star", 8  # the colours are left open, so the two trajectories part visibly
width, height, frame, gap, left = 1200, 630, 124, 10, 58  # pixels
night, film, hole, edge, paper, quiet, amber = (
    "#10182b",
    "#05080f",
    "#26324d",
    "#3a4763",
    "#f4f1ea",
    "#b4bed0",
    "#e69f00",
)


@torch.no_grad()
def sample_pair() -> tuple:
    "Two trajectories from one noise: what they predict at each step `[2,T,3,H,W]`, and their anchors `[2]`."
    policy = load_policy("tiny", device="cpu")
    initial, noises = pair_noise(0, 0, [0], num_steps, policy.latent_shape)
    embedding = policy.embed([prompt] * 2)
    sampler = policy.sampler(num_steps)
    found = sample_trajectories(lambda x, t: policy.predict(x, t, embedding), sampler, initial[:, 0], noises[:, 0])
    pictures = policy.decode(found.pred_x0.flatten(0, 1)).unflatten(0, (2, num_steps))
    return pictures, select_anchor(found.pred_x0).tolist()


def enlarge(picture: torch.Tensor, size: int) -> Image.Image:
    "A picture `[3,H,W]`, `size` pixels wide."
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS)


def draw_strip(axis, top: float, pictures: torch.Tensor, anchor: int, name: str):
    "One trajectory as a film strip; the frames that a reward scores are amber."
    span = num_steps * (frame + gap) + gap
    axis.add_patch(Rectangle((left, top), span, frame + 44, color=film))
    for x in np.arange(left + 9, left + span - 10, 21.4):
        for y in (top + 6, top + frame + 30):
            axis.add_patch(
                FancyBboxPatch((x, y), 10, 8, boxstyle="round,pad=0,rounding_size=2", color=hole, linewidth=0)
            )
    for step, picture in enumerate(pictures):
        x, y = left + gap + step * (frame + gap), top + 22
        scored = step in (0, anchor, num_steps - 1)
        axis.imshow(enlarge(picture, frame), extent=(x, x + frame, y + frame, y), zorder=2)
        axis.add_patch(
            Rectangle(
                (x, y),
                frame,
                frame,
                fill=False,
                edgecolor=amber if scored else edge,
                linewidth=3.5 if scored else 1,
                zorder=3,
            )
        )
    axis.text(left - 20, top + 22 + frame / 2, name, color=quiet, fontsize=20, style="italic", ha="center", va="center")


def draw_card(pictures: torch.Tensor, anchors: list) -> Image.Image:
    "The name, the subject, and a pair as two film strips."
    fig = Figure((width / 100, height / 100), dpi=100, facecolor=night)
    axis = fig.add_axes((0, 0, 1, 1))
    axis.text(left, 92, "sdpo_nb", color=paper, fontsize=58, weight="bold", va="center")
    axis.text(left, 168, "Reward alignment of few-step diffusion models,", color=paper, fontsize=22, va="center")
    axis.text(left, 205, "in notebooks that run on a laptop", color=paper, fontsize=22, va="center")
    for line, text in enumerate(
        ("one noise, two trajectories;", "three scored frames of each", "reward all of its steps")
    ):
        axis.text(1140, 60 + 27 * line, text, color=(quiet, amber, quiet)[line], fontsize=15, ha="right", va="center")
    for row, name in enumerate("ab"):
        draw_strip(axis, 250 + row * (frame + 55), pictures[row], anchors[row], name)
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.axis("off")
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def draw_icon(picture: torch.Tensor) -> Image.Image:
    "One amber frame."
    icon = Image.new("RGB", (64, 64), amber)
    icon.paste(enlarge(picture, 52), (6, 6))
    return icon


def save(image: Image.Image, path: Path):
    "Write a PNG; few colours keep it small."
    buffer = io.BytesIO()
    image.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(buffer, "PNG", optimize=True)
    print(
        f"{atomic_write(path, buffer.getvalue())}: {image.width}×{image.height}, {len(buffer.getvalue()) / 1000:.0f} KB"
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else images
    pictures, anchors = sample_pair()
    save(draw_card(pictures, anchors), folder / "card.png")
    save(draw_icon(pictures[1, -1]), folder / "icon.png")
