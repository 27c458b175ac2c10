"Pipelines from folders, of a variant alone, from single files; and places that are none."

import os
import shutil

import pytest
import torch
from random_pipelines import single_file
from safetensors.torch import load_file, save_file

from sdpo_nb.hub import looks_local
from sdpo_nb.models import load_policy
from sdpo_nb.pipelines import chosen_variant, policy_folder


@pytest.fixture(scope="module")
def folder(random_folder):
    return random_folder()


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    "An empty working folder"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path / "empty"


def weights(policy):
    parts = policy.denoiser, policy.vae, policy.pipeline.text_encoder
    return [tensor for part in parts for tensor in part.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


# --- places


@pytest.mark.parametrize(
    "name",
    ["tinny", "/nowhere/at/all", "~/nowhere", "runs/some/folder", "./mine", "models/mine.safetensors", "here/model"],
)
def test_paths_that_lead_nowhere(elsewhere, name):
    (elsewhere / "here").mkdir()
    with pytest.raises(OSError, match="is no folder or file here and no hub id: give 'tiny'") as caught:
        load_policy(name)
    assert "\n" not in str(caught.value)


def test_ids_and_paths_are_told_apart(elsewhere, copy):
    assert policy_folder("owner/model") is None and not looks_local("owner/model.v2")
    assert policy_folder(str(copy)) == copy and policy_folder(copy) == copy
    shutil.copytree(copy, elsewhere / "owner" / "model")
    assert str(policy_folder("owner/model")) == "owner/model"  # a folder wins
    assert looks_local("owner/other") and looks_local(elsewhere / "other") and looks_local("C:\\models\\mine")


# --- which files are read


@pytest.mark.parametrize("place", ["left.safetensors", "unet/old_copy.safetensors", "other/model.safetensors"])
def test_files_that_nobody_reads_may_be_broken(copy, place):
    (copy / "other").mkdir()
    (copy / place).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert load_policy(copy, device="cpu").device.type == "cpu"


def test_a_safety_checker_is_not_read(copy):
    index = copy / "model_index.json"
    index.write_text(
        index.read_text().replace('"safety_checker": [\n    null,\n    null\n  ]', '"safety_checker": ["a", "B"]')
    )
    assert '["a", "B"]' in index.read_text()
    (copy / "safety_checker").mkdir()
    (copy / "safety_checker" / "model.safetensors").write_bytes(b"half")
    assert load_policy(copy, device="cpu").device.type == "cpu"


# --- variants


def in_variant(folder, variant, keep=False, change=1.0):
    "Weights under the names of a variant, beside the plain ones or in their place"
    for plain in list(folder.rglob("*.safetensors")):
        tensors = {name: change * tensor for name, tensor in load_file(plain).items()}
        save_file(tensors, plain.with_suffix(f".{variant}.safetensors"), metadata={"format": "pt"})
        keep or plain.unlink()
    return folder


def test_a_folder_of_one_variant_is_read_whether_it_is_named_or_not(folder, copy):
    in_variant(copy, "fp16")
    for named in (None, "fp16"):
        assert same(load_policy(copy, device="cpu", variant=named), load_policy(folder, device="cpu"))
    with pytest.raises(OSError, match="no weights of the variant 'ema': give variant='fp16'"):
        load_policy(copy, variant="ema")


def test_plain_files_win_unless_a_variant_is_named(folder, copy):
    in_variant(copy, "ema", keep=True, change=0.5)
    original = load_policy(folder, device="cpu")
    assert same(load_policy(copy, device="cpu"), original)
    halved = weights(load_policy(copy, device="cpu", variant="ema"))
    assert all(torch.equal(0.5 * one, other) for one, other in zip(weights(original), halved))
    os.truncate(copy / "unet" / "diffusion_pytorch_model.ema.safetensors", 100)
    assert same(load_policy(copy, device="cpu"), original)
    with pytest.raises(OSError, match="ema.safetensors is damaged"):
        load_policy(copy, variant="ema")


def test_one_network_of_a_variant_is_enough(folder, copy):
    in_variant(copy / "unet", "fp16")
    assert same(load_policy(copy, device="cpu"), load_policy(folder, device="cpu"))


def test_several_variants_have_to_be_told_apart(copy):
    in_variant(copy, "ema", keep=True)
    for plain in copy.rglob("*model.safetensors"):
        plain.rename(plain.with_suffix(".fp16.safetensors"))
    with pytest.raises(OSError, match="holds weights in 2 variants: give variant='ema' or 'fp16'"):
        load_policy(copy)
    assert chosen_variant(copy, "ema") == "ema"


def test_a_variant_where_there_is_none(folder):
    with pytest.raises(OSError, match="no weights of the variant 'fp16': leave variant out"):
        load_policy(folder, variant="fp16")


# --- single files


@pytest.fixture
def single(folder, copy):
    "A single file next to the configurations of its pipeline, which has no other weights"
    pipeline = load_policy(folder, device="cpu").pipeline
    for plain in copy.rglob("*.safetensors"):
        plain.unlink()
    return single_file(pipeline, copy / "everything.safetensors")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_single_file_next_to_its_configuration(folder, single, precision):
    policy, other = (load_policy(place, device="cpu", precision=precision) for place in (single, folder))
    assert same(policy, other) and policy.fingerprint == other.fingerprint and policy.name == str(single)
    assert policy.sample(["a cat"], 2, seeds=[0]).isfinite().all()


def test_a_single_file_alone_needs_the_hub(single, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    alone = shutil.copy(single, tmp_path / "alone.safetensors")
    with pytest.raises(
        OSError, match="alone.safetensors', a single file that needs the configuration of its base"
    ) as caught:
        load_policy(alone)
    assert "a folder would bring its own" in str(caught.value) and "\n" not in str(caught.value)


def test_other_files_are_no_policies(single, tmp_path):
    save_file({"unet.to_q.lora_A.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    torch.save({}, tmp_path / "model.ckpt")
    for name in ("lora.safetensors", "model.ckpt"):
        with pytest.raises(OSError, match="is no .safetensors file with a whole model: give one, or a folder"):
            load_policy(tmp_path / name)
    os.truncate(single, 1000)
    with pytest.raises(OSError, match="everything.safetensors is damaged"):
        load_policy(single)


def test_single_files_of_other_families_are_refused(single, tmp_path):
    key = "model.diffusion_model.input_blocks.0.0.weight"  # nine channels: a model that fills in holes
    file = tmp_path / "inpainting.safetensors"
    save_file(load_file(single) | {key: torch.zeros(16, 9, 3, 3)}, file)
    with pytest.raises(ValueError, match="is a 'inpainting' model, which cannot be trained here: choose a Stable"):
        load_policy(file)
