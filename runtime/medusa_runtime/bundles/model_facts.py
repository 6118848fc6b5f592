"""Facts about the base model in a bundle's description, and its states."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from medusa_runtime.bundles.contract import CONTRACT_VERSION
from medusa_runtime.bundles.json_file import Name
from medusa_runtime.bundles.states import State, uniform_states, with_margin
from medusa_runtime.errors import BundleError

REEXPORT = "Export the bundle again."

# These bounds are at least ten times what the largest published models have.
Layers = Annotated[int, Meta(ge=1, le=1024)]
Width = Annotated[int, Meta(ge=1, le=2**20)]
VocabSize = Annotated[int, Meta(ge=1, le=2**24)]
Positions = Annotated[int, Meta(ge=1, le=2**40)]
TokenId = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
States = Annotated[tuple[State, ...], Meta(min_length=1, max_length=4096)]


@dataclass(frozen=True)
class ModelFacts:
    """The sizes and end tokens of the base model.

    Attributes:
        max_positions: Tokens of the longest sequence.
        short_positions: Prompts of more tokens are long: all of the request is computed with other rotary frequencies
            (LongRoPE). None if the model has one set of frequencies.
    """

    name: Name
    model_type: Name
    num_layers: Layers
    hidden_size: Width
    vocab_size: VocabSize
    max_positions: Positions
    eos_token_ids: tuple[TokenId, ...] = ()
    short_positions: Positions | None = None

    def is_long(self, prompt_tokens: int) -> bool:
        """True if a request with a prompt of this length takes the frequencies of long ones."""
        return self.short_positions is not None and prompt_tokens > self.short_positions

    def most_tokens(self, prompt_tokens: int) -> int:
        """The most tokens of prompt and answer. A short request may not become a long one while it is answered."""
        if self.short_positions is None or self.is_long(prompt_tokens):
            return self.max_positions
        return self.short_positions


@dataclass(frozen=True)
class AnyModelFacts(ModelFacts):
    """Facts about a model, with the shape of its caches in bundles of contract version 3 and older."""

    num_key_value_heads: Width | None = None
    head_dim: Width | None = None

    @property
    def known_now(self) -> ModelFacts:
        """The facts that bundles have today."""
        return ModelFacts(**{field.name: getattr(self, field.name) for field in fields(ModelFacts)})


def states_of(where: Path, states: States | None, model: AnyModelFacts, margin: int) -> tuple[State, ...]:
    """The states of a bundle, checked. Those of an older bundle follow from the facts about its model.

    Args:
        where: The description, for messages.
        states: The states that the description lists; None in bundles of contract version 3 and older.
        model: The description's facts about the model.
        margin: M, the depth of the tree.

    Raises:
        BundleError: The list is missing, or does not follow the contract.
    """
    if states is None:
        if model.num_key_value_heads is None or model.head_dim is None:
            raise BundleError(f"In {where}, 'states' is missing. {REEXPORT}")
        return uniform_states(model.num_layers, model.num_key_value_heads, model.head_dim, margin)
    if states != with_margin(states, margin) or len({state.name for state in states}) < len(states):
        raise BundleError(
            f"In {where}, 'states' don't follow contract version {CONTRACT_VERSION}: each has a name of its own, a "
            f"margin of the tree's depth, and pending entries with the states of its shape and type. {REEXPORT}"
        )
    return states
