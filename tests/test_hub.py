"Loading: every failure is one sentence, nothing but tensors is read, and pictures are shrunk as PIL does it."

import os
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdpo_nb import hub
from sdpo_nb.hub import (
    build_network,
    check_weight_files,
    clip_normalize,
    clip_pixels,
    clip_std,
    explained,
    find_file,
    load_pretrained,
    load_tensors,
    load_tokenizer,
    local_path,
    pinned_commits,
    quiet_loading,
)

ASKER = "reward 'test', model"


# --- failures


class ConnectError(Exception):
    "What the hub's HTTP client raises without a network; its module depends on the version."


def answer(status):
    "As much of an HTTP response as the hub's errors look at"
    return SimpleNamespace(status_code=status, headers={}, request=None, url="https://huggingface.co")


FAILURES = [
    (lambda: GatedRepoError("403", response=answer(403)), "its licence must be accepted"),
    (lambda: RepositoryNotFoundError("404", response=answer(404)), "the hub has no such model"),
    (lambda: RevisionNotFoundError("404", response=answer(404)), "has no revision 'v9': give 'main'"),
    (lambda: RemoteEntryNotFoundError("404 Client Error.", response=answer(404)), "lacks a file that is needed"),
    (lambda: LocalEntryNotFoundError("offline"), "the hub cannot be reached"),
    (lambda: ConnectError("offline"), "the hub cannot be reached"),
    (lambda: TimeoutError("read"), "the hub cannot be reached"),
]
KINDS = ["gated", "unknown", "revision", "file", "cache", "network", "timeout"]


@pytest.fixture
def failing(monkeypatch):
    "failing(failure): whatever asks the hub gets this failure"

    def fail(failure):
        def unreachable(*arguments, **options):
            raise failure()

        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # nothing else that is asked goes out
        for place in ("sdpo_nb.hub.hf_hub_download", "transformers.utils.hub.hf_hub_download"):
            monkeypatch.setattr(place, unreachable)
        monkeypatch.setattr("transformers.utils.hub.snapshot_download", unreachable)

    return fail


@pytest.mark.parametrize("failure, message", FAILURES, ids=KINDS)
def test_failures_of_the_hub_are_told_apart(failing, failure, message):
    failing(failure)
    with pytest.raises(OSError, match=f"^{ASKER}: .*'someone/model'.*{message}") as caught:
        find_file("someone/model", ["weights.pt"], ASKER, "v9")
    assert "\n" not in str(caught.value)


LOADERS = {
    "network": lambda: load_pretrained(CLIPTextModel, "someone/model", ASKER, "v9"),
    "tokenizer": lambda: load_tokenizer(CLIPTokenizer, "someone/model", "", "other/model", ASKER, "v9"),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("failure", [failure for failure, _ in FAILURES[:-1]], ids=KINDS[:-1])
def test_failures_below_transformers(failing, load, failure):
    "The libraries wrap them, each in its own way; still it is one sentence that names the model"
    failing(failure)
    with pytest.raises(OSError, match=f"^{ASKER}: .*'someone/model'") as caught:
        load()
    assert "\n" not in str(caught.value)


def test_without_an_asker_the_sentence_begins_with_a_capital():
    with pytest.raises(OSError, match=r"^Could not load 'a place': out of luck\.$"), explained("a place"):
        raise RuntimeError("out of luck.\nand more")


PATHS = ["nowhere", "./nowhere", "/nowhere/at/all", "~/nowhere", "some/folder/deep", "models/mine.pt", "here/model"]


@pytest.mark.parametrize("place", PATHS)
def test_paths_that_lead_nowhere(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(OSError, match=f"^{ASKER}: '{place}' is no folder or file here and no hub id: give a path"):
        local_path(place, ASKER)


def test_revisions_reach_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "hf_hub_download", lambda *place, revision: asked.append((*place, revision)) or "file")
    for place, revision in (("xswu/HPSv2", "abc"), ("xswu/HPSv2", None), ("someone/model", None)):
        find_file(place, ["better", "published"], ASKER, revision)
    commits = ["abc", pinned_commits["xswu/HPSv2"], "main"]
    assert asked == [(*place, at) for place, at in zip([("xswu/HPSv2", "published")] * 2 + [asked[-1][:2]], commits)]
    assert asked[-1][:2] == ("someone/model", "published")


def test_loading_is_quiet_and_leaves_the_libraries_as_they_were():
    from diffusers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(KeyError), quiet_loading():
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.ERROR, False)
        raise KeyError
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    with quiet_loading(bars=True):
        assert logging.is_progress_bar_enabled() == before[1]


def test_every_process_reads_its_own_weights(monkeypatch):
    "What accelerate launch sets by default would leave scorers without weights on all processes but one"
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with quiet_loading():
        assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    monkeypatch.delenv("FSDP_CPU_RAM_EFFICIENT_LOADING")
    with quiet_loading():
        assert "FSDP_CPU_RAM_EFFICIENT_LOADING" not in os.environ


# --- tensors and nothing but tensors


class Surprise:
    def __reduce__(self):
        return (print, ("code was run",))


@pytest.mark.parametrize(
    "content, sentence",
    [
        (lambda: pickle.dumps({"state_dict": Surprise()}), "holds more than tensors"),
        (lambda: b"", "is damaged|is no PyTorch file"),
        (lambda: b"<html>not found</html>", "is no PyTorch file"),
    ],
    ids=["code", "empty", "html"],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_that_could_run_code_and_rubbish(tmp_path, capsys, content, sentence):
    (tmp_path / "weights.pt").write_bytes(content())
    with pytest.raises(OSError, match=f"^{ASKER}: .*({sentence})") as caught:
        load_tensors(tmp_path / "weights.pt", ASKER)
    assert "code was run" not in capsys.readouterr().out and "\n" not in str(caught.value)


def test_a_torch_file_with_code_inside_is_not_opened(tmp_path, capsys):
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "more": Surprise()}, tmp_path / "weights.pt")
    with pytest.raises(OSError, match="holds more than tensors"):
        load_tensors(tmp_path / "weights.pt")
    assert "code was run" not in capsys.readouterr().out


def test_files_that_are_no_weights(tmp_path):
    torch.save([1, 2], tmp_path / "weights.pt")
    with pytest.raises(OSError, match="is no dictionary of tensors"):
        load_tensors(tmp_path / "weights.pt")
    torch.save({"weight": torch.zeros(2000)}, tmp_path / "weights.pt")
    os.truncate(tmp_path / "weights.pt", 4000)
    with pytest.raises(OSError, match=f"^{ASKER}: .*is damaged"):
        load_tensors(tmp_path / "weights.pt", ASKER)
    (tmp_path / "weights.safetensors").write_bytes(b"rubbish")
    with pytest.raises(OSError, match="is damaged"):
        load_tensors(tmp_path / "weights.safetensors")


def test_networks_are_complete_and_of_their_own_shape(tiny_folder, tmp_path):
    config = CLIPTextConfig.from_pretrained(tiny_folder / "text_encoder")
    state = load_tensors(tiny_folder / "text_encoder" / "model.safetensors")
    name = next(name for name in state if name.endswith("mlp.fc1.weight"))
    shape, given = list(state[name].shape), list(state[name][1:].shape)
    misshapen = (
        rf"have the shape \[{given[0]}, {given[1]}\] for '.*mlp.fc1.weight', where the network has \[{shape[0]}, "
    )
    for change, sentence in (
        (lambda: state.pop(name), "lack 1 of the network's tensors, the first being '.*mlp.fc1.weight'"),
        (lambda: state.update({name: torch.zeros(given)}), misshapen),
    ):
        change()
        with pytest.raises(OSError, match=f"^{ASKER}: the weights in 'here' {sentence}"):
            build_network(CLIPTextModel, config, state, "here", ASKER)


def test_a_damaged_network_and_a_folder_without_vocabulary(tiny_folder, tmp_path):
    CLIPTextConfig.from_pretrained(tiny_folder / "text_encoder").save_pretrained(tmp_path)
    whole = (tiny_folder / "text_encoder" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=f"^{ASKER}: .*is damaged"):
        load_pretrained(CLIPTextModel, tmp_path, ASKER)
    with pytest.raises(OSError, match=f"^{ASKER}: "):
        load_tokenizer(CLIPTokenizer, tmp_path, tmp_path, "someone/model", ASKER)


def test_a_network_is_not_blamed_for_files_that_nobody_reads(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder / "text_encoder", tmp_path, dirs_exist_ok=True)
    (tmp_path / "deeper").mkdir()
    for place in (tmp_path / "old_copy.safetensors", tmp_path / "deeper" / "model.safetensors"):
        place.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    network = load_pretrained(CLIPTextModel, tmp_path, ASKER)
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def test_every_part_of_a_network_is_looked_at(tmp_path):
    "As both libraries number them, with and without a variant"
    for name in ("model-00001-of-00002", "diffusion_pytorch_model.fp16-00002-of-00002", "model-00001-of-00001.fp16"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.safetensors").write_bytes(b"half")
        with pytest.raises(OSError, match=f"{name}.safetensors is damaged"):
            check_weight_files(tmp_path / name, "fp16")
        if "fp16" in name:
            check_weight_files(tmp_path / name)  # the plain ones are read, and there are none


# --- pixels


def pictures(batch=5, height=40, width=40, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def by_pil(images, size):
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    arrays = [Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy()) for image in images]
    return processor(images=arrays, return_tensors="pt")["pixel_values"]


SIZES = [(512, 768, 224), (768, 512, 224), (300, 511, 224), (225, 777, 224), (100, 70, 28), (32, 32, 224)]


@pytest.mark.parametrize("height, width, size", SIZES)
def test_pictures_are_shrunk_as_pil_does(height, width, size):
    "Within 1 of 255 levels; two ties, which PIL's integers round the other way, may make it 2 at one value in 10,000"
    smooth = F.interpolate(pictures(1, 9, 9), (height, width), mode="bicubic").clamp(0, 1)
    for images in (pictures(1, height, width), smooth):
        images = (255 * images).round() / 255
        mine, theirs = clip_normalize(clip_pixels(images, size)), by_pil(images, size)
        difference = ((mine - theirs) * 255 * torch.tensor(clip_std).view(3, 1, 1)).round().abs()
        assert mine.shape == (1, 3, size, size) and difference.max() <= 2
        assert (difference == 2).float().mean() < 1e-4 and (difference == 1).float().mean() < 0.03


def test_pixels_are_bytes_and_cut_off():
    pixels = clip_pixels(3 * pictures(2, 50, 70) - 1, 28)
    assert pixels.min() >= 0 and pixels.max() <= 1 and torch.equal(pixels, (pixels * 255).round() / 255)
    assert clip_pixels(pictures().bfloat16(), 28).dtype == torch.float32
