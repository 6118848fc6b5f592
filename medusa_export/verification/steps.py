"""Compares single steps of a backend with the eager module: logits, and the integers that a step returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from medusa_export.common.errors import VerificationError
from medusa_export.step.step import StepOutput
from medusa_export.verification.checks import Check, Tolerances
from medusa_export.verification.oracle import oracle_tree
from medusa_export.verification.reference import Prompt
from medusa_export.verification.reference_steps import ReferenceSteps
from medusa_export.verification.rows_in_turn import RowsInTurn
from medusa_runtime.backends.base import Backend, StepResult, can_give_outputs, can_set_long
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.bundles.bundle import GRAPH, ONNXRUNTIME_GRAPH, Bundle

# After a difference a row is not compared any more, so there are several short scenarios.
STEPS_PER_SCENARIO = 8
_ELEMENT_TYPES = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}


def graph_checks(
    bundle: Bundle, reference: ReferenceSteps, graph: str, tolerances: Tolerances, *, rounds: bool = False
) -> StepChecks:
    """Prepares the checks of one graph of a bundle in ONNX Runtime, logits included."""
    # Head logits of a derived graph are inside a branch. The candidates that follow from them are compared anyway.
    extra = ["logits", "head_logits"] if graph == GRAPH and reference.has_heads else ["logits"]
    data = with_outputs(bundle, bundle.folder / graph, extra)
    kind = RowsInTurn if graph == ONNXRUNTIME_GRAPH else OnnxRuntimeBackend
    backend = kind(bundle, rows=reference.rows, graph=data, extra_outputs=extra)
    return StepChecks(bundle, reference, graph, backend, extra, tolerances, rounds=rounds)


def with_outputs(bundle: Bundle, path: Path, names: Sequence[str]) -> bytes:
    """Returns a graph of a bundle, serialized, with inner values of the bundle's type as further outputs."""
    model = onnx.load(path, load_external_data=False)
    inner = {name for node in model.graph.node for name in node.output}
    missing = [name for name in names if name not in inner]
    if missing:
        raise VerificationError(f"The graph {path} has no value named {missing[0]}: export the bundle again.")
    kind = onnx.TensorProto.DataType.Value(_ELEMENT_TYPES[bundle.dtype])
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name in names)
    data: bytes = model.SerializeToString()
    return data


class StepChecks:
    """Runs a backend and the eager module side by side.

    Args:
        bundle: The bundle.
        reference: The eager module's steps.
        name: Name of the graph or backend, for the names of checks.
        compiled: The backend to check, of as many rows; ``run`` closes it.
        extra: Names of inner values that it returns by ``extra_output``.
        tolerances: Differences that pass.
        rounds: The backend rounds inputs of products, or entries of caches, to 8 bits. Then many near ties have another
            winner than in the reference. So differing drafts are only counted, and a scenario may end before all
            lengths of paths were accepted.
    """

    def __init__(
        self,
        bundle: Bundle,
        reference: ReferenceSteps,
        name: str,
        compiled: Backend,
        extra: Sequence[str],
        tolerances: Tolerances,
        *,
        rounds: bool = False,
    ) -> None:
        self._rounds = rounds
        self._other_drafts = 0
        self._bundle, self._tolerances = bundle, tolerances
        self._tree = bundle.tree
        self._rows = compiled.rows
        self._compiled, self._reference = compiled, reference
        self._logits = {value: _Logits(f"{name}: {value.replace('_', ' ')}", tolerances) for value in extra}
        self._integers = Check(f"{name}: integers of a step")
        self._accepted: Counter[int] = Counter()
        self._turns: Counter[int] = Counter()  # steps of scenarios, by the depth down to which their draft is right

    def run(self, prompts: Sequence[Prompt], sizes: Sequence[int], chunks: Sequence[int]) -> list[Check]:
        """Runs all scenarios, groups of prompts by tree size and chunk size, and returns the checks."""
        try:
            self._run_all(prompts, sizes, chunks)
        finally:
            self._compiled.close()
        self._integers.figures = {f"accepted_{length}": times for length, times in sorted(self._accepted.items())}
        if self._rounds:
            self._integers.figures["other_drafts"] = self._other_drafts
        else:
            self._require_all_lengths()
        return [*(logits.check for logits in self._logits.values()), self._integers]

    def _run_all(self, prompts: Sequence[Prompt], sizes: Sequence[int], chunks: Sequence[int]) -> None:
        rng = np.random.default_rng(0)
        groups = [prompts[i : i + self._rows] for i in range(0, len(prompts), self._rows)]
        for number, group in enumerate(groups):
            size, chunk = sizes[number % len(sizes)], chunks[number // len(sizes) % len(chunks)]
            full = [*group, *prompts[: self._rows - len(group)]]  # the first prompt again, beside a last one alone
            self._scenario(full, size, chunk, rng)
            self._scenario(full, self._tree.size, min(chunks), rng)

    def _require_all_lengths(self) -> None:
        unseen = set(range(1, self._tree.max_depth + 2)) - set(self._accepted)
        if unseen and self._integers.passed:
            self._integers.notes.append(
                f"No step accepted {', '.join(map(str, sorted(unseen)))} tokens: give longer answers or more prompts."
            )
            self._integers.mismatches += 1

    def _scenario(self, prompts: Sequence[Prompt], size: int, chunk: int, rng: np.random.Generator) -> None:
        """Prefills in chunks, then decodes with drafts that are right down to chosen depths."""
        depth = self._tree.max_depth
        left = [list(prompt.ids) for prompt in prompts]
        emitted: list[list[int]] = [[] for _ in prompts]
        compared = [*range(self._rows)]  # those that have not differed so far
        self._begin([len(prompt.ids) for prompt in prompts], size, chunk)
        for _ in range(STEPS_PER_SCENARIO + -(-max(map(len, left)) // chunk)):
            parts = {row: rest[:chunk] for row, rest in enumerate(left) if rest}
            width = max([size, *(len(part) for part in parts.values())])
            for row in compared:
                rest = prompts[row].expected[len(emitted[row]) :]
                if row in parts or not emitted[row]:
                    continue
                if len(rest) <= depth:  # the reference's answer ends here
                    return
                node = self._next_node(min(width, self._tree.size), rng)
                draft = oracle_tree(self._tree, emitted[row][-1], rest, node, self._bundle.model.vocab_size)
                self._compiled.drafts[row] = self._reference.drafts[row] = draft
            output = self._reference.step(width, parts)
            compared = self._compare_step(width, parts, output, compared)
            if not compared:
                return
            for row in range(self._rows):
                if row in parts:
                    left[row] = left[row][chunk:]
                if not left[row]:
                    count = int(output.count[row])
                    if row not in parts and row in compared:
                        self._accepted[count] += 1
                    emitted[row] += output.tokens[row, :count].tolist()

    def _begin(self, lengths: Sequence[int], size: int, chunk: int) -> None:
        """Empties the rows of both backends for prompts of these lengths, and makes room."""
        slots, longest = self._bundle.slots, max(lengths)
        widest = max(size, min(chunk, longest))
        needed = slots.capacity(longest + STEPS_PER_SCENARIO * slots.most_committed, widest + self._tree.size)
        is_long = [self._bundle.model.is_long(length) for length in lengths]
        self._reference.begin(needed, is_long)
        self._compiled.reserve(needed)
        for row in range(self._rows):
            self._compiled.reset(row)
            if can_set_long(self._compiled):
                self._compiled.set_long(row, is_long[row])

    def _next_node(self, size: int, rng: np.random.Generator) -> int:
        """Chooses the node that the next draft is right down to, at random from the depth that was chosen least."""
        depths = self._tree.depths[:size]
        depth = min(range(int(depths.max()) + 1), key=lambda depth: (self._turns[depth], -depth))
        self._turns[depth] += 1
        return int(rng.choice(np.flatnonzero(depths == depth)))

    def _compare_step(self, width: int, parts: dict[int, list[int]], output: StepOutput, rows: list[int]) -> list[int]:
        """Runs the same step of the backend, and compares these rows. Returns those that don't differ."""
        got = self._compiled.step(width, parts)
        if can_give_outputs(self._compiled):
            # Heads draft behind the last accepted node, which is another one where a tie ended otherwise.
            of_rows = {"head_logits": [row for row in rows if _emitted(got, row) == _emitted(output, row)]}
            for name, logits in self._logits.items():
                found, expected = self._compiled.extra_output(name), getattr(output, name)
                compared = of_rows.get(name, rows)
                if len(found):
                    logits.add(found[compared], expected[compared].float().numpy())
        lengths = self._compiled.lengths
        return [row for row in rows if not self._compare_row(row, width, got, int(lengths[row]), output)]

    def _compare_row(self, row: int, width: int, got: StepResult, length: int, output: StepOutput) -> bool:
        """Compares the integers of a row and notes a difference. Returns True if they differ."""
        count, reachable = int(output.count[row]), min(width, self._tree.size)
        found: list[tuple[str, Any, Any]] = [
            # In this order each follows from the one before: emitted tokens, new length, new draft.
            ("tokens", _emitted(got, row), _emitted(output, row)),
            ("next_cache_lengths", length, int(output.next_cache_lengths[row])),
            (
                "next_input_ids",
                self._compiled.drafts[row, :reachable].tolist(),
                output.next_input_ids[row, :reachable].tolist(),
            ),
        ]
        self._integers.compared += count + 2 + reachable
        wrong = next(((name, a, b) for name, a, b in found if a != b), None)
        if wrong is None:
            return False
        name, a, b = wrong
        if name == "next_input_ids" and self._rounds and a[0] == b[0]:
            self._other_drafts += 1
            return False
        margin = self._margin(name, row, output, a, b)
        if margin <= self._tolerances.margin and (name != "next_input_ids" or a[0] == b[0]):
            self._integers.notes.append(f"tie: {name} of row {row} differ where the reference's margin is {margin:.2g}")
        else:
            self._integers.mismatches += 1
            self._integers.notes.append(f"{name} of row {row}: got {a}, expected {b}")
        return True

    def _margin(self, name: str, row: int, output: StepOutput, got: Any, expected: Any) -> float:
        """Returns the reference's margin at the choice that may explain a difference; infinity if no choice can."""
        if name == "tokens":  # chosen by the base model after the last node that both accepted
            place = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None)
            if place is None:
                return float("inf")
            best = output.logits[row, output.accepted_path[row, place]].float().topk(2).values
            return float(best[0] - best[1])
        if name == "next_input_ids" and output.head_logits is not None and output.head_logits.numel():
            # Candidates change places if two of the best are close together.
            best = output.head_logits[row].float().topk(self._tree.top_k + 1, dim=-1).values
            return float((best[..., :-1] - best[..., 1:]).min())
        return float("inf")


def _emitted(result: StepResult | StepOutput, row: int) -> list[int]:
    """The tokens that a row emitted in a step."""
    tokens: list[int] = result.tokens[row, : int(result.count[row])].tolist()
    return tokens


class _Logits:
    """Collects how close logits are. NaN stays NaN in every figure."""

    def __init__(self, name: str, tolerances: Tolerances) -> None:
        self.check = Check(name)
        self._tolerances = tolerances
        self._max_abs, self._cosine, self._ratio, self._agree = 0.0, 1.0, 0.0, 0
        self._not_finite = self._outliers = 0

    def add(self, got: NDArray[Any], expected: NDArray[np.float32]) -> None:
        """Compares logits.

        Args:
            got: [..., V], of the backend.
            expected: [..., V], of the reference.
        """
        got = got.astype(np.float64).reshape(-1, got.shape[-1])
        reference = expected.astype(np.float64).reshape(-1, expected.shape[-1])
        if not len(got):
            return
        norms = np.linalg.norm(got, axis=1), np.linalg.norm(reference, axis=1)
        cosine = (got * reference).sum(1) / np.maximum(norms[0] * norms[1], 1e-30)
        distance = np.abs(got - reference).max(1)
        ratio = np.abs(norms[0] / np.maximum(norms[1], 1e-30) - 1)
        self._max_abs = float(np.maximum(self._max_abs, distance.max()))
        self._cosine = float(np.minimum(self._cosine, cosine.min()))
        self._ratio = float(np.maximum(self._ratio, ratio.max()))
        same = got.argmax(1) == reference.argmax(1)
        close = (
            np.take_along_axis(reference, got.argmax(1)[:, None], 1)[:, 0] >= reference.max(1) - self._tolerances.margin
        )
        self._agree += int(same.sum())
        limits = self._tolerances
        right = (distance <= limits.max_abs) & (cosine >= limits.cosine) & (ratio <= limits.norm_ratio) & close
        self.check.compared += len(got)
        self._outliers += int((~right).sum())
        self._note_not_finite(int((~np.isfinite(got).all(1)).sum()))
        few = self._outliers <= limits.outliers * self.check.compared
        self.check.mismatches = 0 if few and np.isfinite(self._max_abs) else self._outliers
        self.check.figures = {
            "max_abs": self._max_abs,
            "cosine": self._cosine,
            "norm_ratio_error": self._ratio,
            "argmax_agreement": self._agree / self.check.compared,
        }
        if limits.outliers:
            self.check.figures["outliers"] = self._outliers

    def _note_not_finite(self, rows: int) -> None:
        self._not_finite += rows
        if self._not_finite:
            self.check.notes = [f"{self._not_finite} rows of logits hold NaN or infinity"]
