"""Options of a distillation and of a training. This module imports no torch, so that ``--help`` is instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medusa_export.common.defaults import HEAD_ARCHITECTURE, MAX_LENGTH

Recipe = Literal["medusa1", "medusa2"]
HiddenStates = Literal["auto", "cached", "online"]
# Number of prompts that the model writes itself if no file of prompts is given.
OWN_PROMPTS = 1000


@dataclass(frozen=True)
class DistillOptions:
    """Options that determine the data of a distillation.

    Attributes:
        magpie: Number of prompts that the model writes itself, from its chat template. None means 1000 without files
            of prompts, and 0 with files.
        limit: Largest number of conversations; None for all.
        turns: User turns per conversation. The model writes the turns that a prompt lacks.
        system: System message of conversations that have none; None for no message.
        max_new_tokens: Largest number of tokens of an answer.
        temperature: Temperature of answers; 0 is greedy.
        prompt_temperature: Temperature of the user turns that the model writes.
        heldout: Share of prompts to hold out, 0 to 1.
        batch_size: Conversations that are written at a time.
        seed: Seed of all randomness.
    """

    magpie: int | None = None
    limit: int | None = None
    turns: int = 1
    system: str | None = None
    max_new_tokens: int = 512
    temperature: float = 0.3
    prompt_temperature: float = 1.0
    heldout: float = 0.05
    batch_size: int = 32
    seed: int = 0


@dataclass(frozen=True)
class HeadShape:
    """The shape of new heads.

    Attributes:
        num_heads: Number of heads, K.
        num_layers: Residual blocks per head.
        conditioned: True if heads get the token that the base model has just chosen, beside the hidden state.
        draft_vocab: Number of tokens that the heads can propose, the most frequent ones; None for all.
        architecture: The name of the head architecture. Architectures other than MEDUSA's take the number of heads, and
            defaults of their own for everything else.
    """

    num_heads: int = 4
    num_layers: int = 1
    conditioned: bool = True
    draft_vocab: int | None = None
    architecture: str = HEAD_ARCHITECTURE


@dataclass(frozen=True)
class TrainOptions:
    """Options that determine the result of a training. Only the recipe ``medusa2`` has a second stage.

    Attributes:
        recipe: ``medusa1`` trains only the heads. ``medusa2`` then trains heads and model together, with LoRA.
        own_projections: True to train an output projection for each head, as in the paper.
        epochs: Passes over the data.
        learning_rate: Highest learning rate; it falls along a cosine.
        soft: Share of soft targets in the loss, 0 to 1. A soft target is the base model's distribution instead of its
            token. It needs hidden states that are kept.
        batch_size: Positions per step and process.
        hidden_states: ``cached`` keeps the model's hidden states on disk, ``online`` computes them in each epoch, and
            ``auto`` keeps them if they fit.
        conversations: Conversations per step and process, in stages that run the model.
        joint_epochs: Second stage: passes over the data.
        joint_learning_rate: Second stage: highest learning rate of LoRA.
        heads_rate: Second stage: the heads' learning rate divided by LoRA's.
        lora_rank: Second stage: rank of LoRA.
        lora_dropout: Second stage: dropout of LoRA. Without it, a step takes three quarters of the time on a CPU.
        heads_weight: Second stage: weight of the heads' loss, relative to the KL divergence from the original model.
        max_length: Largest number of tokens of a conversation; the rest is cut off.
        limit: Largest number of conversations to train on, of each data set; None for all.
        heldout: Share of prompts of a file to hold out, 0 to 1.
        bf16: True to compute matrix products in bf16. None means only on a GPU.
        seed: Seed of initial weights and of the order of the data.
    """

    recipe: Recipe = "medusa1"
    own_projections: bool = False
    epochs: float = 5.0
    learning_rate: float = 2e-3
    soft: float = 0.0
    batch_size: int = 2048
    hidden_states: HiddenStates = "auto"
    conversations: int = 8
    joint_epochs: float = 1.0
    joint_learning_rate: float = 5e-4
    heads_rate: float = 4.0
    lora_rank: int = 32
    lora_dropout: float = 0.05
    heads_weight: float = 0.01
    max_length: int = MAX_LENGTH
    limit: int | None = None
    heldout: float = 0.05
    bf16: bool | None = None
    seed: int = 0
