"LoRA files: for plain diffusers and from everywhere, each failure in one sentence that leaves the policy as it was."

import json
import os
import shutil

import pytest
import torch
from comparisons import apart, near
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from random_pipelines import nudged, single_file, stock_images, stock_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import small_trainer

from sdpo_nb.hub import quiet_loading
from sdpo_nb.lora_files import _sort_header
from sdpo_nb.models import Policy, load_policy
from sdpo_nb.report import loading_code

PROMPTS = ["a red circle", "a blue cat", "a red circle"]
SEEDS = [3, 1, 2]


# --- in and out


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_loading_keeps_alpha_folds_the_scale_and_can_be_saved_again(policy, folder, tmp_path, scale):
    file = nudged(policy.add_lora(rank=2, alpha=7)).save_lora(tmp_path / "first")
    again = load_policy(folder, device="cpu").load_lora(file if scale == 1 else file.parent, scale=scale)
    assert {parameter.dtype for parameter in again.trainable_parameters().values()} == {torch.float32}
    assert list(again.trainable_parameters()) == list(policy.trainable_parameters())
    nudged(policy, 0.3 * scale)
    expected = policy.sample(PROMPTS, 2, seeds=SEEDS)
    assert near(again.sample(PROMPTS, 2, seeds=SEEDS), expected)
    again.save_lora(tmp_path / "second")
    pipeline = stock_pipeline(folder, timestep_spacing="trailing")
    pipeline.load_lora_weights(tmp_path / "second")
    stock = stock_images(pipeline, PROMPTS, SEEDS, 2, eta=1.0)
    assert near(stock, expected)


def test_a_half_precision_policy_saves_and_loads_float32_exactly(folder, tmp_path):
    policy = nudged(load_policy(folder, device="cpu", precision="bf16").add_lora())
    policy.save_lora(tmp_path)
    again = load_policy(folder, device="cpu", precision="bf16").load_lora(tmp_path)
    assert all(torch.equal(again.lora_state()[name], tensor) for name, tensor in policy.lora_state().items())


def test_the_older_names_of_lora_files_are_understood(policy, tmp_path):
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    expected = nudged(policy.add_lora()).lora_state()
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(policy.denoiser))  # lora.down and lora.up
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    policy.load_lora(tmp_path)
    assert all(torch.equal(policy.lora_state()[name], tensor) for name, tensor in expected.items())


def test_an_interrupted_save_leaves_the_earlier_file(policy, tmp_path, monkeypatch):
    file = policy.add_lora().save_lora(tmp_path)
    before = file.read_bytes()

    def interrupted(unfinished, **options):
        with open(os.path.join(unfinished, file.name), "wb") as half:
            half.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(StableDiffusionPipeline, "save_lora_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nudged(policy).save_lora(tmp_path)
    assert os.listdir(tmp_path) == [file.name] and file.read_bytes() == before


class Upwards(set):
    "A set in one of the orders that a set of strings may have in another process"

    def __iter__(self):
        return iter(sorted(set.__iter__(self)))


class Downwards(set):
    "The same in the opposite order"

    def __iter__(self):
        return iter(sorted(set.__iter__(self), reverse=True))


def test_equal_runs_save_equal_bytes(policy, tmp_path):
    "A header's own order differs from one save to the next"
    written = []
    config = nudged(policy.add_lora()).denoiser.peft_config["default"]
    for order in (Upwards, Downwards):
        config.target_modules = order(set(config.target_modules))
        written += [policy.save_lora(tmp_path / order.__name__).read_bytes() for _ in range(4)]
    assert len(set(written)) == 1


def test_the_saved_configuration_is_sorted(policy, tmp_path):
    file = policy.add_lora(targets=("to_v", "to_k", "to_q")).save_lora(tmp_path)
    with safe_open(file, "pt") as opened:
        notes = opened.metadata()
    assert json.loads(notes["lora_adapter_metadata"])["unet.target_modules"] == ["to_k", "to_q", "to_v"]
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    assert list(header["__metadata__"]) == ["format", "lora_adapter_metadata"]


@pytest.mark.parametrize("notes", [None, {"b": 'ü€ "quoted" \n', "a": "1", "c": "\u2028"}])
def test_sorting_a_header_keeps_everything(tmp_path, notes):
    tensors, file = {"x": torch.randn(3, 5), "half": torch.randn(7).half()}, tmp_path / "any.safetensors"
    save_file(tensors, file, metadata=notes)
    _sort_header(file)
    loaded = load_file(file)
    assert len(loaded) == 2 and all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.items())
    with safe_open(file, "pt") as opened:
        assert (opened.metadata() or None) == notes
    once = file.read_bytes()
    _sort_header(file)
    assert file.read_bytes() == once and int.from_bytes(once[:8], "little") % 8 == 0


def test_lora_misuse(policy, tmp_path):
    with pytest.raises(ValueError, match="call add_lora first"):
        policy.save_lora(tmp_path)
    with pytest.raises(ValueError, match="lora_rank=0 must be at least 1"):
        policy.add_lora(rank=0)
    for empty in (tmp_path / "missing", tmp_path):
        with pytest.raises(OSError, match="There is no LoRA"):
            policy.load_lora(empty)
    file = policy.add_lora().save_lora(tmp_path)
    os.truncate(file, 100)
    with pytest.raises(OSError, match="is damaged"):
        policy.load_lora(tmp_path)
    assert policy.has_lora


def test_a_lora_of_another_part_is_refused(policy, tmp_path):
    weights = {"unet.a.lora_A.weight": torch.zeros(1), "text_encoder.b.lora_A.weight": torch.zeros(1)}
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(
        ValueError, match="not belong to a UNet alone .it holds 'text_encoder.*only UNet LoRAs can be trained"
    ):
        policy.load_lora(tmp_path)


# --- several, and how strong


def test_loading_one_leaves_the_others(policy, predict, tmp_path):
    one, two = (nudged(policy.add_lora(rank)).save_lora(tmp_path / str(rank)) for rank in (2, 3))
    policy.remove_lora()
    alone = predict(policy.load_lora(one))
    both = predict(policy.load_lora(two, name="two"))
    assert apart(both, alone)
    assert near(predict(policy.load_lora(one)), both)  # again, as one does in a notebook
    assert near(predict(policy.load_lora(two, name="two")), both)
    with policy.without_lora():  # nothing is underneath before a run has begun
        assert apart(predict(), both) and apart(predict(), alone)
    policy.remove_lora()
    assert near(predict(policy.load_lora(two, name="two").load_lora(one)), both)


def test_strengths_that_were_set_stay(folder, predict, tmp_path):
    pipeline = stock_pipeline(folder)
    lora = nudged(load_policy(folder, device="cpu").add_lora()).save_lora(tmp_path)
    pipeline.load_lora_weights(lora, adapter_name="lcm")
    pipeline.set_adapters("lcm", 0.25)

    weak = predict(Policy(pipeline))
    policy = Policy(pipeline).load_lora(lora, 0.0)
    assert near(predict(policy), weak)
    half = load_policy(folder, device="cpu").load_lora(lora, 0.25)
    assert near(weak, predict(half))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_scale_of_zero_is_the_original_model_for_dora_too(folder, tmp_path, precision):
    policy, layers = load_policy(folder, device="cpu", precision=precision), ["to_q", "to_v", "conv1", "to_out.0"]
    latents, embedding = torch.randn(2, *policy.latent_shape), policy.embed(PROMPTS[:2])

    def predict(scale=None):
        if scale is not None:
            policy.load_lora(tmp_path, scale)
        return policy.predict(latents, 999, embedding).detach()

    original = predict()
    policy.denoiser.add_adapter(
        LoraConfig(r=4, target_modules=layers, use_dora=True, init_lora_weights=False), "default"
    )
    for name, parameter in policy.denoiser.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.2
    policy.save_lora(tmp_path)
    whole = predict()
    assert apart(whole, original)
    assert torch.equal(predict(0.0), original)
    if precision == "fp32":
        assert near(predict(1.0), whole)
        assert apart(predict(0.5), whole) and apart(predict(0.5), original)
        policy.save_lora(tmp_path / "half")
        assert near(predict(), predict(0.5))


def test_a_saved_lora_holds_nothing_but_what_was_trained(folder, policy, tmp_path):
    "Whatever the others are called: diffusers begins with default_0"
    file = nudged(policy.add_lora(2)).save_lora(tmp_path / "plain")
    names = load_file(file).keys()
    policy.remove_lora()
    policy.pipeline.load_lora_weights(file)
    again = policy.prepare_training(3).save_lora(tmp_path / "above")
    assert load_file(again).keys() == names and {len(x) for n, x in load_file(again).items() if "lora_A" in n} == {3}


# --- layouts


def original_names(key, layers=2):
    "A weight of diffusers under kohya's name, with the numbers of blocks of SDXL's authors"
    part, block, *rest = key.split(".")
    place = {"mid_block": "middle_block_1"}.get(part)
    if place is None:
        (kind, number), rest = rest[:2], rest[2:]
        first = (layers + 1) * int(block) + int(number) + (part == "down_blocks")
        place = f"{'input' if part == 'down_blocks' else 'output'}_blocks_{first}_1"
    else:
        rest = rest[1:]
    *layer, kind, _ = rest
    return f"lora_unet_{place}_{'_'.join(layer)}.{dict(lora_A='lora_down', lora_B='lora_up')[kind]}.weight"


def test_kohyas_names_of_sdxl_are_those_of_stock_diffusers(random_folder, tmp_path):
    place = random_folder("sdxl_turbo")
    policy = nudged(load_policy(place, device="cpu").add_lora(4, alpha=2))
    expected, weights = policy.lora_state(), {}
    for key, tensor in load_file(policy.save_lora(tmp_path / "ours")).items():
        name = original_names(key.removeprefix("unet."))
        weights |= {name: tensor, f"{name.partition('.')[0]}.alpha": torch.tensor(2.0)}
    assert any("input_blocks_4_1_" in name for name in weights) and any(
        "output_blocks_0_1_" in name for name in weights
    )
    save_file(weights, tmp_path / "kohya.safetensors")
    again = load_policy(place, device="cpu").load_lora(tmp_path / "kohya.safetensors").prepare_training(4, 2)
    assert again.lora_state().keys() == expected.keys()
    assert all(torch.equal(again.lora_state()[name], tensor) for name, tensor in expected.items())
    pictures = [model.sample(["a cat"], 2, seeds=[0], return_latents=True) for model in (policy, again)]
    assert near(*pictures)
    stock = load_policy(place, device="cpu")
    with quiet_loading():
        stock.pipeline.load_lora_weights(tmp_path / "kohya.safetensors")
    assert near(stock.sample(["a cat"], 2, seeds=[0], return_latents=True), pictures[0])


def peft_folder(policy, folder, **changes):
    "What `PeftModel.save_pretrained` writes for this LoRA"
    names = {f".default.{end}": f".{end}" for end in ("weight", "bias")}
    state = {f"base_model.model.{key.replace(*list(names.items())[0])}": x for key, x in policy.lora_state().items()}
    policy.denoiser.peft_config["default"].save_pretrained(folder)
    save_file(state, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | dict(inference_mode=True) | changes))
    return folder


def test_folders_of_peft(folder, policy, predict, tmp_path):
    expected = predict(nudged(policy.add_lora(4, alpha=8)))
    place = peft_folder(policy, tmp_path, target_modules=".*to_(q|k|v|out.0)")
    again = load_policy(folder, device="cpu").load_lora(place)
    assert near(predict(again), expected)
    assert again.prepare_training(4, 8).lora_state().keys() == policy.lora_state().keys()
    again.save_lora(tmp_path / "ours")
    assert near(predict(load_policy(folder, device="cpu").load_lora(tmp_path / "ours")), expected)
    peft_folder(policy, tmp_path, peft_type="LOHA")
    with pytest.raises(ValueError, match="is a LoHaConfig and no LoRA: give a LoRA"):
        again.load_lora(tmp_path)


def test_checkpoints_of_our_runs_are_named_as_what_they_are(folder, policy, tmp_path):
    small_trainer(folder, tmp_path).train()
    checkpoint = max((tmp_path / "run/checkpoints").glob("*.pt"))
    with pytest.raises(ValueError, match="is the checkpoint of a run, .*: go on with it by resume='.*run', or load"):
        policy.load_lora(checkpoint)
    with pytest.raises(OSError, match="There is no LoRA at '.*run': do you mean '.*run/lora'"):
        policy.load_lora(tmp_path / "run")
    assert policy.load_lora(tmp_path / "run/lora").has_lora


def test_files_nearby_do_not_matter(policy, tmp_path):
    file = nudged(policy.add_lora()).save_lora(tmp_path)
    (tmp_path / "deeper").mkdir()
    for other in (tmp_path / "other.safetensors", tmp_path / "deeper" / "other.safetensors"):
        other.write_bytes(b"version https://git-lfs.github.com/spec/v1")
        assert policy.load_lora(file).has_lora and policy.load_lora(tmp_path).has_lora
    file.rename(tmp_path / "mine.safetensors")
    with pytest.raises(OSError, match=r"holds 2 weight files \(mine.safetensors, other.safetensors\): give one"):
        policy.load_lora(tmp_path)


def test_a_lora_of_another_base_is_one_sentence(policy, predict, random_folder, tmp_path, capfd):
    other = load_policy(random_folder("sd_turbo"), device="cpu")
    nudged(policy.add_lora()).save_lora(tmp_path / "mine")
    policy.load_lora(tmp_path / "mine")
    before, own = predict(), load_file(tmp_path / "mine" / "pytorch_lora_weights.safetensors")
    other.add_lora().save_lora(tmp_path / "other")
    wider = {
        key: torch.zeros(4, 7)
        if key == "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"
        else x
        for key, x in own.items()
    }
    deeper = {key.replace("mid_block", "mid_block.more"): tensor for key, tensor in own.items()}
    of_another_kind = own | {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lokr_w1": torch.zeros(2, 2)}
    capfd.readouterr()
    for name, weights, sentence in (
        (
            "wider",
            wider,
            r"to_k.lora_A.weight' has the shape \[4, 7\], where \[4, 16\] fits; give one that was trained",
        ),
        ("deeper", deeper, "there is no layer 'mid_block.more.*' here"),
        ("kind", of_another_kind, "to_k.lokr_w1', which is no weight of a LoRA"),
        ("other", None, "belongs to another model than .*: (its|there is no layer)"),
    ):
        if weights:
            (tmp_path / name).mkdir()
            save_file(weights, tmp_path / name / "pytorch_lora_weights.safetensors")
        with pytest.raises(ValueError, match=sentence) as caught:
            policy.load_lora(tmp_path / name)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
        assert torch.equal(predict(), before)  # nothing has changed
    assert capfd.readouterr().err == ""


# --- whole networks


def test_a_network_with_other_weights_is_refused(policy, tiny_folder):
    with pytest.raises(ValueError, match="The UNet at .* has other weights than that of .*: give one that was trained"):
        policy.load_whole(tiny_folder / "unet")
    assert not policy.trainable_parameters()
    with pytest.raises(OSError, match="Could not load "):
        policy.load_whole(tiny_folder)


# --- what the card of a run tells others to do


def loaded_as_told(*of_the_run, underneath):
    "The pipeline that the code of a card loads; it draws nothing here"
    *lines, drawing = loading_code(*of_the_run, underneath=underneath).splitlines()
    assert drawing.startswith('image = pipe("a prompt"')
    space = {}
    with quiet_loading():
        exec("\n".join(lines), space)
    return space["pipe"]


@pytest.mark.parametrize("single", [False, True], ids=["folder", "single file"])
def test_the_code_of_the_card_loads_the_policy_and_what_lay_underneath(folder, predict, tmp_path, single):
    model = folder
    if single:
        model = shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
        single_file(stock_pipeline(folder), model / "all.safetensors")
        model = model / "all.safetensors"
    below, own = tmp_path / "below", tmp_path / "own"
    nudged(load_policy(folder, device="cpu").add_lora(3, seed=1)).save_lora(below)
    policy = load_policy(model, device="cpu").load_lora(below, 0.5, name="few_steps").prepare_training(2)
    nudged(policy).save_lora(own)
    assert policy.underneath == {"few_steps": {"place": str(below), "scale": 0.5}}
    use = (str(model), 4, 0.0, str(own))
    stock = Policy(loaded_as_told(*use, underneath=policy.underneath))
    assert near(predict(stock), predict(policy))
    assert apart(predict(Policy(loaded_as_told(*use, underneath={}))), predict(policy))


def test_what_diffusers_loaded_underneath_is_named_too(folder, tmp_path):
    nudged(load_policy(folder, device="cpu").add_lora(3)).save_lora(tmp_path)
    pipeline = stock_pipeline(folder)
    pipeline.load_lora_weights(tmp_path, adapter_name="style")
    policy = Policy(pipeline).prepare_training(2)
    assert policy.underneath == {"style": {"place": None, "scale": 1.0}}
    code = loading_code("me/model", 4, underneath=policy.underneath)
    assert "pipe.load_lora_weights('where style is', adapter_name='style')" in code
    compile(code, "card", "exec")
