"Rewards: the protocol and its checks, the registry, mixtures, and the networks on randomly initialised weights."

import functools
import hashlib
import math
import os
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).parent))
from random_pipelines import random_tokenizer

import sdpo_nb.rewards as module
import sdpo_nb.shapes as world
from sdpo_nb.rewards import (
    FunctionReward,
    Reward,
    RewardError,
    checked,
    colorfulness,
    get_reward,
    jpeg_kilobytes,
    load_text_encoder,
    parse_mixture,
    place_reward,
    register_reward,
    reward_files,
    reward_fingerprint,
    rewards,
    warmth,
)
from sdpo_nb.shapes import load_network, networks

without_weights = ["jpeg_compressibility", "jpeg_incompressibility", "colorfulness", "warmth"]
without_weights += ["shapes_size", "shapes_warmth"]
with_weights = ["shapes_aesthetic", "shapes_alignment"]


def noise(batch=3, size=32, seed=0):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def random_assets(tmp_path_factory):
    "A folder like the package's `assets`, its weights drawn at random"
    folder = tmp_path_factory.mktemp("assets")
    (folder / "networks").mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, kind in networks.items():
            save_file(kind().state_dict(), folder / "networks" / f"{name}.safetensors")
        tokenizer = random_tokenizer(folder / "tiny" / "tokenizer")
        tokenizer.save_pretrained(folder / "tiny" / "tokenizer")
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=4,
                max_position_embeddings=10,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        ).save_pretrained(folder / "tiny" / "text_encoder")
    return folder


@pytest.fixture
def assets(random_assets, monkeypatch):
    for home in (module, world):
        monkeypatch.setattr(home, "assets", random_assets)
    return random_assets


@pytest.fixture
def broken_assets(random_assets, tmp_path, monkeypatch):
    "A copy that a test may damage"
    copy = Path(shutil.copytree(random_assets, tmp_path / "assets"))
    for home in (module, world):
        monkeypatch.setattr(home, "assets", copy)
    return copy


@pytest.fixture(autouse=True)
def same_registry(monkeypatch):
    "What a test registers is gone after it"
    monkeypatch.setattr(module, "rewards", dict(rewards))
    monkeypatch.setattr(module, "_retry_after", module._retry_after)
    monkeypatch.setattr(sys, "path", [*sys.path])


# The protocol


@pytest.mark.parametrize("name", without_weights + with_weights)
@pytest.mark.parametrize("size, dtype", [(32, torch.float32), (48, torch.bfloat16), (16, torch.float32)])
def test_every_reward_keeps_the_protocol(assets, name, size, dtype):
    reward, images = get_reward(name), noise(size=size).to(dtype)
    assert isinstance(reward, Reward) and reward.name == name
    scores = reward(images, ["a red circle", "a blue square", ""])
    assert scores.shape == (3,) and scores.dtype == torch.float32 and scores.isfinite().all()
    assert torch.equal(checked(reward, images, ["a red circle", "a blue square", ""]), scores)


@pytest.mark.parametrize("name", without_weights + with_weights)
def test_a_score_does_not_depend_on_the_rest_of_the_batch(assets, name):
    images, prompts = noise(5), ["a red circle", "a blue square on a cat background", "a dog", "", "the red dog"]
    together = get_reward(name)(images, prompts)
    alone = torch.cat([get_reward(name)(images[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "output, sentence",
    [
        ([1.0, 2.0], "a list of length 2: return 3 numbers"),
        ((torch.ones(3), {}), "a tuple of length 2: return 3 numbers"),
        ((torch.ones(3), {}, None), "a tuple that holds something else than numbers: return 3 numbers"),
        (["1", "2", "3"], "a list that holds something else than numbers"),
        ([1.0, None, 2.0], "a list that holds something else than numbers"),
        ([1.0, 10**400, 2.0], "a list that holds something else than numbers"),
        ({"a": 1.0}, "a result of type dict"),
        (None, "a result of type NoneType"),
        ("123", "a result of type str"),
        (torch.ones(1, 3), r"shape \[1, 3\] instead of \[3\]"),
        (np.ones((3, 2)), r"shape \[3, 2\] instead of \[3\]"),
        (torch.tensor(1.0), r"shape \[\] instead of \[3\]"),
        (np.array(["1", "2", "3"]), "a list that holds something else than numbers"),
        (torch.ones(3, dtype=torch.complex64), "torch.complex64 scores"),
        (torch.tensor([1.0, math.inf, math.nan]), r"inf for image 1 \(prompt 'b'; 2 of 3"),
        ([1.0, math.nan, 2.0], r"nan for image 1 \(prompt 'b'; 1 of 3"),
        (torch.full((3,), 1e300, dtype=torch.float64), "inf for image 0"),
    ],
)
def test_checked_names_the_reward_and_what_is_wrong_with_its_output(output, sentence):
    reward = FunctionReward(lambda images, prompts: output, "suspicious")
    with pytest.raises(RewardError, match=f"^reward 'suspicious' returned {sentence}") as caught:
        checked(reward, noise(), list("abc"))
    shown = caught.value._render_traceback_()
    assert len(shown) == 1 and caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize(
    "output",
    [
        [0, 1, 2],
        (0.0, torch.tensor(1.0), np.float64(2)),
        [[0.0], [1.0], [2.0]],
        range(3),
        np.arange(3),
        np.arange(3, dtype=np.float16)[:, None],
        np.arange(3)[::-1][::-1],
        np.arange(3).astype(object),
        torch.arange(3),
        torch.arange(3.0)[:, None].bfloat16(),
        torch.arange(3.0, requires_grad=True),
    ],
    ids=lambda output: type(output).__name__,
)
def test_any_sequence_of_numbers_is_taken(output):
    scores = checked(lambda images, prompts: output, noise(), list("abc"))
    assert scores.tolist() == [0.0, 1.0, 2.0] and scores.dtype == torch.float32 and not scores.requires_grad


def test_a_reward_cannot_change_what_others_see():
    "Neither pictures, nor prompts, nor numbers that it returned before; in mixtures, and when it is asked again"
    buffer, calls = torch.zeros(3), []

    def vandal(images, prompts):
        buffer.copy_(images.mul_(0.5).mean((1, 2, 3)))
        prompts[:] = prompts[::-1] + ["more"]
        calls.append(images.max().item())
        if len(calls) % 2:
            raise ConnectionError
        return buffer

    register_reward("vandal", vandal)
    module._retry_after, images, prompts = 0.0, noise(), list("abc")
    kept = images.clone()
    first = checked(get_reward("vandal"), images, prompts)
    second = checked(get_reward("vandal"), images / 2, prompts)
    mixed = checked(get_reward("0*vandal+warmth"), images, prompts)
    assert torch.equal(images, kept) and prompts == list("abc") and len({*calls}) == 2
    assert torch.equal(first, (kept * 0.5).mean((1, 2, 3))) and not torch.equal(first, second)
    assert torch.equal(mixed, warmth(kept, prompts))


def test_an_error_is_shown_with_the_rewards_lines_alone(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n\ndef f(images, prompts):\n    return torch.ones(2) + torch.ones(3)\n"
    )
    with pytest.raises(RewardError, match=r"RuntimeError: .* \(in mine.py, line 4\)\.$") as caught:
        checked(get_reward(f"{tmp_path}/mine.py:f"), noise(), list("abc"))
    shown = "".join(caught.value._render_traceback_())
    assert shown.count("File ") == 1 and "mine.py" in shown and "rewards.py" not in shown


@pytest.mark.parametrize(
    "images, prompts, sentence",
    [
        (noise() * 255, list("abc"), "images range from"),
        (torch.full((3, 3, 8, 8), math.nan), list("abc"), "images range from nan"),
        (noise()[0], list("abc"), r"images is \[3, 32, 32\]"),
        (noise()[:0], [], r"images is \[0, 3, 32, 32\]"),
        ("picture.png", ["a"], "images is str"),
        (noise(), "abc", "prompts is one string for 3 images"),
    ],
)
def test_checked_says_what_is_wrong_with_its_input(images, prompts, sentence):
    with pytest.raises(ValueError, match=sentence):
        checked(get_reward("warmth"), images, prompts)


def test_checked_detaches():
    images = noise().requires_grad_()
    assert not checked(get_reward("warmth"), images, list("abc")).requires_grad


# The registry


def test_sources_that_make_rewards():
    images = noise()

    def constant(images, prompts, level=1.0):
        return torch.full((len(images),), float(level))

    register_reward("maker", lambda level=1.0: lambda images, prompts: constant(images, prompts, level))

    def required_maker(level):
        return lambda images, prompts: constant(images, prompts, level)

    register_reward("required_maker", required_maker)

    @register_reward("kind")
    class Kind:
        def __init__(self, level=1.0):
            self.level = level

        def __call__(self, images, prompts):
            return constant(images, prompts, self.level)

    register_reward("plain", constant)

    class Net(torch.nn.Module):
        def forward(self, images, prompts):
            return images.mean((1, 2, 3))

    register_reward("net", Net())
    for name in ("maker", "required_maker", "kind", "plain"):
        reward = get_reward(name, level=3)
        assert reward.name == name and isinstance(reward, Reward)
        assert checked(reward, images, list("abc")).tolist() == [3.0] * 3
    assert checked(get_reward("net"), images, list("abc")).shape == (3,)
    with pytest.raises(ValueError, match="unexpected keyword argument 'lvl'"):
        get_reward("kind", lvl=2)
    with pytest.raises(ValueError, match="reward 'required_maker' cannot be called"):
        get_reward("required_maker")


def test_callables_pass_through():
    ready = get_reward("warmth")
    assert get_reward(ready) is ready
    assert get_reward(warmth).name == "warmth"
    assert get_reward(lambda images, prompts: images.mean((1, 2, 3))).name == "lambda"
    assert torch.equal(get_reward("-warmth")(noise(), list("abc")), -ready(noise(), list("abc")))
    assert get_reward(get_reward("jpeg_compressibility").function, quality=20)(noise(), list("abc")).max() < 0


@pytest.mark.parametrize(
    "asked, sentence",
    [
        ("shapes-aesthetic", "nearest: 'shapes_aesthetic'"),
        ("", "reward '' is not known"),
        (None, "reward=None is of type NoneType"),
        (3, "reward=3 is of type int"),
        ("0.5*warmht+warmth", "reward 'warmht' is not known"),
        ("0.5*warmth+", "cannot be read from '\\+' on"),
        ("0.5*warmth warmth", "cannot be read from 'warmth' on"),
        ("inf*warmth", r"cannot be read from '\*warmth' on"),
        ("1e999*warmth", "the weight of reward 'warmth' is inf"),
        ({}, "a mixture without rewards"),
        ({"warmth": math.nan}, "the weight of reward 'warmth' is nan"),
        ({"warmth": "1"}, "the weight of reward 'warmth' is '1'"),
        ({"warmht": 1}, "nearest: 'warmth'"),
    ],
)
def test_get_reward_refuses_in_one_sentence(asked, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        get_reward(asked)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["two words", "a+b", "", "0.5*warmth", 3, warmth])
def test_names_that_a_mixture_could_not_hold_are_refused(name):
    with pytest.raises(ValueError, match="cannot name a reward"):
        register_reward(name, warmth)


# A reward of one's own, by its file


@pytest.fixture
def mine(tmp_path, monkeypatch):
    "A file with rewards, in the working folder"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if "pytest-of-" not in place])  # of other tests
    (tmp_path / "helper_of_mine.py").write_text("FACTOR = 3\n")
    path = tmp_path / "mine.py"
    path.write_text(
        """from helper_of_mine import FACTOR


def bright(images, prompts, factor=FACTOR):
    return factor * images.mean((1, 2, 3))


class Bright:
    name, device = "something else", None

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3)).tolist()


class rewards:
    bright = bright
    level = 3
"""
    )
    return path


@pytest.mark.parametrize(
    "text, factor",
    [
        ("mine.py:bright", 3),
        ("./mine.py:bright", 3),
        ("mine:bright", 3),
        ("mine.py:rewards.bright", 3),
        ("mine.py:Bright", 1),
        ("0.5*mine.py:bright+0*warmth", 1.5),
        ("-2 * mine.py:Bright + ./mine.py:bright", 1),
        ("0*warmth-mine.py:bright", -3),
    ],
)
def test_a_reward_by_its_file(text, factor, mine):
    images = noise()
    reward = get_reward(text)
    torch.testing.assert_close(checked(reward, images, list("abc")), factor * images.mean((1, 2, 3)))
    again = checked(get_reward(reward.name), images, list("abc"))
    assert torch.equal(again, checked(reward, images, list("abc")))
    assert {*reward_files(reward).values()} == {hashlib.sha256(mine.read_bytes()).hexdigest()}
    assert not list(mine.parent.rglob("*.pyc")) or ":bright" in text  # of the helper alone


def test_options_devices_and_odd_paths_of_a_file(mine, tmp_path):
    assert checked(get_reward("mine.py:bright", factor=0), noise(), list("abc")).tolist() == [0.0] * 3
    place_reward(reward := get_reward("mine.py:Bright+warmth"), "cpu")
    assert reward.rewards["mine.py:Bright"].function.device == "cpu"
    odd = tmp_path / "my-own rewards + more" / "warmth-2*.py"
    odd.parent.mkdir()
    odd.write_bytes(mine.read_bytes())
    assert get_reward(f"{odd}:bright").name == f"{odd}:bright"
    odd.rename(tmp_path / "warmth-mine.py")
    assert get_reward("warmth-mine.py:bright").name == "warmth-mine.py:bright"  # there is such a file
    assert [*parse_mixture("warmth-./mine.py:bright")] == ["warmth", "./mine.py:bright"]


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("nowhere.py:f", "reward is 'nowhere.py:f', but 'nowhere.py' is not found here; give the path"),
        ("nowhere:f", "but 'nowhere' is not found here"),
        ("sys:exit", "but 'sys' is not found here"),
        (".:f", "but '.' is not found here"),
        ("mine.py:brigth", "did you mean 'bright'"),
        ("mine.py:bright.more", "the name is 'more'"),
        ("mine.py:rewards.level", "reward=3 is of type int"),
        ("mine.py:rewards", "made an object of type rewards"),
        ("0.5*mine.py:bright+0.5*mine.py:brigth", "did you mean 'bright'"),
        ("mine.py:bright:2", "cannot be read from ':2' on"),
        ("mine.py:", "cannot be read from ':' on"),
        ("broken.py:f", r"cannot be loaded \(ZeroDivisionError: division by zero \(in broken.py, line 2\)\); mend"),
        ("unfinished.py:f", r"cannot be loaded \(SyntaxError: .*unfinished.py, line 1"),
        ("leaves.py:f", r"cannot be loaded \(SystemExit: "),
        ("binary.py:f", "cannot be loaded"),
    ],
)
def test_a_file_that_does_not_serve(text, sentence, mine, tmp_path):
    (tmp_path / "broken.py").write_text("x = 0\ny = 1 / x\n")
    (tmp_path / "unfinished.py").write_text("def f(\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit('bye')\n")
    (tmp_path / "binary.py").write_bytes(b"\x00\xff")
    with pytest.raises(ValueError, match=sentence) as error:
        get_reward(text)
    assert "\n" not in str(error.value)


def test_a_file_is_read_anew_when_it_has_changed(mine):
    before = get_reward("mine.py:bright")
    mine.write_text(mine.read_text().replace("factor *", "-factor *"))  # of the same size within a second or not
    after = get_reward("mine.py:bright")
    images = noise()
    assert torch.equal(before(images, []), -after(images, []))
    assert reward_files(before) != reward_files(after)
    assert reward_fingerprint(before) != reward_fingerprint(after)


def test_fingerprints_tell_rewards_apart():
    def scaled(factor, used=None):
        return lambda images, prompts: factor * images.mean((1, 2, 3))

    class Net(torch.nn.Module):
        def __init__(self, seed):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.layer = torch.nn.Linear(3, 1)

        def forward(self, images, prompts):
            return self.layer(images.mean((2, 3)))[:, 0]

    class Counting:
        def __init__(self, weights):
            self.weights, self._calls, self.device = weights, 0, "cpu"

        def __call__(self, images, prompts):
            self._calls += 1
            return images.mean((1, 2, 3))

    def make():
        return [scaled(1), scaled(-1), Net(0), Net(1), Counting([1, 2]), Counting([2, 1]), Counting({"a": np.ones(3)})]

    names = ["warmth", "colorfulness", "1*warmth-colorfulness", "0.5*warmth-colorfulness", "shapes_alignment"]
    first, second = ([reward_fingerprint(get_reward(source)) for source in [*make(), *names]] for _ in range(2))
    assert first == second and len({*first}) == len(first)
    used = get_reward("shapes_alignment")
    checked(used, noise(), list("abc"))
    assert reward_fingerprint(used) == first[-1]
    counting = Counting([1, 2])
    counting._calls, counting.device = 7, "cuda:1"
    assert reward_fingerprint(get_reward(counting)) == first[4]
    (partial,) = [functools.partial(warmth, prompts=[""])]
    loop = Counting(None)
    loop.weights = [loop, partial, open, threading.Lock(), torch.ones(2).to_sparse(), Path("x"), {1, 2}, ...]
    assert len(reward_fingerprint(loop)) == 64  # whatever it holds


# Mixtures


@pytest.mark.parametrize(
    "text, weights",
    [
        (" 2 * a - b ", dict(a=2.0, b=-1.0)),
        ("-a+1e-2*b", dict(a=-1.0, b=0.01)),
        ("a+a", dict(a=2.0)),
        (".5*a_2+1.*b", dict(a_2=0.5, b=1.0)),
    ],
)
def test_mixtures_are_read(text, weights):
    assert parse_mixture(text) == weights


def test_a_mixture_names_the_component_that_fails():
    register_reward("broken", lambda images, prompts: torch.full((len(images),), math.nan))
    with pytest.raises(ValueError, match="reward 'broken' returned nan"):
        get_reward("warmth+0*broken")(noise(), list("abc"))


# What is measured


def test_jpeg_sizes_are_those_of_files(tmp_path):
    from PIL import Image

    image = noise(1)
    Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "picture.jpg", quality=95)
    assert jpeg_kilobytes(image).item() == pytest.approx((tmp_path / "picture.jpg").stat().st_size / 1000)
    assert jpeg_kilobytes(image, 30) < jpeg_kilobytes(image)
    with pytest.raises(ValueError, match="quality=0 is no JPEG quality"):
        jpeg_kilobytes(image, 0)


def test_colorfulness_against_numpy():
    import numpy as np

    images = noise(4, 20)
    for image, score in zip(images.numpy() * 255, colorfulness(images, [""] * 4).tolist()):
        rg, yb = image[0] - image[1], (image[0] + image[1]) / 2 - image[2]
        assert score == pytest.approx(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()), rel=1e-4)


# Networks


def test_loading_draws_no_random_numbers_and_freezes(assets):
    before = torch.get_rng_state()
    reward = get_reward("shapes_alignment")
    oracle = load_network("oracle")
    assert torch.equal(torch.get_rng_state(), before)
    for net in (oracle, reward.model, reward.text_encoder):
        assert not net.training and not any(p.requires_grad for p in net.parameters())
    saved = load_file(assets / "networks" / "oracle.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in oracle.state_dict().items())


def test_half_precision_files_give_float32_networks(broken_assets):
    file = broken_assets / "networks" / "aesthetic.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, file)
    assert {p.dtype for p in load_network("aesthetic").parameters()} == {torch.float32}


def test_alignment_is_ten_cosines(assets):
    reward, images, prompts = get_reward("shapes_alignment"), noise(), ["a red circle", "a red square", "a red circle"]
    tokens = reward.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        text = reward.model.embed_text(reward.text_encoder(tokens).pooler_output)
        expected = 10 * torch.nn.functional.cosine_similarity(reward.model.embed_images(images), text)
    torch.testing.assert_close(reward(images, prompts), expected)


def test_each_caption_is_embedded_once(assets):
    reward, seen = get_reward("shapes_alignment"), []
    reward.text_encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    for _ in range(2):
        reward(noise(4), ["a red circle", "a red square", "a red circle ", ""])
    reward(noise(2), ["a red circle", "a blue dog"])
    assert seen == [1, 1, 1]


def test_captions_are_forgotten_in_the_end(assets, monkeypatch):
    "The newest few are kept; the empty caption scores 0 before and after"
    monkeypatch.setattr(module, "remember", functools.partial(module.remember, most=3))
    reward, captions = get_reward("shapes_alignment"), ["", "a red circle", "a blue ring", "a", "b", "c", "d"]
    one_by_one = torch.cat([reward(noise(1), [caption]) for caption in captions])
    assert [*reward._captions] == ["b", "c", "d"]
    together = reward(noise(1).expand(7, -1, -1, -1), captions)
    torch.testing.assert_close(one_by_one, together)
    assert one_by_one[0] == together[0] == 0 and len(reward._captions) == 3


def test_gradients_reach_the_pictures(assets):
    for name in with_weights:
        images = noise(2).requires_grad_()
        get_reward(name)(images, ["a red circle", "a dog"]).sum().backward()
        assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("name", list(networks))
def test_missing_and_damaged_weights_say_so(broken_assets, name):
    file = broken_assets / "networks" / f"{name}.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(OSError, match=f"weights of the {name} network in .* are damaged.*: reinstall sdpo_nb"):
        load_network(name)
    save_file({"something": torch.zeros(2)}, file)
    with pytest.raises(OSError, match="are damaged or of another version"):
        load_network(name)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"weights of the {name} network are missing at .*: reinstall sdpo_nb"):
        load_network(name)


def test_a_damaged_text_encoder_says_so(broken_assets):
    weights = broken_assets / "tiny" / "text_encoder" / "model.safetensors"
    whole = load_file(weights)
    save_file(dict(list(whole.items())[1:]), weights, metadata={"format": "pt"})
    with pytest.raises(OSError, match="text encoder in .* is damaged .*without"):
        load_text_encoder()
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(OSError, match="text encoder in .* is damaged"):
        load_text_encoder()
    for file in weights.parent.iterdir():
        file.unlink()
    weights.parent.rmdir()
    with pytest.raises(FileNotFoundError, match="text_encoder is missing"):
        get_reward("shapes_alignment")


def test_a_caption_scores_the_same_whatever_it_came_with():
    "To the last bit, with the shipped networks: a resumed run meets its captions in other batches than an unbroken one"
    captions = world.all_captions()[::7]
    alone, together = get_reward("shapes_alignment"), get_reward("shapes_alignment")
    one_by_one = torch.cat([alone.embed_captions([caption]) for caption in captions])
    assert torch.equal(one_by_one, together.embed_captions(captions))


def test_a_model_that_scores_can_live_elsewhere():
    class Model:
        name, device = "model", None

        def __call__(self, images, prompts):
            return images.mean((1, 2, 3))

    register_reward("on_a_device", Model)
    mixture, alone = get_reward("on_a_device+0.1*warmth"), get_reward("on_a_device")
    place_reward(mixture, "cuda:1")
    place_reward(alone, "cpu")
    assert mixture.rewards["on_a_device"].device == "cuda:1" and alone.device == "cpu"
    with pytest.raises(ValueError, match="reward_device is 'cuda:1', but the reward 'warmth' runs no model"):
        place_reward(get_reward("warmth"), "cuda:1")
