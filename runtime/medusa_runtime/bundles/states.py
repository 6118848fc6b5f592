"""States: the tensors that a model carries from step to step, as ``medusa.json`` lists them.

A state is described, not assumed: each has its own kind, shape, type and margin, and names the layers that read it.
Three kinds exist. All are caches with one entry per token:

- ``kv``: keys or values of one layer, or of several layers that share them;
- ``latent``: a compressed form of keys and values, which layers expand (multi-head latent attention);
- ``scale``: the scales of keys or values that are stored as 8-bit integers, one number per head.

``docs/contract.md`` says how states without entries, such as recurrent ones, will fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta

Heads = Annotated[int, Meta(ge=1, le=2**20)]
Margin = Annotated[int, Meta(ge=0, le=2**16)]
LayerIndex = Annotated[int, Meta(ge=0, le=2**16)]
StateName = Annotated[str, Meta(pattern=r"^[a-z]{1,32}(_[a-z]{1,32})?_[0-9]{1,5}\Z")]
PendingName = Annotated[str, Meta(pattern=r"^pending_[a-z0-9]{1,5}\Z")]
StateDtype = Literal["float32", "int8"]


class EntryKind(NamedTuple):
    """The form of the entries of a state.

    Attributes:
        shape: [N, d]: heads and size of a head.
        dtype: The type of its numbers; None for the bundle's.
    """

    shape: tuple[int, int]
    dtype: StateDtype | None


@dataclass(frozen=True)
class State:
    """Describes a tensor that a model carries from step to step.

    Attributes:
        name: Its name, such as ``key_3``. The graph reads ``past_key_3`` and gives ``present_key_3``.
        kind: The content of an entry.
        shape: The shape of an entry, [N, d]: heads and size of a head.
        margin: Slots in front of entry 0 (M).
        readers: The indices of the layers that read it, in order. The first one writes it.
        pending: The input with its pending entries; None without a margin. States of one shape and type share an input.
        dtype: The type of its numbers; None for the bundle's.
    """

    name: StateName
    kind: Literal["kv", "latent", "scale"]
    shape: tuple[Heads, Heads]
    margin: Margin
    readers: Annotated[tuple[LayerIndex, ...], Meta(min_length=1)]
    pending: PendingName | None = None
    dtype: StateDtype | None = None

    @property
    def past(self) -> str:
        """The name of the graph's input."""
        return f"past_{self.name}"

    @property
    def present(self) -> str:
        """The name of the graph's output."""
        return f"present_{self.name}"

    @property
    def entry(self) -> EntryKind:
        """The form of its entries. States of one form share an input with pending entries."""
        return EntryKind(self.shape, self.dtype)

    @property
    def entry_size(self) -> int:
        """Numbers in one entry."""
        heads, size = self.shape
        return heads * size


@dataclass(frozen=True)
class StateGroup:
    """The states of one shape and type, whose pending entries are one tensor.

    Attributes:
        states: The states, in the order of the list of states.
        shape: The shape of an entry, [N, d].
        pending: The input with their pending entries, [B, n·N, M, d] for n states; None without a margin.
        dtype: The type of their numbers; None for the bundle's.
    """

    states: tuple[State, ...]
    shape: tuple[int, int]
    pending: str | None
    dtype: StateDtype | None = None

    @property
    def next_pending(self) -> str:
        """The output with the pending entries of the next step."""
        return f"next_{self.pending}"


def groups_of(states: Sequence[State]) -> tuple[StateGroup, ...]:
    """Groups states by the shape and type of their entries, in the order in which these occur."""
    members: dict[EntryKind, list[State]] = {}
    for state in states:
        members.setdefault(state.entry, []).append(state)
    return tuple(
        StateGroup(tuple(group), entry.shape, group[0].pending, entry.dtype) for entry, group in members.items()
    )


def with_margin(states: Sequence[State], margin: int) -> tuple[State, ...]:
    """States with M slots in front of entry 0, and with the names of the inputs for their pending entries.

    Args:
        states: The states, in order.
        margin: M.
    """
    entries = list(dict.fromkeys(state.entry for state in states))
    return tuple(
        replace(state, margin=margin, pending=f"pending_{entries.index(state.entry)}" if margin else None)
        for state in states
    )


def uniform_states(num_layers: int, num_key_value_heads: int, head_dim: int, margin: int) -> tuple[State, ...]:
    """The states of a bundle of contract version 3 or older: keys and values of one shape in each layer."""
    return tuple(
        State(
            name=f"{kind}_{layer}",
            kind="kv",
            shape=(num_key_value_heads, head_dim),
            margin=margin,
            readers=(layer,),
            pending="pending_kv" if margin else None,
        )
        for layer in range(num_layers)
        for kind in ("key", "value")
    )
