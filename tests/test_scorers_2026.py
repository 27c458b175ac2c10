"SigLIP 2, the VQA score, HPSv3 and DINOv2 diversity on narrow random models; the ideas are tested in the notebook."

import json
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from sdpo_nb.cli import eval_command
from sdpo_nb.evaluate import compare, evaluation_pairs, feature_diversity, step_generalization
from sdpo_nb.files import read_json, write_json
from sdpo_nb.models import load_policy
from sdpo_nb.report import model_card, write_report
from sdpo_nb.rewards import checked, get_reward, rewards
from sdpo_nb.scorers_2026 import (
    DINOv2,
    HPSv3,
    SigLIP2,
    VisionLanguageScorer,
    VQAScore,
    _authors_text,
    _whole_tokens,
    scorers,
)

PROMPTS = ["a red circle", "a blue star", "a red circle"]
TOLD = "Rate {text_prompt}: <|Reward|> END"
NARROW = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
MARKS = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pictures(height=40, width=56, seed=0):
    return torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(seed))


def byte_tokenizer(words=("Yes", "yes")):
    letters, merges = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []
    for word in words:
        for end in range(2, len(word) + 1):
            merges += [pair for pair in [(word[: end - 1], word[end - 1])] if pair not in merges]
            letters.setdefault(word[:end], len(letters))
    made = Tokenizer(models.BPE(vocab=letters, merges=merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ends = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, additional_special_tokens=MARKS[1:], **ends)
    tokenizer.chat_template = CHAT
    return tokenizer


def randomised(network):
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter) * (parameter.ndim > 1)
    return network


def save(folder, *parts):
    for part in parts:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Folders by name"
    root, tokenizer = tmp_path_factory.mktemp("scorers_2026"), byte_tokenizer()
    mark = dict(zip(MARKS, tokenizer.convert_tokens_to_ids(MARKS)))
    marks = dict(image_token_id=mark["<|image_pad|>"], video_token_id=mark["<|video_pad|>"])
    marks |= dict(vision_start_token_id=mark["<|vision_start|>"], vision_end_token_id=mark["<|vision_end|>"])
    text = dict(**NARROW, vocab_size=len(tokenizer) + 3, num_key_value_heads=1)
    turns = dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2])
    square = SiglipImageProcessorPil(size=dict(height=28, width=28))
    seeing = dict(patch_size=4, merge_size=2, size=dict(shortest_edge=16**2, longest_edge=32**2))
    seeing3, seeing2 = Qwen2VLImageProcessorPil(**seeing), Qwen2VLImageProcessorPil()
    halves = dict(text_config=dict(**NARROW, vocab_size=300, max_position_embeddings=12))
    siglip = SiglipModel(SiglipConfig(**halves, vision_config=dict(**NARROW, image_size=28, patch_size=14)))
    vision = dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, out_hidden_size=32)
    vision |= dict(num_position_embeddings=16, deepstack_visual_indexes=[0])
    told = dict(**text, head_dim=16, rope_parameters=turns | dict(mrope_interleaved=True))
    qwen3 = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=told, vision_config=vision, **marks))
    vision = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, patch_size=14, mlp_ratio=1)
    qwen2 = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=dict(**text, rope_parameters=turns), vision_config=vision, **marks)
    )
    dino = Dinov2Model(Dinov2Config(**NARROW, mlp_ratio=1, image_size=28, patch_size=14))
    crop = BitImageProcessorPil(size=dict(shortest_edge=32), crop_size=dict(height=28, width=28))
    folders = {
        "siglip": save(root / "siglip", randomised(siglip), tokenizer, square),
        "qwen3": save(root / "qwen3", randomised(qwen3), tokenizer, seeing3),
        "qwen2": save(root / "qwen2", randomised(qwen2), tokenizer, seeing2),
        "dino": save(root / "dino", randomised(dino), crop),
        "hpsv3": root / "hpsv3",
    }
    qwen2.resize_token_embeddings(len(tokenizer) + 1)
    qwen2.rm_head = nn.Sequential(
        nn.Linear(32, 8), nn.ReLU(), nn.Dropout(0.05), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)
    )
    folders["hpsv3"].mkdir()
    save_file({n: t.clone() for n, t in qwen2.state_dict().items()}, folders["hpsv3"] / "HPSv3.safetensors")
    return folders


@pytest.fixture
def options(made):
    "Of each reward, with local folders"
    return {
        "siglip2": dict(model=made["siglip"]),
        "vqascore": dict(model=made["qwen3"], precision="fp32"),
        "hpsv3": dict(model=made["hpsv3"], base=made["qwen2"], instruction=TOLD, precision="fp32"),
    }


@pytest.fixture(scope="module")
def built(made):
    "Each reward in float32"
    instruction = dict(base=made["qwen2"], instruction=TOLD, precision="fp32")
    return {
        "siglip2": SigLIP2(made["siglip"]),
        "vqascore": VQAScore(made["qwen3"], precision="fp32"),
        "hpsv3": HPSv3(made["hpsv3"], **instruction),
    }


NAMES = ["siglip2", "vqascore", "hpsv3"]


def altered(folder, place, name, **changes):
    "A copy with other settings in one of its files"
    shutil.copytree(folder, place, dirs_exist_ok=True)
    settings = json.loads((place / name).read_text())
    (place / name).write_text(json.dumps(settings | changes))
    return place


# The protocol


@pytest.mark.parametrize("name", NAMES)
def test_scores_do_not_depend_on_the_batch_and_texts_are_read_once(options, name, monkeypatch):
    reward, images = get_reward(name, **options[name], chunk=2), pictures()
    scores = checked(reward, images, PROMPTS)
    assert scores.dtype == torch.float32 and len(reward._prompts) == 2
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-6)
    assert (scores[0] - scores[2]).abs() > 1e-5  # the same prompt, another picture
    assert (reward(images[:1], PROMPTS[1:2]) - scores[0]).abs() > 1e-6  # the same picture, another prompt
    assert not reward.network.training and not any(p.requires_grad for p in reward.network.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_reaches_the_pictures(built, name):
    images = pictures().requires_grad_()
    built[name](images, PROMPTS).sum().backward()
    assert images.grad.isfinite().all() and all(image.any() for image in images.grad)


@pytest.mark.parametrize("name", ["vqascore", "hpsv3"])
def test_bfloat16_is_the_default_and_near(built, options, name):
    exact = built[name](pictures(), PROMPTS)
    rough = get_reward(name, **{**options[name], "precision": "bf16"})
    assert next(rough.network.parameters()).dtype == torch.bfloat16
    assert "bf16" in str(type(rough).__init__.__kwdefaults__["precision"])
    assert (rough(pictures(), PROMPTS) - exact).abs().max() < 0.1 * exact.abs().max()


def test_rotary_frequencies_stay_in_float32(options):
    "A network that is cast as a whole loses the digits of its positions"
    network = get_reward("vqascore", **options["vqascore"] | dict(precision="bf16")).network
    frequencies = [buffer for name, buffer in network.named_buffers() if "inv_freq" in name]
    assert frequencies and all(buffer.dtype == torch.float32 for buffer in frequencies)


def test_the_registry_lists_them():
    assert set(NAMES) == set(scorers) <= set(rewards) and scorers["hpsv3"] is HPSv3


@pytest.mark.slow
def test_nothing_is_imported_before_it_is_asked_for():
    code = "import sys, sdpo_nb.rewards as r; assert 'hpsv3' in r.rewards and 'sdpo_nb.scorers_2026' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


# Pictures and tokens


@pytest.mark.parametrize("low, high", [(16**2, 32**2), (56 * 56, 28 * 28 * 1280), (200704, 200704)])
def test_sizes_are_those_of_transformers(low, high):
    for unit in (8, 28, 32):
        for sides in [(40, 56), (512, 512), (768, 1344), (1024, 333), (30, 900)]:
            assert _whole_tokens(*sides, unit, low, high) == smart_resize(*sides, unit, low, high)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_any_shape_are_scored(built, name):
    for size in [(16, 16), (200, 30)]:
        assert built[name](pictures(*size), PROMPTS).isfinite().all()


def test_a_prompt_with_a_token_of_its_own_is_refused(built):
    for name, text in (("vqascore", "<|image_pad|>"), ("hpsv3", "<|image_pad|>"), ("hpsv3", "<|Reward|>")):
        with pytest.raises(ValueError, match=f"reward '{name}'.*leave it out"):
            built[name](pictures(), [text] * 3)


def test_braces_in_a_prompt_are_text(built):
    for name in NAMES:
        assert built[name](pictures(), ["a {red} {0} circle {}"] * 3).isfinite().all()


# VQAScore


def test_other_qwens_can_be_asked(made):
    scores = VQAScore(made["qwen2"], precision="fp32")(pictures(), PROMPTS)
    assert ((scores > 0) & (scores < 1)).all()
    other = VQAScore(made["qwen2"], question="{}?", precision="fp32")(pictures(), PROMPTS)
    assert (scores - other).abs().max() > 1e-6


def test_a_tokenizer_without_yes_or_chat_is_refused(made, tmp_path):
    save(tmp_path / "mute", Qwen3VLForConditionalGeneration.from_pretrained(made["qwen3"]), byte_tokenizer(()))
    save(tmp_path / "mute", Qwen2VLImageProcessorPil())
    with pytest.raises(OSError, match="reward 'vqascore', model: its tokenizer has no token for 'Yes'"):
        VQAScore(tmp_path / "mute")
    (tmp_path / "mute" / "chat_template.jinja").unlink()
    with pytest.raises(OSError, match="reward 'vqascore', model: its tokenizer has no chat template"):
        VQAScore(tmp_path / "mute")


def test_another_kind_of_network_is_refused(made):
    asked = dict(network=nn.Linear(1, 1), tokenizer=byte_tokenizer(), settings={})
    config = Qwen3VLConfig()
    config.model_type = "llava"
    with pytest.raises(OSError, match="it is a llava: give one of qwen2_vl, qwen2_5_vl, qwen3_vl"):
        VisionLanguageScorer("mine", config=config, **asked)


# HPSv3


def test_both_generations_of_names_are_read(made, built, options, tmp_path):
    state = load_file(made["hpsv3"] / "HPSv3.safetensors")
    assert any(name.startswith("model.language_model.") for name in state)
    old = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): t
        for name, t in state.items()
    }
    save_file(old, tmp_path / "HPSv3.safetensors")
    other = get_reward("hpsv3", **options["hpsv3"] | dict(model=tmp_path))
    assert torch.equal(built["hpsv3"](pictures(), PROMPTS), other(pictures(), PROMPTS))


@pytest.mark.parametrize("lost", ["rm_head.3.bias", "model.language_model.layers.0.mlp.up_proj.weight", "visual"])
def test_incomplete_weights_are_refused(made, options, tmp_path, lost):
    state = load_file(made["hpsv3"] / "HPSv3.safetensors")
    save_file({name: tensor for name, tensor in state.items() if lost not in name}, tmp_path / "HPSv3.safetensors")
    with pytest.raises(OSError, match="^reward 'hpsv3', model: .* lack") as caught:
        get_reward("hpsv3", **options["hpsv3"] | dict(model=tmp_path))
    assert "\n" not in str(caught.value)


def test_without_the_authors_package_the_remedy_is_told(made, options, monkeypatch, tmp_path):
    asked = options["hpsv3"] | dict(instruction=None)
    with pytest.raises(
        OSError, match="reward 'hpsv3', instruction: .*not installed: run `pip install --no-deps hpsv3`"
    ):
        get_reward("hpsv3", **asked)
    (tmp_path / "hpsv3" / "dataset").mkdir(parents=True)
    (tmp_path / "hpsv3" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(OSError, match="data_collator_qwen.py' does not hold the authors' wording"):
        _authors_text()


# What goes wrong


@pytest.mark.parametrize(
    "name, changes, sentence",
    [
        ("siglip2", dict(scale="official"), "reward 'siglip2', scale='official' is not known: choose 'cosine' or"),
        (
            "vqascore",
            dict(precision="fp16"),
            "reward 'vqascore', precision='fp16' is not known: choose 'fp32' or 'bf16'",
        ),
        ("vqascore", dict(question="Yes?"), "reward 'vqascore', question='Yes.' has no single place for the prompt"),
        ("vqascore", dict(chunk=0), "reward 'vqascore', chunk=0 is no number of pictures"),
        ("hpsv3", dict(precision=16), "reward 'hpsv3', precision=16 is not known"),
        ("hpsv3", dict(instruction="{text_prompt}"), "reward 'hpsv3', instruction: it needs {text_prompt} and"),
        ("hpsv3", dict(models="x"), "unexpected keyword argument 'models'"),
    ],
)
def test_wrong_options(options, name, changes, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        get_reward(name, **options[name] | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, field", [*((name, "model") for name in NAMES), ("hpsv3", "base")])
def test_paths_that_lead_nowhere(options, name, field):
    with pytest.raises(OSError, match=f"^reward '{name}', {field}: './nowhere' is no folder or file here") as caught:
        get_reward(name, **options[name] | {field: "./nowhere"})
    assert "\n" not in str(caught.value)


def test_folders_that_lack_something(made, options, tmp_path):
    with pytest.raises(OSError, match="reward 'hpsv3', model: the folder .* holds no HPSv3.safetensors"):
        get_reward("hpsv3", **options["hpsv3"] | dict(model=tmp_path))
    save(tmp_path, SiglipModel.from_pretrained(made["siglip"]), byte_tokenizer())
    with pytest.raises(OSError, match="reward 'siglip2', model: the folder .* holds no preprocessor_config.json"):
        SigLIP2(tmp_path)
    for text, told in {
        "{": "could not load .*preprocessor_config.json",
        "[]": "the preprocessor_config.json of .* holds a list, not settings by name: copy the file again",
        '{"image_mean": [0.5, 0.5, 0.5]}': "image_std is None in the preprocessor_config.json of .*: give three",
    }.items():
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(OSError, match=f"^reward 'siglip2', model: {told}"):
            SigLIP2(tmp_path)


def test_a_qwen_without_the_size_of_its_patches_is_refused(made, tmp_path):
    folder = altered(made["qwen3"], tmp_path, "preprocessor_config.json", merge_size=None)
    with pytest.raises(
        OSError, match="reward 'vqascore', model: merge_size is None in its preprocessor_config.json: g"
    ):
        VQAScore(folder)


# Diversity


def test_features_are_compared_within_a_prompt(made):
    dinov2, images = DINOv2(made["dino"], chunk=2), pictures()
    features = dinov2(images)
    assert features.shape == (3, 32) and dinov2.name == str(made["dino"])
    torch.testing.assert_close(features[1:2], dinov2(images[1:2]))
    apart = feature_diversity(features[[0, 2]], ["a", "a"])
    assert 0 < apart < 2 and feature_diversity(features, ["a", "b", "a"]) == pytest.approx(apart, abs=1e-6)
    both = [feature_diversity(features[pair], ["a", "a"]) for pair in ([0, 1], [0, 2], [1, 2])]
    assert feature_diversity(features, ["a"] * 3) == pytest.approx(sum(both) / 3, abs=1e-6)
    assert feature_diversity(dinov2(images[:1].expand(3, -1, -1, -1)), ["a"] * 3) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["siglip", "qwen2"])
def test_only_a_dinov2_has_its_features(made, kind):
    with pytest.raises(OSError, match=f"dinov2, model: .*/{kind}' is a {kind}.*: give a DINOv2, such as facebook/"):
        DINOv2(made[kind])


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            dict(size=dict(height=32, width=32)),
            "size is {'height': 32, 'width': 32} in its preprocessor_config.json: g",
        ),
        (dict(size=32), "size is 32 in its preprocessor_config.json: give {'shortest_edge': 256}, as DINOv2 was"),
        (
            dict(crop_size=None),
            "crop_size is None in its preprocessor_config.json: give a square with sides from 14 to 32",
        ),
        (dict(crop_size=dict(height=56, width=56)), "crop_size is {'height': 56, 'width': 56} in its preprocessor"),
        (dict(crop_size=dict(height=28, width=14)), "crop_size is {'height': 28, 'width': 14} in its preprocessor"),
        (dict(crop_size=dict(height=8, width=8)), "crop_size is {'height': 8, 'width': 8} in its preprocessor"),
        (
            dict(do_center_crop=False),
            "do_center_crop is False in its preprocessor_config.json: give True, as DINOv2 was",
        ),
        (dict(resample=2), "resample is 2 in its preprocessor_config.json: give 3, as DINOv2 was"),
        (dict(image_mean=None), "image_mean is None in the preprocessor_config.json of "),
        (dict(image_std=[1, 1, 0]), "image_std is [1, 1, 0] in the preprocessor_config.json of "),
    ],
)
def test_pictures_prepared_in_another_way_are_refused_before_the_weights(made, tmp_path, changes, sentence):
    folder = altered(made["dino"], tmp_path, "preprocessor_config.json", **changes)
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=f"^dinov2, model: {re.escape(sentence)}") as caught:
        DINOv2(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_a_list_in_place_of_settings_is_refused(made, tmp_path, file):
    shutil.copytree(made["dino"], tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text("[]")
    with pytest.raises(OSError, match=f"^dinov2, model: the {file} of .* holds a list, not settings by name: copy"):
        DINOv2(tmp_path)


def test_places_and_chunks_of_a_dinov2(made, tmp_path):
    for place in ("", " ", None, str(made["dino"] / "config.json")):
        with pytest.raises(ValueError, match=re.escape(f"dinov2, model={place!r} is no folder: give that of a DINOv2")):
            DINOv2(place)
    for chunk in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"^dinov2, chunk={chunk} is no number of pictures: give an integer"):
            DINOv2("./nowhere", chunk=chunk)
    folder = altered(made["dino"], tmp_path, "config.json")
    (folder / "config.json").write_text("{}")
    with pytest.raises(OSError, match="' is a network without model_type: give a DINOv2"):
        DINOv2(folder)


def test_two_folders_of_one_name_are_two_networks(made, tmp_path):
    other = shutil.copytree(made["dino"], tmp_path / "other" / "dino")
    ask = partial(step_generalization, steps=(1,), samples=2, batch_size=2)
    policy = load_policy("tiny", device="cpu")
    before, after = (ask(policy, "warmth", ["a star"], features=DINOv2(place)) for place in (made["dino"], other))
    with pytest.raises(ValueError, match="features differs between before"):
        compare(before, after)


def test_a_broken_network_is_refused_by_the_command(made, finished_run, tmp_path, capfd):
    folder = shutil.copytree(made["dino"], tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"layernorm.bias": weights["layernorm.bias"] * torch.nan}, folder / "model.safetensors")
    words = [str(finished_run), "--steps", "1,2", "--output", str(tmp_path / "new.json"), "--dinov2"]
    assert eval_command([*words, str(folder)]) == 2
    assert "features has length nan in row 0 (4 of 4 rows are zero or not finite)" in capfd.readouterr().err
    assert not (tmp_path / "new.json").exists()


def test_an_evaluation_has_the_diversity_of_its_own_pictures(made, folder, tmp_path):
    policy, asked = load_policy(folder, device="cpu"), ["a cat", "a dog"]
    measured = [
        step_generalization(
            policy,
            "warmth",
            asked,
            steps=(1, 2),
            samples=6,
            batch_size=size,
            features=DINOv2(made["dino"], chunk=chunk),
        )
        for size, chunk in ((6, 16), (4, 3))
    ]
    stored = read_json(write_json(tmp_path / "evaluation.json", compare(*measured)))
    prompts, seeds = evaluation_pairs(asked, 6, 0)
    images = [policy.sample(prompts, steps, seeds=seeds) for steps in (1, 2)]
    by_hand = [feature_diversity(DINOv2(made["dino"])(of_step), prompts) for of_step in images]
    assert min(by_hand) > 1e-4 and stored["features"] == str(made["dino"])
    for sizes in ("before", "after"):  # of batches: they have no influence
        assert stored["feature_diversity"][sizes] == pytest.approx(by_hand, rel=1e-3)


def test_the_command_measures_it_for_the_card_of_a_run(made, finished_run, tmp_path, capfd, monkeypatch):
    "The table of the pipeline's own scheduler stays beside; a second command measures that one"
    monkeypatch.chdir(made["dino"].parent)
    run = shutil.copytree(finished_run, tmp_path / "run")
    first, file = read_json(run / "evaluation.json"), run / "evaluation.json"
    words = [str(run), "--steps", "1,2", "--output", str(file), "--dinov2"]
    assert eval_command([*words, "dino"]) == 0
    output, errors = capfd.readouterr()
    assert "diversity  dino diversity\n" in output and not errors
    numbers = read_json(file)["feature_diversity"]
    shown = [f"{before:.3f} → {after:.3f}" for before, after in zip(numbers["before"], numbers["after"])]
    pages = model_card(run), write_report(run).read_text(encoding="utf-8")
    assert all(text in page for page in (output, *pages) for text in shown) and "| dino diversity |" in pages[0]
    trained = read_json(file)
    assert trained["steps"] == [1, 2] and trained["own_scheduler"] == first["own_scheduler"]
    assert eval_command([*words, "dino", "--own_scheduler"]) == 0
    both = read_json(file)
    assert both["own_scheduler"]["features"] == "dino" and both | {"own_scheduler": 0} == trained | {"own_scheduler": 0}
    assert model_card(run).count("| dino diversity |") == 2 and capfd.readouterr().err == ""
    for place, told in (("./nowhere", "'./nowhere' is no folder or file here"), (str(made["siglip"]), "is a siglip")):
        assert eval_command([*words, place]) == 1
        error = capfd.readouterr().err
        assert error.startswith("sdpo-eval: dinov2, model: ") and told in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "words, sentence",
    [
        (
            ["--dinov2", ""],
            "sdpo-eval: dinov2, model='' is no folder: give that of a DINOv2, or facebook/dinov2-base.\n",
        ),
        (
            ["--dinov2", "x/y", "--samples", "2"],
            "sdpo-eval: samples=2 makes no two pictures of one prompt for f",
        ),
        (["--output", ""], "sdpo-eval: output is '.'; let it end in .json.\n"),
    ],
)
def test_what_the_command_refuses_before_it_loads_anything(finished_run, capfd, monkeypatch, words, sentence):
    monkeypatch.setattr("sdpo_nb.models.load_policy", None)
    assert eval_command([str(finished_run), "--steps", "1", *words]) == 2
    error = capfd.readouterr().err
    assert error.startswith(sentence) and error.count("\n") == 1
