"""What the scripts write down of an evaluation in the middle of a run."""

from sdpo_nb.evaluate import StepEvaluation


def progress(trainer) -> dict:
    "How far a run is"
    return {name: trainer.counts[name] for name in ("epoch", "samples", "reward_queries", "optimizer_steps")}


def table(found: StepEvaluation) -> dict:
    "Reward, agreement and diversity at every step count, as JSON holds them"
    return {
        "steps": found.steps,
        "n": len(found.prompts),
        "mean": found.mean.tolist(),
        "std": found.std.tolist(),
        "agreement": found.agreement.tolist(),
        "diversity": found.diversity.tolist(),
    }
