"""Parity of a bundle with PyTorch: step by step against the eager module, and end to end against transformers.

Three kinds of checks, over real prompts:

* numbers: logits and head logits of teacher-forced steps;
* integers: everything else that a step gives, with drafts that are right to every depth of the tree, in
  prefill chunks of several sizes, over rows that prefill and decode side by side;
* tokens: whole generations against transformers' greedy ``generate``.

The reference has the bundle's weights and computes in fp32. Where its two best logits lie closer together
than ``Tolerances.margin``, the choice between them is a tie: it is counted and shown, and is no failure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from medusa_export.eager import EagerBackend
from medusa_export.errors import VerificationError
from medusa_export.oracle import oracle_tree
from medusa_export.sampling import lags
from medusa_export.step import MedusaStep
from medusa_runtime.backends.onnxruntime import OnnxRuntimeBackend
from medusa_runtime.bundle import GRAPH, GRAPHS, Bundle
from medusa_runtime.engine import MedusaEngine
from medusa_runtime.sampling import Draws, SamplingParams

Progress = Callable[[str], None]
TEMPERATURE = 0.8  # of sampled answers
# A row that left its reference is compared no further, so each scenario is short and there are several.
STEPS_PER_SCENARIO = 8


@dataclass(frozen=True)
class Tolerances:
    """How far a bundle may be from its reference.

    Attributes:
        max_abs: Of logits.
        cosine: At least this, between logits of a token.
        norm_ratio: Between logits of a token, at most this far from 1.
        margin: Two logits of the reference that lie no further apart are a tie.
    """

    max_abs: float
    cosine: float
    norm_ratio: float
    margin: float

    @classmethod
    def of(cls, dtype: str) -> Tolerances:
        """What rounding explains, by the dtype of weights and cache."""
        if dtype == "float32":
            return cls(max_abs=1e-2, cosine=0.99999, norm_ratio=1e-3, margin=1e-4)
        return cls(max_abs=0.5, cosine=0.999, norm_ratio=2e-2, margin=0.25)


@dataclass
class Check:
    """One comparison: how much was compared, what came out, and whether that is good enough.

    Attributes:
        name: What was compared.
        compared: How many values or tokens; a check of none fails.
        mismatches: How many were wrong.
        figures: Further figures by name.
        notes: What a person should know: ties with their margins, the first mismatches.
    """

    name: str
    compared: int = 0
    mismatches: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Something was compared, and nothing was wrong."""
        return self.compared > 0 and self.mismatches == 0


@dataclass(frozen=True)
class Verification:
    """The outcome of ``verify_bundle`` or of ``verify_backend``.

    Attributes:
        checks: What was compared.
        tolerances: What passes.
        not_run: Why nothing could be compared on this machine, if so.
    """

    checks: list[Check]
    tolerances: Tolerances
    not_run: str | None = None

    @property
    def passed(self) -> bool:
        """All checks passed, and there was at least one."""
        return bool(self.checks) and all(check.passed for check in self.checks)


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what transformers answers."""

    ids: list[int]
    expected: list[int]


@contextmanager
def with_own_attention(step: MedusaStep) -> Iterator[None]:
    """Has a step's model attend as transformers has it."""
    model: Any = step.model
    ours = model.config._attn_implementation
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(ours)


def reference_tokens(step: MedusaStep, prompt: Sequence[int], count: int) -> list[int]:
    """transformers' greedy tokens, with its own attention and cache.

    Args:
        step: A step whose model computes in fp32.
        prompt: Token ids.
        count: How many to generate at most.
    """
    model: Any = step.model
    with with_own_attention(step):
        ids = torch.tensor([list(prompt)])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, **_GREEDY
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


_GREEDY: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None, "pad_token_id": 0}


def verify_bundle(
    bundle: Bundle,
    step: MedusaStep,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 32,
    tree_sizes: Sequence[int] | None = None,
    prefill_chunks: Sequence[int] = (512, 5),
    tolerances: Tolerances | None = None,
    progress: Progress = lambda _: None,
) -> Verification:
    """Holds a bundle against PyTorch.

    Args:
        bundle: The bundle.
        step: The same model, heads and tree, in fp32.
        prompts: Token ids.
        max_new_tokens: Tokens to generate per prompt.
        tree_sizes: Sizes to decode with; 1, a middle one and all if None.
        prefill_chunks: Tokens of a prompt per step.
        tolerances: What passes; by the bundle's dtype if None.
        progress: Told what is being done.

    Raises:
        VerificationError: The bundle is of another model or tree than the step.
        BackendError: ONNX Runtime can't run the bundle.
    """
    check_same(bundle, step)
    tolerances = tolerances or Tolerances.of(bundle.dtype)
    sizes = tree_sizes_of(bundle, tree_sizes)
    answered = answered_prompts(step, prompts, max_new_tokens, progress)
    checks: list[Check] = []
    for graph in _graphs(bundle):
        progress(f"comparing steps of {graph}")
        checks += _graph_checks(bundle, step, graph, tolerances).run(answered, sizes, prefill_chunks)
    with MedusaEngine.load(bundle.folder, check_digests=False) as engine:
        checks += generation_checks(engine, step, answered, sizes, prefill_chunks, tolerances, progress)
    return Verification(checks, tolerances)


def tree_sizes_of(bundle: Bundle, asked_for: Sequence[int] | None) -> list[int]:
    """The sizes to decode with, each once; 1, a middle one and all if none were asked for."""
    return sorted(set(asked_for or (1, (bundle.tree.size + 1) // 2, bundle.tree.size)))


def answered_prompts(
    step: MedusaStep, prompts: Sequence[Sequence[int]], count: int, progress: Progress
) -> list[Prompt]:
    """Prompts with up to ``count`` tokens of transformers' each."""
    progress(f"answering {len(prompts)} prompts with transformers")
    return [Prompt(list(ids), reference_tokens(step, ids, count)) for ids in prompts]


def check_same(bundle: Bundle, step: MedusaStep) -> None:
    """Raises ``VerificationError`` unless a bundle and a step are of the same model and tree."""
    vocab_size = step.model.get_output_embeddings().weight.shape[0]
    for what, ours, theirs in (
        ("vocabulary", bundle.model.vocab_size, vocab_size),
        ("number of layers", bundle.model.num_layers, step.cache_shape.num_layers),
        ("tree", bundle.tree, step.tree),
    ):
        if ours != theirs:
            raise VerificationError(
                f"The bundle is not of this model: its {what} is {ours}, not {theirs}. Give the model and the heads "
                "that it was exported from."
            )


def _graphs(bundle: Bundle) -> list[str]:
    return [name for name in GRAPHS if name in bundle.files]


def _with_outputs(path: Path, names: Sequence[str]) -> bytes:
    """A graph with named inner values as outputs too."""
    model = onnx.load(path, load_external_data=False)
    inner = {name for node in model.graph.node for name in node.output}
    missing = [name for name in names if name not in inner]
    if missing:
        raise VerificationError(f"The graph {path} has no value named {missing[0]}: export the bundle again.")
    kind = next(value.type.tensor_type.elem_type for value in model.graph.input if value.name == "past_key_0")
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name in names)
    data: bytes = model.SerializeToString()
    return data


class _Logits:
    """Gathers how close logits are."""

    def __init__(self, name: str, tolerances: Tolerances) -> None:
        self.check = Check(name)
        self._tolerances = tolerances
        self._max_abs, self._cosine, self._ratio, self._agree = 0.0, 1.0, 0.0, 0

    def add(self, got: NDArray[Any], expected: NDArray[np.float32]) -> None:
        """Compares [..., V] with [..., V]."""
        got = got.astype(np.float64).reshape(-1, got.shape[-1])
        reference = expected.astype(np.float64).reshape(-1, expected.shape[-1])
        if not len(got):
            return
        norms = np.linalg.norm(got, axis=1), np.linalg.norm(reference, axis=1)
        cosine = (got * reference).sum(1) / np.maximum(norms[0] * norms[1], 1e-30)
        self._max_abs = max(self._max_abs, float(np.abs(got - reference).max(initial=0)))
        self._cosine = min(self._cosine, float(cosine.min()))
        self._ratio = max(self._ratio, float(np.abs(norms[0] / np.maximum(norms[1], 1e-30) - 1).max()))
        same = got.argmax(1) == reference.argmax(1)
        close = (
            np.take_along_axis(reference, got.argmax(1)[:, None], 1)[:, 0] >= reference.max(1) - self._tolerances.margin
        )
        self._agree += int(same.sum())
        limits = self._tolerances
        wrong = (
            (np.abs(got - reference).max(1) > limits.max_abs)
            | (cosine < limits.cosine)
            | (np.abs(norms[0] / np.maximum(norms[1], 1e-30) - 1) > limits.norm_ratio)
            | ~close
            | ~np.isfinite(got).all(1)
        )
        self.check.compared += len(got)
        self.check.mismatches += int(wrong.sum())
        self.check.figures = {
            "max_abs": self._max_abs,
            "cosine": self._cosine,
            "norm_ratio_error": self._ratio,
            "argmax_agreement": self._agree / self.check.compared,
        }


def _graph_checks(bundle: Bundle, step: MedusaStep, graph: str, tolerances: Tolerances) -> StepChecks:
    """The checks of a bundle's graph in ONNX Runtime, logits included."""
    contract = graph == GRAPH
    # The derived graph keeps head logits to itself, in a branch; what they lead to is compared all the same.
    extra = ["logits", "head_logits"] if contract and step.heads is not None else ["logits"]
    data = _with_outputs(bundle.folder / graph, extra)
    backend = OnnxRuntimeBackend(bundle, rows=2 if contract else 1, graph=data, extra_outputs=extra)
    return StepChecks(bundle, step, graph, backend, extra, tolerances)


class StepChecks:
    """Runs a backend and the eager module side by side.

    Args:
        bundle: The bundle.
        step: The reference.
        name: What runs, for the names of checks.
        compiled: The backend; closed at the end.
        extra: Inner values that it gives as ``extra_output``.
        tolerances: What passes.
    """

    def __init__(
        self, bundle: Bundle, step: MedusaStep, name: str, compiled: Any, extra: Sequence[str], tolerances: Tolerances
    ) -> None:
        self._bundle, self._step, self._tolerances = bundle, step, tolerances
        self._tree = bundle.tree
        self._rows = compiled.rows
        self._compiled = compiled
        self._eager = EagerBackend(step, rows=self._rows)
        self._logits = {value: _Logits(f"{name}: {value.replace('_', ' ')}", tolerances) for value in extra}
        self._integers = Check(f"{name}: integers of a step")
        self._accepted: Counter[int] = Counter()
        self._drafts = 0

    def run(self, prompts: Sequence[Prompt], sizes: Sequence[int], chunks: Sequence[int]) -> list[Check]:
        """All scenarios: groups of prompts by tree size and chunk."""
        rng = np.random.default_rng(0)
        groups = [prompts[i : i + self._rows] for i in range(0, len(prompts), self._rows)]
        for number, group in enumerate(group for group in groups if len(group) == self._rows):
            size, chunk = sizes[number % len(sizes)], chunks[number // len(sizes) % len(chunks)]
            self._scenario(group, size, chunk, rng)
            self._scenario(group, self._tree.size, min(chunks), rng)
        if 0 < len(prompts) < self._rows:
            self._scenario([prompts[0]] * self._rows, self._tree.size, min(chunks), rng)
        self._compiled.close()
        self._integers.figures = {f"accepted_{length}": times for length, times in sorted(self._accepted.items())}
        self._require_all_lengths()
        return [*(logits.check for logits in self._logits.values()), self._integers]

    def _require_all_lengths(self) -> None:
        unseen = set(range(1, self._tree.max_depth + 2)) - set(self._accepted)
        if unseen and self._integers.passed:
            self._integers.notes.append(
                f"No step accepted {', '.join(map(str, sorted(unseen)))} tokens: give longer answers or more prompts."
            )
            self._integers.mismatches += 1

    def _scenario(self, prompts: Sequence[Prompt], size: int, chunk: int, rng: np.random.Generator) -> None:
        """Prefills in chunks, then decodes with drafts that are right to a depth drawn at random."""
        depth = self._tree.max_depth
        left = [list(prompt.ids) for prompt in prompts]
        emitted: list[list[int]] = [[] for _ in prompts]
        for backend in (self._compiled, self._eager):
            backend.reserve(
                depth + max(map(len, left)) + STEPS_PER_SCENARIO * (depth + 1) + max(size, chunk) + self._tree.size
            )
            for row in range(self._rows):
                backend.reset(row)
        for _ in range(STEPS_PER_SCENARIO + -(-max(map(len, left)) // chunk)):
            parts = {row: rest[:chunk] for row, rest in enumerate(left) if rest}
            width = max([size, *(len(part) for part in parts.values())])
            for row, prompt in enumerate(prompts):
                rest = prompt.expected[len(emitted[row]) :]
                if row in parts or not emitted[row]:
                    continue
                if len(rest) <= depth:  # the reference ends here
                    return
                node = self._next_node(min(width, self._tree.size), rng)
                draft = oracle_tree(self._tree, emitted[row][-1], rest, node, self._bundle.model.vocab_size)
                for backend in (self._compiled, self._eager):
                    backend.drafts[row] = draft
            if not self._compare_step(width, parts):
                return
            output = self._eager.output
            assert output is not None
            for row in range(self._rows):
                if row in parts:
                    left[row] = left[row][chunk:]
                if not left[row]:
                    count = int(output.count[row])
                    self._accepted[count] += row not in parts
                    emitted[row] += output.tokens[row, :count].tolist()

    def _next_node(self, size: int, rng: np.random.Generator) -> int:
        """The node that the next draft is right up to: of each depth in turn, any one."""
        depths = self._tree.depths[:size]
        depth = self._tree.max_depth - self._drafts % (self._tree.max_depth + 1)
        self._drafts += 1
        return int(rng.choice(np.flatnonzero(depths == min(depth, depths.max()))))

    def _compare_step(self, width: int, parts: dict[int, list[int]]) -> bool:
        """One step of both; whether they still go the same way."""
        got = self._compiled.step(width, parts)
        lengths = np.array(self._compiled.lengths)
        self._eager.step(width, parts)
        output = self._eager.output
        assert output is not None
        for name, logits in self._logits.items():
            expected = getattr(output, name)
            logits.add(self._compiled.extra_output(name), expected.float().numpy())
        pairs: list[tuple[str, Any, Any]] = [
            ("count", got.count, output.count),
            ("next_cache_lengths", lengths, output.next_cache_lengths),
        ]
        for row in range(self._rows):
            count = int(output.count[row])
            pairs.append((f"tokens of row {row}", got.tokens[row, :count], output.tokens[row, :count]))
            reachable = min(width, self._tree.size)
            drafted = self._compiled.drafts[row, :reachable]
            pairs.append((f"next_input_ids of row {row}", drafted, output.next_input_ids[row, :reachable]))
        wrong = [
            (name, a, b) for name, a, b in ((n, np.asarray(a), np.asarray(b)) for n, a, b in pairs) if (a != b).any()
        ]
        self._integers.compared += sum(np.asarray(value).size for _, value, _ in pairs)
        if not wrong:
            return True
        tie = self._tie(output, [name for name, _, _ in wrong])
        if tie is not None:
            self._integers.notes.append(f"tie: {wrong[0][0]} differs where the reference's margin is {tie:.2g}")
            return False
        self._integers.mismatches += len(wrong)
        self._integers.notes += [f"{name}: got {a.tolist()}, expected {b.tolist()}" for name, a, b in wrong[:2]]
        return False

    def _tie(self, output: Any, names: Sequence[str]) -> float | None:
        """The reference's smallest margin, if it is small enough to explain the difference."""
        margins = [_margin(output.logits)]
        if output.head_logits is not None and output.head_logits.numel() and all("next_input" in n for n in names):
            # Candidates change places where two of the best lie close together.
            best = output.head_logits.float().topk(self._tree.top_k + 1, dim=-1).values
            margins.append(float((best[..., :-1] - best[..., 1:]).min()))
        return min(margins) if min(margins) <= self._tolerances.margin else None


def _margin(logits: torch.Tensor) -> float:
    best = logits.float().topk(2, dim=-1).values
    return float((best[..., 0] - best[..., 1]).min())


def _sampling_checks(
    engine: MedusaEngine, step: MedusaStep, prompts: Sequence[Prompt], sizes: Sequence[int], tolerances: Tolerances
) -> list[Check]:
    """Samples answers with trees of several sizes, and looks at each token by itself; none if it is greedy only.

    Tokens win a race among all, so one is right if in the reference it is the winner, or as near to it as logits are in
    a tie. Log probabilities have to be as close as logits.
    """
    if not engine.bundle.sampling:
        return []
    check = Check("sampled tokens")
    furthest = 0.0
    for number, prompt in enumerate(prompts):
        params = SamplingParams(temperature=TEMPERATURE, seed=number)
        size, length = sizes[number % len(sizes)], len(prompt.ids)
        result = engine.generate(
            prompt.ids, max_new_tokens=len(prompt.expected), tree_size=size, sampling=params, logprobs=True
        )
        tokens = np.array(result.token_ids)
        with torch.no_grad(), with_own_attention(step):
            logits = step.model(torch.tensor([[*prompt.ids, *result.token_ids]])).logits[0, length - 1 : -1].float()
        numbers = Draws(params, length, logits.shape[1]).numbers(length, len(tokens))
        behind = lags(logits, numbers, TEMPERATURE, result.token_ids).numpy()
        wrong = np.flatnonzero(~(behind <= tolerances.margin / TEMPERATURE))
        expected = logits.log_softmax(-1).gather(1, torch.from_numpy(tokens)[:, None])[:, 0].numpy()
        furthest = max(furthest, float(np.abs(expected - np.array(result.logprobs)).max()))
        check.compared += len(tokens)
        check.mismatches += len(wrong)
        check.notes += [
            f"prompt {number}, token {place}: {tokens[place]} is {behind[place]:.2g} behind the one that is drawn"
            for place in wrong[:2]
        ]
    check.figures["logprob_max_abs"] = furthest
    if furthest > tolerances.max_abs:
        check.mismatches += 1
        check.notes.append(f"a log probability is {furthest:.2g} from the reference's")
    return [check]


def generation_checks(
    engine: MedusaEngine,
    step: MedusaStep,
    prompts: Sequence[Prompt],
    sizes: Sequence[int],
    chunks: Sequence[int],
    tolerances: Tolerances,
    progress: Progress,
) -> Iterator[Check]:
    """Whole generations of the engine, as a service runs them: greedy ones, and sampled ones if the bundle can."""
    for size in sizes:
        progress(f"generating with tree size {size}")
        check = Check(f"tokens, tree size {size}")
        steps = emitted = 0
        for chunk in chunks:
            for number, prompt in enumerate(prompts):
                result = engine.generate(
                    prompt.ids, max_new_tokens=len(prompt.expected), tree_size=size, prefill_chunk=chunk
                )
                _compare_tokens(check, step, number, prompt, result.token_ids, tolerances)
                steps += result.stats.steps
                emitted += result.stats.completion_tokens - 1
        check.figures["tokens_per_step"] = emitted / max(steps, 1)
        yield check
    yield from _sampling_checks(engine, step, prompts, sizes, tolerances)


def _compare_tokens(
    check: Check, step: MedusaStep, number: int, prompt: Prompt, tokens: Sequence[int], tolerances: Tolerances
) -> None:
    expected = prompt.expected
    same = next((i for i, pair in enumerate(zip(tokens, expected, strict=False)) if pair[0] != pair[1]), None)
    check.compared += len(expected) if same is None else same + 1
    if same is None and len(tokens) == len(expected):
        return
    place = len(tokens) if same is None else same
    with torch.no_grad(), with_own_attention(step):
        logits = step.model(torch.tensor([[*prompt.ids, *expected[:place]]])).logits[0, -1].float()
    got = int(tokens[place]) if place < len(tokens) else None
    margin = float("inf") if got is None else float(logits.max() - logits[got])
    words = f"prompt {number}, token {place}: got {got}, expected {expected[place] if place < len(expected) else None}"
    if margin <= tolerances.margin:
        check.notes.append(f"tie: {words}; the reference's margin is {margin:.2g}")
        return
    check.mismatches += 1
    check.notes.append(f"{words}; the reference's margin is {margin:.3g}")
