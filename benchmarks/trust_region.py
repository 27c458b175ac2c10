"""`sdpo_branch` with a trust region by divergence in place of the clip, for `experiments.py switches`.

The divergence of a transition is mean(Δμ)² / 2τ², Δμ against the policy that sampled (Flow-DPPO, arXiv 2606.11025).
Where it exceeds the bound and the action has moved the way its advantage pushes it, its log-probability is left out of
the gradient. It is no option of the package unless it moves the frontier.
"""

import torch

from sdpo_nb.branch import BranchTrainer
from sdpo_nb.objectives import gaussian_kl


class TrustRegionTrainer(BranchTrainer):
    "`bound` in nats per latent dimension; `dropped` counts transitions that it left out, of `seen`"

    bound, dropped, seen = 1e-5, 0, 0

    def minibatches(self, rollout):
        "Before the first update: the network's outputs under the policy that sampled"
        self.before = {}
        with torch.no_grad():
            for step in self.trained_steps:
                groups = torch.arange(len(rollout.prompts))
                _, self.before[step] = super().action_log_prob(rollout, (groups, torch.full_like(groups, step)))
        yield from super().minibatches(rollout)

    def action_log_prob(self, rollout, part):
        log_prob, output = super().action_log_prob(rollout, part)
        if not self.norms or not torch.is_grad_enabled():
            return log_prob, output
        groups, steps = part
        old = torch.stack([self.before[step][group] for group, step in zip(groups.tolist(), steps.tolist())])
        width = (self.sampler.std.cpu() / self.sampler.slope())[steps]
        far = gaussian_kl(output.detach(), old, width.to(output)) > self.bound
        ratio = log_prob.detach() - rollout.log_prob[:, groups, steps]
        advantage = rollout.advantages[:, groups, steps]
        out = far & (ratio * (advantage - advantage.mean(0)) > 0)
        self.dropped, self.seen = self.dropped + int(out.sum()), self.seen + out.numel()
        return torch.where(out, log_prob.detach(), log_prob), output
