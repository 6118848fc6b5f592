"""An acceptance rule: a node is confirmed if its token is one of the base model's two best."""

import torch

from medusa_export.step.acceptance.registry import register_rule
from medusa_export.step.acceptance.rule import Verdict, VerifiedNodes


class TopTwoRule:
    """Confirms the two best tokens of the base model; of paths of equal length the most likely one wins."""

    name = "top-2"
    changes_output = True  # the second-best token is not the base model's choice
    needs_sampling = False  # it reads logits only, so it works in greedy bundles too

    def judge(self, nodes: VerifiedNodes) -> Verdict:
        best = nodes.logits.float().topk(2, dim=-1)  # [B, R, 2]
        logprobs = best.values - nodes.logits.float().logsumexp(-1, keepdim=True)
        is_best = nodes.at_parents(best.indices) == nodes.tokens.unsqueeze(-1)
        score = torch.where(is_best, nodes.at_parents(logprobs), 0.0).sum(-1)
        return Verdict(is_best.any(-1), score)


RULE = register_rule(TopTwoRule())
