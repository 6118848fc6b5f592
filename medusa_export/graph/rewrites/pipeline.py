"""Pipelines of rewrites.

An installed package adds rewrites by an entry point of the group ``medusa_export.rewrites``. The entry point names a
module that registers the rewrites when it is imported.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from types import MappingProxyType

import onnx_ir as ir
from onnx_ir.passes import common as passes

from medusa_export.common.errors import ExtensionError, RewriteError, first_line
from medusa_export.graph.rewrites.rewrite import NotApplicableError, Rewrite, RewriteResult, StepFacts

ENTRY_POINTS = "medusa_export.rewrites"


@functools.cache
def _load_extensions() -> None:
    """Imports the modules that register rewrites, once per process.

    Raises:
        ExtensionError: One of them can't be imported.
    """
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        # A module of another package may raise anything.
        except Exception as error:
            raise ExtensionError(
                f"The rewrites {entry.name} can't be loaded from {entry.value}: {first_line(error)}."
            ) from error


def _tidy(model: ir.Model) -> None:
    """Removes unused nodes, which would count among the readers of a value, and sorts the others."""
    _remove_unused_nodes(model.graph)
    if not _is_sorted(model.graph, set()):
        passes.TopologicalSortPass()(model)


def _remove_unused_nodes(graph: ir.Graph) -> None:
    """Removes nodes without readers, also in branches.

    ``RemoveUnusedNodesPass`` takes four times as long: it looks up the schema of each node, for optional outputs.
    """
    outputs = frozenset(graph.outputs)
    for node in reversed(graph):
        if not any(value in outputs or value.uses() for value in node.outputs):
            graph.remove(node, safe=True)
            continue
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                _remove_unused_nodes(attribute.as_graph())


def _is_sorted(graph: ir.Graph, seen: set[ir.Node]) -> bool:
    """Returns True if each node of a graph follows those that it reads. To see it takes a fifth as long as to sort.

    Args:
        graph: The graph, or that of a branch.
        seen: The nodes before it. Those of the graph are added.
    """
    for node in graph:
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer not in seen:
                return False
        for attribute in node.attributes.values():
            inner: tuple[ir.Graph, ...] = ()
            if attribute.type == ir.AttributeType.GRAPH:
                inner = (attribute.as_graph(),)
            elif attribute.type == ir.AttributeType.GRAPHS:
                inner = tuple(attribute.as_graphs())
            if not all(_is_sorted(branch, seen) for branch in inner):
                return False
        seen.add(node)
    return True


class Pipeline:
    """An ordered list of rewrites.

    Args:
        name: The graph that the pipeline makes, for messages.
        rewrites: The rewrites in the order in which they run.
        domains: Operator domains, besides the standard one, that the rewrites use, with their versions.
    """

    def __init__(self, name: str, *rewrites: type[Rewrite], domains: Mapping[str, int] = MappingProxyType({})) -> None:
        self.name = name
        self._rewrites = list(rewrites)
        self._domains = domains

    @property
    def rewrites(self) -> tuple[type[Rewrite], ...]:
        """The rewrites in the order in which they run, those of extensions included."""
        _load_extensions()
        return tuple(self._rewrites)

    def register(self, rewrite: type[Rewrite], *, after: type[Rewrite] | None = None) -> None:
        """Adds a rewrite.

        Args:
            rewrite: The rewrite. Its name must be new in this pipeline.
            after: The rewrite that it follows; the last one if None.

        Raises:
            ExtensionError: The name is taken, or ``after`` is not in the pipeline.
        """
        if any(known.name == rewrite.name for known in self._rewrites):
            raise ExtensionError(f"The graph {self.name} has a rewrite {rewrite.name!r} already: choose another name.")
        if after is not None and after not in self._rewrites:
            raise ExtensionError(
                f"The graph {self.name} has no rewrite {after.name!r} that {rewrite.name!r} can follow."
            )
        place = len(self._rewrites) if after is None else self._rewrites.index(after) + 1
        self._rewrites.insert(place, rewrite)

    @contextmanager
    def registered(self, rewrite: type[Rewrite], *, after: type[Rewrite] | None = None) -> Iterator[None]:
        """Adds a rewrite for the duration of a block."""
        self.register(rewrite, after=after)
        try:
            yield
        finally:
            self._rewrites.remove(rewrite)

    def run(self, model: ir.Model, step: StepFacts) -> dict[str, int]:
        """Applies all rewrites to a graph in place.

        First, and after each rewrite that changed something, unused nodes are removed and the others are sorted.

        Args:
            model: The graph. After an error it may be half rewritten: discard it.
            step: Facts about its step.

        Returns:
            The number of places that each rewrite changed, by its name, in the order in which they ran.

        Raises:
            RewriteError: A rewrite failed, or its precondition is not met. It names the rewrite.
        """
        counts = {}
        _tidy(model)
        for rewrite in self.rewrites:
            counts[rewrite.name] = self._apply(rewrite, model, step)
        passes.RemoveUnusedNodesPass()(model)  # optional outputs and initializers, too
        model.opset_imports.update(self._domains)
        passes.NameFixPass()(model)  # the nodes of a branch may have names of nodes outside
        return counts

    def _apply(self, rewrite: type[Rewrite], model: ir.Model, step: StepFacts) -> int:
        try:
            result = rewrite(step)(model)
            if result.modified:
                _tidy(model)
        except NotApplicableError as error:
            raise RewriteError(self.name, rewrite.name, f"can't be applied: {error}") from error
        # A rewrite is any code, of any extension.
        except Exception as error:
            raise RewriteError(self.name, rewrite.name, f"failed: {first_line(error)}") from error
        assert isinstance(result, RewriteResult)
        return result.count
