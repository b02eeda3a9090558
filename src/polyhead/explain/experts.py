"""Which experts tokens go to. B rows, T tokens, N experts, L layers that route."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.explain.capture import capture
from polyhead.explain.inputs import Inputs, call, counted_tokens
from polyhead.models.model import TaskModel
from polyhead.nn.moe import MixtureOfExperts


@dataclass(frozen=True)
class ExpertLoad:
    """Of each mixture by name, over tokens that are no padding.

    share:   `[N]` of the choices; even is 1 / N. weight: `[N]` of the probability.
    chosen:  `[B, T, k]` the experts of each token, the heaviest first.
    """

    share: Mapping[str, Tensor]
    weight: Mapping[str, Tensor]
    chosen: Mapping[str, Tensor]

    def imbalance(self) -> dict[str, float]:
        """The busiest expert's share over the even one, by mixture: 1 is balance."""
        return {name: float(share.max() * len(share)) for name, share in self.share.items()}


@torch.no_grad()
def expert_load(model: TaskModel, inputs: Inputs, where: str = "*") -> ExpertLoad:
    """Where tokens go, in every mixture of experts. ConfigError where there is none."""
    with capture(model, where, "routing") as seen:
        call(model, inputs)
    keep = counted_tokens(inputs)
    share: dict[str, Tensor] = {}
    weight: dict[str, Tensor] = {}
    chosen: dict[str, Tensor] = {}
    for name, logits in seen.items():
        part = model.get_submodule(name.partition("@")[0])
        assert isinstance(part, MixtureOfExperts)
        chosen[name] = logits.topk(part.top_k).indices
        counts = chosen[name][keep].flatten().bincount(minlength=part.num_experts)
        share[name] = counts / counts.sum()
        weight[name] = logits.float().softmax(-1)[keep].mean(0)
    return ExpertLoad(share, weight, chosen)
