"""Votes and what is learnt from them: damaged files, refusals, resuming, and everybody who clicks at the wrong time."""

import json
import random
import re
import warnings
from threading import Thread
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from random_pipelines import random_tokenizer
from safetensors.torch import save_file
from test_scorers import randomise, tiny_clip
from transformers import CLIPModel

from sdpo_nb.ballot import Ballot, FreshVotes, SimulatedVoter, cast_votes
from sdpo_nb.config import TrainConfig
from sdpo_nb.hub import clip_normalize, clip_pixels
from sdpo_nb.models import load_policy
from sdpo_nb.request import check_reward, check_reward_files
from sdpo_nb.rewards import get_reward, parse_mixture, reward_files, reward_fingerprint
from sdpo_nb.shapes import random_scenes, render
from sdpo_nb.taste import fit_linear, get_features, load_taste, save_taste, train_taste
from sdpo_nb.trainer import Trainer
from sdpo_nb.votes import append_vote, read_votes, undo_vote
from sdpo_nb.voting import PreferenceVote, VotePage, static_votes, vote_command

TOLD = dict(policy="tiny", steps=2, seeds=(0, 1), how="random")
PROMPTS = ["a circle", "a square", "a star"]


def scenes(number, seed=0):
    "Pictures of the embedded world that need no model"
    return render(random_scenes(number, torch.Generator().manual_seed(seed)))


def redder(images):
    "Whose picture is redder"
    redness = (images[:, 0] - images[:, 2]).mean((1, 2))
    return "left" if redness[0] > redness[1] else "right"


def fill(folder, number, choose=redder, prompts=PROMPTS, seed=0, **changes):
    "A folder with so many votes"
    images = scenes(2 * number, seed)
    for index in range(number):
        two = images[2 * index : 2 * index + 2]
        append_vote(folder, two, **{**TOLD, "prompt": prompts[index % len(prompts)], "choice": choose(two), **changes})
    return folder


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny", device="cpu")


@pytest.fixture(scope="module")
def voted(tmp_path_factory):
    "A folder with sixty votes and the reward that they taught"
    folder = fill(tmp_path_factory.mktemp("votes") / "red", 60)
    train_taste(folder)
    return folder


# --- the file


@pytest.mark.parametrize(
    "line, problem",
    [
        ("not json", "Expecting value"),
        ('{"prompt": "a circle"}', "required positional arguments"),
        ("[1, 2]", ""),
        ("null", ""),
        ('{"choice": "lef', "Unterminated string"),
    ],
)
def test_a_damaged_line_is_named_and_the_others_are_kept(tmp_path, line, problem):
    path = fill(tmp_path, 3) / "votes.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.warns(UserWarning, match=rf"Line 2 of .* is no vote \(.*{problem}.*\): it is left out, .*other 3"):
        assert len(read_votes(tmp_path)) == 3


@pytest.mark.parametrize("change", [dict(left="../../etc/passwd"), dict(choice="best"), dict(size=[32]), dict(seeds=3)])
def test_a_line_with_an_impossible_value_is_damaged(tmp_path, change):
    path = fill(tmp_path, 2) / "votes.jsonl"
    record = json.loads(path.read_text().splitlines()[0])
    path.write_text(path.read_text() + json.dumps(record | change) + "\n")
    with pytest.warns(UserWarning, match="Line 3 of"):
        assert len(read_votes(tmp_path)) == 2


def test_whatever_happens_to_the_file_it_can_be_read(tmp_path):
    path = fill(tmp_path, 4) / "votes.jsonl"
    whole, dice = path.read_bytes(), random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(dice.randrange(1, 5)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        path.write_bytes(bytes(data[: dice.randrange(len(data) + 1)]))
        with warnings.catch_warnings(action="ignore"):
            votes = read_votes(tmp_path)
            undone = undo_vote(tmp_path)
            assert (undone is None) == (not votes) and len(read_votes(tmp_path)) == max(0, len(votes) - 1)


def test_a_torn_line_is_replaced_by_the_next_vote(tmp_path):
    path = fill(tmp_path, 3) / "votes.jsonl"
    with open(path, "a") as file:
        file.write('{"prompt": "a cir')
    assert len(read_votes(tmp_path)) == 3
    fill(tmp_path, 1)
    assert len(read_votes(tmp_path)) == 4 and len(path.read_text().splitlines()) == 4


def test_undo_leaves_the_file_as_it_was(tmp_path):
    path = fill(tmp_path, 3) / "votes.jsonl"
    before = path.read_bytes()
    fill(tmp_path, 1, seed=5)
    assert undo_vote(tmp_path) and path.read_bytes() == before
    assert undo_vote(tmp_path / "nowhere") is None and not (tmp_path / "nowhere").exists()


# --- learning, and refusing to


def coin(images):
    return "left" if images.sum().item() * 1e4 % 1 < 0.5 else "right"


@pytest.mark.parametrize(
    "number, choose, sentence",
    [
        (0, redder, "there are 0 votes, and fewer than 20 say too little"),
        (19, redder, "there are 19 votes"),
        (25, lambda images: "equal", "all 25 votes are ties"),
        (40, coin, r"of 40 held-out votes \(95 % interval \d+% to \d+%\), which is not better than chance"),
    ],
)
def test_votes_that_do_not_tell_are_refused(tmp_path, number, choose, sentence):
    fill(tmp_path, number, choose)
    with pytest.raises(ValueError, match=f"do not tell: .*{sentence}.*Vote on, or insist with force=True"):
        train_taste(tmp_path)
    assert not (tmp_path / "taste.safetensors").exists() and not (tmp_path / "README.md").exists()


def test_whoever_insists_is_told_on_the_card(tmp_path):
    fill(tmp_path, 12)
    assert train_taste(tmp_path, force=True).facts["doubt"]
    assert "**Forced**: there are 12 votes" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="there are 0 votes"):
        train_taste(tmp_path / "empty", force=True)


def test_one_prompt_only_is_said(tmp_path):
    fill(tmp_path, 40, prompts=["a circle"])
    with pytest.warns(UserWarning, match="All votes in .* are about 'a circle'"):
        train_taste(tmp_path)


@pytest.mark.parametrize("change", [dict(policy="stabilityai/sd-turbo"), dict(steps=2)])
def test_votes_about_two_models_or_sizes_are_not_mixed(tmp_path, change):
    fill(tmp_path, 2)
    images = torch.rand(2, 3, 64, 64) if "policy" not in change else scenes(2)
    append_vote(tmp_path, images, **{**TOLD, "prompt": "a circle", "choice": "left", **change})
    name = "policy" if "policy" in change else "size"
    with pytest.raises(ValueError, match=rf"^{name} is .*, but vote 3 in .* use another folder"):
        train_taste(tmp_path)


def test_a_missing_picture_is_named(tmp_path):
    fill(tmp_path, 20)
    next((tmp_path / "pictures").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"[0-9a-f]{16}\.png' is missing or damaged"):
        train_taste(tmp_path)


def test_separable_votes_have_a_solution():
    rows = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).double() * 100
    weights = fit_linear(rows, torch.ones(6).double(), torch.tensor([1e-6]).double(), torch.ones(1, 6).double())
    assert weights.isfinite().all() and (rows @ weights[0] > 0).all()


def test_two_layers_learn_what_a_line_cannot(tmp_path):
    fill(tmp_path, 60)
    taste = train_taste(tmp_path, head="two_layers")
    assert taste.facts["accuracy"] > 0.6 and load_taste(tmp_path).facts["head"] == "two_layers"
    with pytest.raises(ValueError, match="head is 'three', which is none of linear, two_layers"):
        train_taste(tmp_path, head="three")


# --- the reward


def test_the_reward_is_what_was_trained(voted):
    images = scenes(30, seed=9)
    scores = get_reward(f"votes:{voted}")(images, ["a circle"] * 30)
    redness = (images[:, 0] - images[:, 2]).mean((1, 2))
    assert torch.corrcoef(torch.stack([scores, redness]))[0, 1] > 0.8 and scores.dtype == torch.float32
    with pytest.raises(ValueError, match="about pictures of 32×32 pixels, not 64×64"):
        load_taste(voted)(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize(
    "text, weights",
    [
        ("votes:runs/a", {"votes:runs/a": 1}),
        ("0.5*votes:runs/my-2+warmth", {"votes:runs/my-2": 0.5, "warmth": 1}),
        ("warmth-2*votes:~/a.b/c", {"warmth": 1, "votes:~/a.b/c": -2}),
        ("votes:a - warmth", {"votes:a": 1, "warmth": -1}),
        ("votes:a-0.5*votes:b", {"votes:a": 1, "votes:b": -0.5}),
    ],
)
def test_folders_of_votes_in_mixtures(text, weights):
    assert parse_mixture(text) == weights


def test_a_mixture_knows_its_files(voted, tmp_path):
    other = fill(tmp_path / "blue", 40, lambda images: {"left": "right", "right": "left"}[redder(images)])
    train_taste(other)
    reward = get_reward(f"2*votes:{voted}-0.5*votes:{other}")
    images = scenes(4)
    parts = [get_reward(f"votes:{folder}")(images, [""] * 4) for folder in (voted, other)]
    torch.testing.assert_close(reward(images, [""] * 4), 2 * parts[0] - 0.5 * parts[1])
    files = reward_files(reward)
    assert [*files] == [f"votes:{voted}", f"votes:{other}"]
    check_reward_files(reward.name, files)
    before = reward_fingerprint(get_reward(f"votes:{other}"))
    fill(other, 5, seed=3)
    train_taste(other)
    assert reward_fingerprint(get_reward(f"votes:{other}")) != before
    with pytest.raises(ValueError, match="has changed since the run was started"):
        check_reward_files(reward.name, files)


def test_a_taste_can_be_saved_elsewhere(voted, tmp_path):
    taste, images = load_taste(voted), scenes(5)
    path = save_taste(taste, tmp_path / "copy")
    assert torch.equal(load_taste(path.parent)(images), taste(images)) and (tmp_path / "copy" / "README.md").is_file()


@pytest.mark.parametrize("ask", [get_reward, check_reward])
def test_a_reward_that_is_not_there(ask, tmp_path):
    with pytest.raises(ValueError, match="there is no taste.safetensors in .*nowhere"):
        ask(f"votes:{tmp_path / 'nowhere'}")


def test_a_damaged_reward_is_named(tmp_path):
    path = tmp_path / "taste.safetensors"
    for data in (b"", b"x" * 100):
        path.write_bytes(data)
        with pytest.raises(OSError, match="taste.safetensors' is damaged or no taste") as caught:
            get_reward(f"votes:{tmp_path}")
        assert "\n" not in str(caught.value)
    save_file({"mean": torch.zeros(3)}, path)
    with pytest.raises(OSError, match="is damaged or no taste"):
        load_taste(tmp_path)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    "A narrow random CLIP in its folder"
    root = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = randomise(CLIPModel(tiny_clip(random_tokenizer(root / "vocabulary"))), 1)
    network.save_pretrained(root / "clip")
    return root / "clip", network


def test_clip_features_are_its_image_embeddings(clip, tmp_path):
    folder, network = clip
    images, features = torch.rand(18, 3, 40, 48), get_features(folder, (40, 48))
    with torch.no_grad():
        wanted = network.get_image_features(clip_normalize(clip_pixels(images, 28))).pooler_output
        torch.testing.assert_close(features(images), torch.nn.functional.normalize(wanted, dim=1))
    assert features.width == 24
    fill(tmp_path, 60)
    taste = train_taste(tmp_path, features=str(folder), force=True)
    images = scenes(5)
    torch.testing.assert_close(get_reward(f"votes:{tmp_path}")(images, [""] * 5), taste(images))


# --- the ballot and the voters


def test_a_ballot_resumes_where_it_was(policy, tmp_path):
    ballot = cast_votes(Ballot(policy, tmp_path, PROMPTS), SimulatedVoter("shapes_warmth"), 12)
    again = Ballot(policy, tmp_path, PROMPTS)
    assert again.pair["seeds"] == ballot.pair["seeds"] and again.pair["predicted"] == ballot.pair["predicted"]
    assert again.estimate("random") == ballot.estimate("random") and again.words() == ballot.words()
    shown = ballot.pair["seeds"]
    ballot.vote("equal")
    assert ballot.undo() and ballot.pair["seeds"] == shown and len(read_votes(tmp_path)) == 12


def test_no_pair_is_shown_twice(policy, tmp_path):
    ballot = cast_votes(Ballot(policy, tmp_path, ["a circle"], pool=3), SimulatedVoter("warmth"), 10)
    pairs = [frozenset(vote.seeds) for vote in ballot.votes]
    assert len({*pairs}) == 10  # a pool of three pictures has three pairs


def test_a_ballot_refuses_votes_about_other_pictures(policy, tmp_path):
    fill(tmp_path / "other", 1, policy="sd-turbo")
    with pytest.raises(ValueError, match="policy is 'tiny', but vote 1 in .* is about pictures of 'sd-turbo'"):
        Ballot(policy, tmp_path / "other", PROMPTS)
    append_vote(tmp_path / "large", torch.rand(2, 3, 64, 64), prompt="a circle", choice="left", **TOLD)
    with pytest.raises(ValueError, match=r"size is \(32, 32\), but vote 1 in .* is about pictures of \(64, 64\)"):
        Ballot(policy, tmp_path / "large", PROMPTS)
    for wrong in (dict(random_share=2), dict(pool=1), dict(num_steps=0)):
        with pytest.raises(ValueError, match=[*wrong][0]):
            Ballot(policy, tmp_path, PROMPTS, **wrong)
    with pytest.raises(ValueError, match="noise is 2"):
        SimulatedVoter("warmth", noise=2)


def test_wrong_clicks_are_as_many_as_they_should_be():
    voter, images = SimulatedVoter("warmth", noise=0.25), scenes(2)
    right = SimulatedVoter("warmth")(images, "")
    assert 0.2 < sum(voter(images, "") != right for _ in range(400)) / 400 < 0.3
    assert SimulatedVoter("warmth")(images[[0, 0]], "") == "equal"


def test_fresh_votes_find_out_a_reward_that_is_upside_down(policy, voted, tmp_path):
    config = TrainConfig(
        reward="warmth", epochs=1, pairs_per_epoch=4, num_steps=2, eval_samples=0, output_dir=str(tmp_path / "run")
    )
    watches = [FreshVotes(load_taste(voted), SimulatedVoter(text), 1, 24) for text in ("warmth", "-1*warmth")]
    reward = f"1*votes:{voted}+0.5*shapes_alignment"
    Trainer(load_policy("tiny", device="cpu"), reward, PROMPTS, config, watches).train()
    assert [record["epoch"] for record in watches[0].records] == [0, 1]
    assert not watches[0].records[0]["alarm"] and watches[0].records[0]["accuracy"] > 0.7
    assert watches[1].records[0]["alarm"] and watches[1].records[0]["accuracy"] < 0.3
    assert len((tmp_path / "run" / "fresh_votes.jsonl").read_text().splitlines()) == 4


# --- places to vote


def test_the_widget_says_what_went_wrong(policy, tmp_path, monkeypatch):
    widget = PreferenceVote(policy, PROMPTS, tmp_path, settle=0)
    widget.press("undo")
    assert "There is no vote to take back." in widget.status.value
    shown = widget.view.value
    monkeypatch.setattr(
        "sdpo_nb.ballot.append_vote", lambda *_, **__: (_ for _ in ()).throw(OSError("the disk is full"))
    )
    widget.buttons["left"].click()
    assert "the disk is full" in widget.status.value and widget.view.value == shown and not widget.ballot.votes
    monkeypatch.undo()
    widget.letters.value = "F"
    assert len(PreferenceVote(policy, PROMPTS, tmp_path).ballot.votes) == 1


def test_an_impatient_click_is_no_vote(policy, tmp_path):
    widget = PreferenceVote(policy, PROMPTS, tmp_path, settle=60)
    widget.buttons["left"].click()
    widget.letters.value = "fj"
    assert not widget.ballot.votes


def test_the_page_answers_nobody_else(policy, tmp_path):
    page = VotePage(Ballot(policy, tmp_path, PROMPTS))

    def status(path="do", data=b"{}", **headers):
        try:
            return urlopen(Request(page.address + path, data, headers)).status
        except HTTPError as error:
            return error.code

    good = json.dumps(dict(what="left", number=0)).encode()
    assert status(Host="evil.example", data=good) == 404 and status("../do", good) == 404
    assert status(data=b"not json") == 400 and status(data=b'{"what": "left"}') == 400 and not page.ballot.votes
    assert status(data=good) == 200 and status(data=good) == 200 and len(page.ballot.votes) == 1
    text = urlopen(page.address).read().decode()
    assert not re.search(r"(src|href)\s*=|https?://", text)  # nothing comes from outside
    page.close()


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["tiny", "--goal", "3"], "goal is 3"),
        (["tiny", "--port", "99999"], "port is 99999"),
        (["tiny", "--stepps", "3"], "There is no flag --stepps"),
        ([], "POLICY"),
    ],
)
def test_the_command_refuses_in_one_sentence(words, sentence, capfd):
    assert vote_command(words) == 2
    assert sentence in capfd.readouterr().err


def test_the_command_goes_from_votes_to_a_reward(tmp_path, monkeypatch, capfd):
    def click(address):
        for number in range(22):
            what = "finish" if number == 21 else ("left", "right")[number % 2]
            urlopen(Request(f"{address}do", json.dumps(dict(what=what, number=number)).encode())).read()

    monkeypatch.setattr("webbrowser.open", lambda address: Thread(target=click, args=[address]).start())
    folder = tmp_path / "my taste"
    assert vote_command(["tiny", "--folder", str(folder), "--force"]) == 0  # half left, half right: nothing to learn
    said = capfd.readouterr().out
    assert "Vote at http://127.0.0.1:" in said and "21 votes, 0 of them ties" in said and "Saved." in said
    assert len(get_reward(f"votes:{folder}")(scenes(3), [""] * 3)) == 3 and len(read_votes(folder)) == 21


def test_a_static_page_holds_all_it_needs():
    page = static_votes(scenes(6), ["a circle"] * 3 + ["</script><b>"] * 3)
    assert page.isascii() and page.count("</script>") == 1 and "http" not in page
    with pytest.raises(ValueError, match="6 pictures of 6 prompts; give at least two of one prompt"):
        static_votes(scenes(6), [str(i) for i in range(6)])
