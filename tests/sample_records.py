"""What an invented run noted: the log of four epochs, and before compared with after; some numbers are missing."""

PANEL = {"mean": [1.0, 2.0], "std": [0.5, 0.5]}
COMPARISON = {
    "steps": [1, 50],
    "n": 16,
    "reward": "taste",
    "sampler": "DDIM, η=1",
    "before": PANEL,
    "after": {"mean": [2.0, 2.5], "std": [0.5, None]},
    "gain": {"mean": [1.0, 0.5], "se": [0.1, None]},
    "agreement": {"before": [0.9, 1.0], "after": [0.5, 0.6]},
    "diversity": {"before": [0.2, 0.3], "after": [0.1, 0.2]},
}
RECORDS = [
    {
        "epoch": epoch,
        "samples": 8 * (epoch + 1),
        "reward_queries": 24 * (epoch + 1),
        "optimizer_steps": 2 * (epoch + 1),
        "reward/mean": epoch / 2.0,
        "reward/std": 1.0,
        "loss": 1.0,
        "diversity": None if epoch == 2 else 0.2,
    }
    for epoch in range(4)
]
