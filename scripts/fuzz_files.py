"""Damages each file that the runtime reads, and loads it: only this project's exceptions may be raised.

Each case damages one file of a bundle, of a compiled engine's folder or of the exporter's inputs. It loads the file
without checking digests, and uses the result: text is encoded and decoded, chats are rendered, trees are chosen. A case
fails

- if an exception other than ``MedusaError`` is raised,
- if it takes more than 5 seconds of CPU time or 200 MB of memory,
- if the process ends,
- if anything is printed to standard output.

Chats are encoded if the bounds for a context of 512 tokens (64 KiB) accept them. Longer contexts are not measured.
Cases run in child processes. SEED and its number identify a case, and ``--only`` runs it alone.

Without a BUNDLE it exports a tiny random model.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, TextIO

import click
import numpy as np

from medusa_export.trees.calibration import Calibration
from medusa_export.trees.named import load_tree
from medusa_runtime import Bundle, MedusaEngine, MedusaError
from medusa_runtime.backends import open_backend
from medusa_runtime.bundles.compiled import CompiledEngine, is_engine
from medusa_runtime.decoding.latency import LatencyTable
from medusa_runtime.decoding.tree_choice import TreeChoice
from medusa_runtime.text.stream import TextStream
from medusa_runtime.text.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from file_mutations import mutated_bytes, mutated_json, mutated_template, replace_file
from fuzz_originals import list_files, prepare
from tiny_bundle import bundle_folder

MOST_BYTES = 200 * 10**6
MOST_SECONDS = 5
LONGEST_MESSAGE = 2000  # characters
MOST_TOKENS = 512  # of a prompt: the context of a tiny model
# One of 40 cases damages a graph. These cases are slow, as each makes an ONNX Runtime session.
GRAPH_EVERY = 40
TOOLS = [{"name": "f", "parameters": {"a": 1}}]
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi, wörld 👋\n  <|x|> ½"}]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case.

    Attributes:
        case: Number of the case.
        file: The damaged file.
        kind: ``loaded``, or the name of the exception, or ``memory``, ``time``, ``printed`` or ``ended``.
        wrong: True if the case failed.
        detail: The message, or the traceback of a failure.
    """

    case: int
    file: str
    kind: str
    wrong: bool
    detail: str = ""


def fuzz(bundle: Path, cases: range, seed: int, *, graphs: bool = True) -> Iterator[Outcome]:
    """Runs cases in a child process. If a case ends the process, a new one runs the next cases.

    Args:
        bundle: The bundle whose copy is damaged.
        cases: Numbers of the cases.
        seed: Seed of the random choices, together with the case's number.
        graphs: Whether to damage graphs as well.
    """
    with tempfile.TemporaryDirectory() as scratch:
        prepare(bundle, Path(scratch) / "files")
        position = cases.start
        while position < cases.stop:
            arguments = [str(value) for value in (position, cases.stop, seed, int(graphs))]
            command = [sys.executable, __file__, "--child", scratch, *arguments]
            started, file = position, ""
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:  # noqa: S603
                assert child.stdout is not None and child.stderr is not None
                for line in child.stdout:
                    outcome = Outcome(**json.loads(line))
                    if outcome.kind == "started":
                        started, file = outcome.case, outcome.file
                    else:
                        position = outcome.case + 1
                        yield outcome
                errors = child.stderr.read()
            if position < cases.stop:
                detail = f"the process ended with {child.returncode}: {errors[-2000:]}"
                position = max(position, started)
                yield Outcome(position, file if position == started else "", "ended", True, detail)
                position += 1


class Idle:
    """A backend whose steps take no time, to make a latency table with."""

    name = "idle"
    rows = 1
    max_tokens = None

    def reserve(self, capacity: int) -> None:
        """Does nothing, as it has no caches."""

    def reset(self, row: int) -> None:
        """Does nothing, as it has no caches."""

    def step(self, size: int, prompts: object, rows: object) -> None:
        """Does nothing."""


def use_tokenizer(tokenizer: Any) -> None:
    """Encodes and decodes a text, and renders a chat with each template."""
    if tokenizer is None:
        return
    last: MedusaError | None = None
    for template in (None, *tokenizer.chat_templates):
        try:
            chat = tokenizer.render_chat(MESSAGES, chat_template=template, tools=TOOLS)
            tokenizer.encode(chat, add_special_tokens=False, max_tokens=MOST_TOKENS)
        except MedusaError as error:  # the other templates are used all the same
            last = error
    ids = tokenizer.encode("Hello, wörld 👋\n  <a> don't ½")
    some = [*ids[:20], *range(min(tokenizer.vocab_size, 40)), 10**6]
    tokenizer.decode(some)
    tokenizer.decode(some, skip_special_tokens=False, clean_up=True)
    for token in some:
        tokenizer.token_bytes(token)
    stream = TextStream(tokenizer, stop=("stop", "d"))
    for token in some:
        stream.push([token])
    stream.finish()
    if last is not None:
        raise last


def use_bundle(folder: Path, *, run: bool) -> None:
    """Loads a bundle or an engine's description, and everything that is made of it.

    Args:
        folder: The folder.
        run: Whether to load the backend and run the graph as well.
    """
    bundle = Bundle.load(folder, check_digests=False)
    if is_engine(folder):
        description = CompiledEngine.load(folder, check_digests=False)
        assert description.backend_name and description.to_json(bundle)
    assert bundle.to_json() and bundle.tree.draw() and bundle.acceptance.expected_tokens(bundle.tree.size) >= 0
    assert bundle.tree.ancestor_mask.any() and bundle.tree.node_paths.size and np.isfinite(bundle.tree.depths).all()
    tables = {1: LatencyTable.measured(bundle, Idle())}  # type: ignore[arg-type]
    choice = TreeChoice(bundle.acceptance, bundle.tree, tables)
    for size in (1, bundle.tree.size):
        choice.observe(size, {0: 1})
        assert 1 <= choice.size([0]) <= bundle.tree.size
    tokenizer = Tokenizer.load(bundle.listed)
    use_tokenizer(tokenizer)
    if run:
        with MedusaEngine(bundle, open_backend("onnxruntime", bundle, threads=1), tokenizer) as engine:
            engine.generate([5, 6, 7], max_new_tokens=4, tree_size=bundle.tree.size)


def use_exporters(folder: Path) -> None:
    """Reads the files that the exporter reads."""
    tree = load_tree(str(folder / "tree.json"), num_heads=3, top_k=4).tree
    calibration = Calibration.load(folder / "calibration.json")
    calibration.acceptance(tree)


def damage(folder: Path, case: int, seed: int, *, graphs: bool) -> str:
    """Damages one file of a folder.

    Args:
        folder: The folder of undamaged files.
        case: Number of the case.
        seed: Seed of the random choices.
        graphs: Whether to damage graphs as well.

    Returns:
        The damaged file's path in the folder.
    """
    random = Random(f"{seed}/{case}")  # noqa: S311
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    is_graph = {name for name in names if ".onnx" in name}
    wanted = is_graph if graphs and case % GRAPH_EVERY == 0 else set(names) - is_graph
    # Descriptions hold most of the checked values, so they are damaged twice as often as other files.
    chosen = random.choice(
        sorted(wanted) + [name for name in sorted(wanted) if name.endswith(("medusa.json", "engine.json"))]
    )
    path = folder / chosen
    kind = random.random()
    if kind < 0.05:
        replace_file(path, random)
    elif kind < 0.2 or chosen in is_graph:
        path.write_bytes(mutated_bytes(path.read_bytes(), random))
    elif path.suffix == ".jinja":
        path.write_bytes(mutated_template(path.read_bytes(), random))
    else:
        path.write_bytes(mutated_json(path.read_bytes(), random))
    top = Path(chosen).parts[0]
    if top in ("bundle", "engine"):
        list_files(folder / top, path.name)
    return chosen


class Watch:
    """Measures memory, CPU time and standard output of this process during a case."""

    def __init__(self) -> None:
        self._printed = os.memfd_create("printed")
        os.dup2(self._printed, 1)
        self._page = resource.getpagesize()
        self._present = 0
        self._began = 0.0

    def begin(self) -> None:
        """Starts measuring a case. If the case runs for too long, SIGPROF ends the process."""
        self._take_printed()
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak of memory
        self._present = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * self._page
        self._began = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, 2 * MOST_SECONDS)

    def end(self) -> str | None:
        """Stops measuring. Returns the limit that the case exceeded, in words; None if it exceeded none."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        seconds = time.process_time() - self._began
        status = Path("/proc/self/status").read_text(encoding="ascii")
        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024 - self._present
        if seconds > MOST_SECONDS:
            return f"time: {seconds:.1f} s"
        if peak > MOST_BYTES:
            return f"memory: {peak / 1e6:.0f} MB"
        printed = self._take_printed()
        return f"printed: {printed!r:.300}" if printed else None

    def _take_printed(self) -> bytes:
        """The bytes that were printed since the last call, also by libraries in C."""
        sys.stdout.flush()
        printed = os.pread(self._printed, 2**20, 0)
        os.ftruncate(self._printed, 0)
        os.lseek(self._printed, 0, os.SEEK_SET)
        return printed


def run_case(originals: Path, folder: Path, case: int, seed: int, *, graphs: bool, watch: Watch) -> Iterator[Outcome]:
    """Runs one case. Yields an outcome ``started`` before it, as the case may end the process."""
    file = damage(folder, case, seed, graphs=graphs)
    yield Outcome(case, file, "started", False)
    kind, wrong, detail = "loaded", False, ""
    watch.begin()
    try:
        use(folder, file)
    except MedusaError as error:
        kind, detail = type(error).__name__, str(error)
        if len(detail) > LONGEST_MESSAGE or not detail.isprintable():
            wrong, detail = True, f"a message of {len(detail):,} characters: {detail[:500]!r}"
    except BaseException as error:  # noqa: BLE001  # a panic of Rust code is not an Exception
        kind, wrong, detail = type(error).__name__, True, traceback.format_exc()[-3000:]
        del error
    excess = watch.end()
    if excess:
        kind, wrong, detail = excess.partition(":")[0], True, f"{excess}; {kind}: {detail[:300]}"
    restore(originals, folder, file)
    yield Outcome(case, file, kind, wrong, detail)


def restore(originals: Path, folder: Path, file: str) -> None:
    """Restores the file that a case has damaged and the descriptions beside it. Removes the measured step times."""
    top = Path(file).parts[0]
    for name in (file, *(f"{top}/{name}" for name in ("medusa.json", "engine.json", ".medusa-latency.json"))):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if (originals / name).exists():
            shutil.copy(originals / name, path)


def use(folder: Path, file: str) -> None:
    """Loads the bundle, engine, tokenizer or input that a damaged file belongs to."""
    top = Path(file).parts[0]
    if top == "exporter":
        use_exporters(folder / top)
    elif top == "tokenizers":
        use_tokenizer(Tokenizer.load(folder / Path(file).parent))
    else:
        use_bundle(folder / top, run=".onnx" in file)


def child(scratch: Path, start: int, stop: int, seed: int, graphs: bool) -> None:
    """Runs cases in this process. Writes a line of JSON to standard output before and after each case."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as results:  # a copy, as cases print to another file
        run_cases(scratch, range(start, stop), seed, graphs=graphs, results=results)


def run_cases(scratch: Path, cases: range, seed: int, *, graphs: bool, results: TextIO) -> None:
    """Runs cases in this process. Writes a line of JSON to ``results`` before and after each case."""
    watch, originals = Watch(), scratch / "files"
    for top in ("exporter/tree.json", "bundle/model.onnx", "engine/engine.json", "tokenizers/words/tokenizer.json"):
        use(originals, top)  # imports modules and fills caches, which would otherwise count for the first case
    gc.collect()
    gc.freeze()  # what is loaded by now stays, so that collections before cases are short
    shutil.rmtree(scratch / "case", ignore_errors=True)
    shutil.copytree(originals, scratch / "case")
    for case in cases:
        for outcome in run_case(originals, scratch / "case", case, seed, graphs=graphs, watch=watch):
            print(json.dumps(asdict(outcome)), file=results, flush=True)


@click.command()
@click.argument("cases", type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, help="Seed of all random choices.")
@click.option("--only", type=int, help="Run only the case of this number, and print its outcome.")
@click.option("--graphs/--no-graphs", default=True, show_default=True, help="Damage graphs as well.")
@click.option("--bundle", "folder", type=click.Path(path_type=Path, file_okay=False), help="The bundle to damage.")
def main(cases: int, seed: int, only: int | None, graphs: bool, folder: Path | None) -> None:
    """Run CASES cases and report the outcomes. The exit code is 1 if a case fails."""
    with bundle_folder(folder, tokenizer=True) as bundle:
        numbers = range(cases) if only is None else range(only, only + 1)
        kinds: Counter[str] = Counter()
        failed = 0
        for outcome in fuzz(bundle, numbers, seed, graphs=graphs):
            kinds[outcome.kind] += 1
            failed += outcome.wrong
            if outcome.wrong or only is not None:
                print(f"seed {seed}, case {outcome.case}: {outcome.file}: {outcome.kind}: {outcome.detail}", flush=True)
    print(f"{sum(kinds.values()):,} cases, {failed} failed: {dict(kinds.most_common())}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), *map(int, sys.argv[3:6]), bool(int(sys.argv[6])))
    else:
        main()
