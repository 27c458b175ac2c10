"""Evidence for rewards that are learnt from votes, with simulated voters whose taste is known.

    python benchmarks/votes.py                      # everything -> accuracy, align and gain.jsonl in results/votes/
    python benchmarks/votes.py --groups accuracy --seeds 7
    python benchmarks/votes.py --check              # is everything there, and does a part come out the same again?

accuracy  10 to 200 votes, wrong clicks 0, 10 and 25 %, random and active pairs: how many preferences on pictures that
          nobody voted on does the reward predict, and what does its own estimate say? A minute a seed.
align     50 votes (10 % wrong), then the `tiny` preset with the learnt reward alone; then as long again, once with the
          same reward and once with a reward that was fitted again after 50 more votes on the aligned model's pictures;
          and the taste itself as the reward. Gains in the true taste at every step count. Eight minutes a seed.
gain      How that first training depends on the votes, one thing at a time: 10 or 200 votes, no wrong clicks or 25 % of
          them, random pairs only. Pictures, clicks and training have the seeds of `align`, so a line can be compared
          with the first stage of `align`. A fit that would be refused is forced; `doubt` says why. A seed: 15 min.

What is there already is left alone, so an interrupted call goes on where it stopped.
"""

import argparse
import math
import platform
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path

import torch
from evaluations import table
from experiments import shorten

from sdpo_nb.ballot import Ballot, FreshVotes, LinearFit, SimulatedVoter, best_l2, cast_votes, unseen_pairs
from sdpo_nb.config import preset_config
from sdpo_nb.evaluate import step_generalization
from sdpo_nb.files import append_jsonl, read_jsonl, versions
from sdpo_nb.models import load_policy
from sdpo_nb.prompts import prompt_lists
from sdpo_nb.rewards import checked, get_reward
from sdpo_nb.taste import get_features, held_out_margins, l2_candidates, measure_margins, standardise, train_taste
from sdpo_nb.trainer import Trainer

results = Path(__file__).parent / "results" / "votes"
groups = ["accuracy", "align", "gain"]
tastes = ("shapes_aesthetic", "shapes_size", "shapes_warmth")
noises, counts = (0.0, 0.1, 0.25), (10, 20, 30, 50, 100, 200)
prompts = list(prompt_lists["shapes_open"])
random_shares = {"mixed": 1 / 3, "random": 1.0}  # of the pairs to vote on; the others are chosen
centre = dict(votes=50, noise=0.1, how="mixed")  # what `align` votes with
around = [centre | change for change in (dict(votes=10), dict(votes=200), dict(noise=0.0), dict(noise=0.25))]
around.append(centre | dict(how="random"))
pool, unseen = 48, 40  # pictures of a prompt to vote on, and to measure with
machine = {"processor": platform.machine(), "system": platform.system()}


def known(group) -> list:
    "The lines that are there"
    path = results / f"{group}.jsonl"
    return read_jsonl(path) if path.is_file() else []


# --- accuracy ------------------------------------------------------------------------------------


@cache
def gallery() -> tuple:
    "Features `[6,88,D]` of pictures of every prompt, and what every taste thinks of them, `[6,88]` each"
    policy, network = load_policy("tiny", device="cpu"), get_features()
    features, thoughts = [], {taste: [] for taste in tastes}
    for number, prompt in enumerate(prompts):
        seeds = range(1000 * number, 1000 * number + pool + unseen)
        images = policy.sample([prompt] * len(seeds), 2, seeds=[*seeds])
        with torch.no_grad():
            features.append(network(images))
        for taste in tastes:
            thoughts[taste].append(checked(get_reward(taste), images, [prompt] * len(seeds)))
    return torch.stack(features), {taste: torch.stack(values) for taste, values in thoughts.items()}


def fresh_accuracy(fit, truth) -> float:
    "Share of all pairs of pictures of one prompt, none of them ever voted on, that the fit orders as the taste does"
    features, right = gallery()[0], []
    pairs = torch.combinations(torch.arange(pool, pool + unseen))
    for number in range(len(prompts)):
        margins = fit.margins(features[number], pairs)
        ahead = truth[number, pairs[:, 0]] - truth[number, pairs[:, 1]]
        right.append(((margins > 0) == (ahead > 0))[ahead != 0].float())
    return torch.cat(right).mean().item()


def look(seen, target, truth) -> dict:
    "What is known after so many votes: true accuracy, and the estimate that the voter would see"
    l2 = best_l2(seen, target)
    margins = held_out_margins(standardise(seen)[0], target)[l2_candidates.index(l2)]
    found = measure_margins(margins, target)
    accuracy = fresh_accuracy(LinearFit(seen, target, l2), truth)
    return dict(votes=len(target), accuracy=accuracy, l2=l2, estimate=found["accuracy"], interval=found["interval"])


def choose_pair(number, names, voted, fit, generator) -> torch.Tensor:
    "Two pictures of a dozen: those that teach most, or any where there is no fit"
    dozen = torch.randperm(pool, generator=generator)[:12]
    pairs = dozen[unseen_pairs([names[i] for i in dozen], voted)]
    if fit is None or torch.rand((), generator=generator) < 1 / 3:
        return pairs[int(torch.randint(len(pairs), (), generator=generator))]
    return pairs[int(fit.information(gallery()[0][number], pairs).argmax())]


def accuracy(taste, noise, how, seed) -> dict:
    "200 votes of one voter, and what is known on the way"
    (features, thoughts), started = gallery(), time.process_time()
    truth, generator = thoughts[taste], torch.Generator().manual_seed(seed)
    seen, target, voted, l2, found = torch.zeros(2, 0, features.shape[2]), torch.zeros(0), set(), 10.0, []
    while len(target) < max(counts):
        number = int(torch.randint(len(prompts), (), generator=generator))
        names = [f"{number} {i}" for i in range(pool)]
        active = how == "active" and len(target) >= 8
        pair = choose_pair(number, names, voted, LinearFit(seen, target, l2) if active else None, generator)
        pair = pair.flip(0) if torch.rand((), generator=generator) < 0.5 else pair
        wrong = torch.rand((), generator=generator) < noise
        won = (truth[number, pair[0]] > truth[number, pair[1]]) != wrong
        voted.add(frozenset(names[i] for i in pair))
        seen = torch.cat([seen, features[number, pair][:, None]], 1)
        target = torch.cat([target, won[None].float()])
        if len(target) in counts:
            found.append(look(seen, target, truth))
            l2 = found[-1]["l2"]
    told = dict(group="accuracy", taste=taste, noise=noise, how=how, seed=seed, found=found)
    return told | dict(cpu_seconds=round(time.process_time() - started, 1), versions=versions(), machine=machine)


# --- alignment -----------------------------------------------------------------------------------


def measure(policy, learnt=None) -> dict:
    "True tastes, the learnt reward, agreement and diversity at every step count, on fixed pairs of prompt and noise"
    others = {taste: taste for taste in tastes} | ({"learnt": learnt} if learnt else {})
    samples = {1: 48, 2: 48, 4: 48, 8: 48, 16: 24, 50: 12}
    options = dict(steps=tuple(samples), samples=samples, seed=2000, other_rewards=others)
    found = step_generalization(policy, "shapes_alignment", prompts, **options)
    return {**table(found), "other_rewards": {name: v.nanmean(1).tolist() for name, v in found.other_rewards.items()}}


@cache
def start() -> dict:
    "Before training; and the standard deviation of each taste among pictures of one prompt at two steps"
    spread = {taste: values.var(1).mean().sqrt().item() for taste, values in gallery()[1].items()}
    return measure(load_policy("tiny", device="cpu")) | {"spread": spread}


def train(policy, reward, learnt, taste, folder, seed, every=7) -> dict:
    "One training with the settings of the `tiny` preset, fresh votes now and then, and the evaluation"
    began, watch = time.process_time(), [FreshVotes(learnt, SimulatedVoter(taste), every)] if learnt else []
    changes = dict(reward=reward, seed=seed, eval_samples=0, checkpoint_every=1000, output_dir=str(folder))
    config = preset_config("tiny", **changes)
    Trainer(policy, config.reward, config.prompts, config, watch).train()
    log = [{k: line[k] for k in ("epoch", "reward/mean", "diversity")} for line in read_jsonl(folder / "metrics.jsonl")]
    found = dict(fresh=watch[0].records if watch else [], metrics=log, **measure(policy, learnt))
    return found | dict(cpu_seconds=round(time.process_time() - began, 1))


def learn(policy, taste, seed, folder, votes, noise=0.1, how="mixed"):
    "More votes, a share `noise` of them wrong clicks, into a folder, and a reward from all that are there"
    ballot = Ballot(policy, folder, prompts, random_share=random_shares[how], seed=seed)
    first = len(ballot.votes)
    cast_votes(ballot, SimulatedVoter(taste, noise, seed=f"{seed} {first}"), votes)
    with warnings.catch_warnings(action="ignore"):
        return train_taste(folder, force=True)


def told(learnt) -> dict:
    "What the card of a reward says"
    return {name: learnt.facts[name] for name in ("votes", "accuracy", "interval", "l2", "doubt", "loss")}


def first_round(place, taste, seed, votes=50, noise=0.1, how="mixed", every=7) -> tuple:
    "Votes on the model as it is, and a training; the reward, and what was found"
    policy = load_policy("tiny", device="cpu")
    learnt = learn(policy, taste, seed, place / "votes", votes, noise, how)
    return learnt, told(learnt) | train(policy, learnt.name, learnt, taste, place / "first", seed, every)


def align(taste, seed) -> dict:
    "Fifty votes and a training; then on with the same reward, or with one that was fitted again after fifty more"
    with tempfile.TemporaryDirectory() as place:
        place, stages = Path(place), {}
        first, stages["first"] = first_round(place, taste, seed)
        (place / "second").mkdir()
        on = load_policy("tiny", device="cpu").load_lora(place / "first" / "lora")
        stages["same reward"] = told(first) | train(on, first.name, first, taste, place / "same", seed + 100)
        on = load_policy("tiny", device="cpu").load_lora(place / "first" / "lora")
        second = learn(on, taste, seed, place / "votes", 50)
        stages["voted again"] = told(second) | train(on, second.name, second, taste, place / "again", seed + 100)
        stages["taste itself"] = train(load_policy("tiny", device="cpu"), taste, None, taste, place / "true", seed)
    return dict(group="align", taste=taste, noise=0.1, seed=seed, start=start(), stages=stages, versions=versions())


def gain(taste, seed, votes, noise, how) -> dict:
    "The first round of `align` with other votes; fresh votes are asked for before and after it only"
    with tempfile.TemporaryDirectory() as place:
        _, found = first_round(Path(place), taste, seed, votes, noise, how, every=28)
    line = dict(group="gain", taste=taste, noise=noise, votes=votes, how=how, seed=seed, start=start())
    return line | dict(stages={"first": found}, versions=versions(), machine=machine)


# --- all of it -----------------------------------------------------------------------------------


def jobs(groups, seeds) -> list:
    "(group, what tells its line from others, how to make it), a seed after the other"
    found = []
    for seed in seeds:
        if "accuracy" in groups:
            keys = [(t, n, h, seed) for n in noises for t in tastes for h in ("random", "active")]
            found += [("accuracy", dict(zip(("taste", "noise", "how", "seed"), key)), accuracy) for key in keys]
        if "align" in groups:
            found += [("align", dict(taste=taste, seed=seed), align) for taste in tastes]
        if "gain" in groups:
            found += [("gain", dict(taste=taste, seed=seed) | votes, gain) for votes in around for taste in tastes]
    return found


def missing(groups, seeds) -> list:
    "Jobs without a line"
    lines = {group: known(group) for group in groups}
    return [job for job in jobs(groups, seeds) if not any(job[1].items() <= line.items() for line in lines[job[0]])]


def check(groups, seeds):
    "Raise SystemExit where lines are missing, or where one does not come out the same again"
    if left := missing(groups, seeds):
        raise SystemExit(f"{len(left)} lines are missing, the first of them {left[0][:2]}")
    for line in [line for line in known("accuracy") if line["seed"] == seeds[0] and not line["noise"]][:1]:
        again = accuracy(line["taste"], line["noise"], line["how"], line["seed"])["found"]
        for was, now in zip(line["found"], again):
            if not math.isclose(was["accuracy"], now["accuracy"], abs_tol=0.01):
                raise SystemExit(
                    f"{line['taste']}, {was['votes']} votes: {was['accuracy']} then, {now['accuracy']} now"
                )
    print(f"{sum(len(known(group)) for group in groups)} lines, complete; one of them was made again and agrees")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", nargs="+", choices=groups, default=groups)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--check", action="store_true", help="make nothing; is everything there?")
    arguments = parser.parse_args()
    if arguments.check:
        return check(arguments.groups, arguments.seeds)
    for group, key, make in missing(arguments.groups, arguments.seeds):
        append_jsonl(results / f"{group}.jsonl", shorten(make(**key)))
        print(group, key, flush=True)


if __name__ == "__main__":
    main()
