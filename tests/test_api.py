"""The Python API: its surface, each function end to end on a tiny model, progress, warnings and typed errors."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import medusa_export
from medusa_export import (
    BenchPrompt,
    Calibration,
    DistillOptions,
    HeadShape,
    MedusaHeads,
    MedusaWarning,
    OptionError,
    Progress,
    TrainOptions,
    Tree,
)
from medusa_export.cli import main
from medusa_runtime import Bundle, MedusaEngine

FUNCTIONS = [name for name in medusa_export.__all__ if name.islower()]
CLASSES = [name for name in medusa_export.__all__ if not name.islower() and name != "OnProgress"]
REFERENCE = Path(__file__).parents[1] / "docs" / "reference"


class Reports(list[Progress]):
    """Collects reports."""

    def __call__(self, report: Progress) -> None:
        self.append(report)

    @property
    def messages(self) -> list[str]:
        return [report.message for report in self]


def test_the_public_surface_is_the_documented_one() -> None:
    assert medusa_export.__all__ == sorted(medusa_export._MODULES)
    pages = "".join(page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.md"))
    documented = re.findall(r"^::: ([\w.]+)", pages, re.MULTILINE)
    for name in FUNCTIONS + CLASSES:
        assert getattr(medusa_export, name) is not None
        module = medusa_export._MODULES[name]
        assert {module, f"{module}.{name}"} & {*documented}, f"The reference has no entry for {name}"
    public = {
        *medusa_export._MODULES.values(),
        *(f"{module}.{name}" for name, module in medusa_export._MODULES.items()),
    }
    private = [path for path in documented if path.startswith("medusa_export.") and path not in public]
    assert not private, "These are documented, but are not public."
    with pytest.raises(AttributeError, match="no attribute 'compile'"):
        medusa_export.compile  # noqa: B018


def test_type_checkers_see_every_name() -> None:
    """The imports for type checkers are the table of modules."""
    tree = ast.parse(Path(medusa_export.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    found = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert found == medusa_export._MODULES


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_document_every_argument(name: str) -> None:
    function = getattr(medusa_export, name)
    text = inspect.getdoc(function) or ""
    parameters = inspect.signature(function).parameters.values()
    assert not [p for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    arguments = re.search(r"\nArgs:\n(.*?)(?=\n\n|\Z)", text, re.DOTALL)
    assert arguments is not None
    documented = re.findall(r"^    (\w+): ", arguments[1], re.MULTILINE)
    assert documented == [p.name for p in parameters]
    assert "\nRaises:\n" in text
    assert all(p.annotation is not p.empty for p in parameters)


@pytest.mark.parametrize("name", CLASSES)
def test_types_have_docstrings(name: str) -> None:
    assert inspect.getdoc(getattr(medusa_export, name))


def test_the_import_needs_no_torch() -> None:
    code = (
        "import sys; import medusa_export; medusa_export.Progress, medusa_export.OptionError, "
        "medusa_export.TrainOptions; assert not {'torch', 'transformers', 'numpy', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_package_names_its_extra() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\nimport medusa_export\n"
        "try: medusa_export.train\nexcept medusa_export.MissingExtraError as error: print(error.extra, error)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.startswith("train This needs the package 'torch'")


def test_a_report_as_a_line() -> None:
    assert str(Progress("tracing")) == "tracing"
    assert str(Progress("answering", 1200, 2400, "80 tokens/s")) == "answering: 1,200 of 2,400, 80 tokens/s"


@pytest.mark.slow
def test_a_loaded_model_exports_like_its_folder(
    tiny_model_folder: Path, untrained_bundle: Bundle, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).train()
    attention = model.config._attn_implementation
    reports = Reports()
    bundle = medusa_export.export(
        model,
        tmp_path / "bundle",
        tokenizer=AutoTokenizer.from_pretrained(tiny_model_folder),
        init_heads=2,
        top_k=2,
        name=untrained_bundle.model.name,
        on_progress=reports,
    )
    assert reports.messages[:2] == ["loading the model", "tracing"]
    assert {"assembling", "writing weights"} <= set(reports.messages)
    assert bundle.files == untrained_bundle.files  # the same bytes
    assert Bundle.load(tmp_path / "bundle").to_json() == untrained_bundle.to_json()
    # The model is as it was.
    assert model.training
    assert model.config._attn_implementation == attention
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
def test_loaded_heads_and_a_tree_and_what_a_user_should_know(tiny_model_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    heads = MedusaHeads.fresh(2, model.get_output_embeddings())
    tree = Tree.from_paths([[0], [0, 0], [1]])
    model.generation_config.repetition_penalty = 1.5
    with pytest.warns(MedusaWarning, match=r"repetition_penalty=1\.5"):
        bundle = medusa_export.export(model, tmp_path / "bundle", heads=heads, tree=tree, sampling=False)
    assert bundle.tree == tree
    assert bundle.heads is not None and bundle.heads.trained and not bundle.sampling
    with MedusaEngine.load(tmp_path / "bundle") as engine:
        assert engine.tokenizer is None
        assert len(engine.generate([5, 17, 80], max_new_tokens=4).token_ids) == 4


def test_options_that_contradict_each_other(tiny_model_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    other = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    heads = MedusaHeads.fresh(2, other.get_output_embeddings())
    out = tmp_path / "bundle"
    for options, words in (
        ({"heads": heads, "init_heads": 2}, "drop one of them"),
        ({"calibration": "c.json"}, "belongs to trained heads"),
        ({"tree": "mc_sim_7b_63"}, "A tree needs heads"),
        ({"heads": heads}, "lm_head of another loaded model"),
        ({"dtype": "fp16"}, r"is torch\.float32, not fp16"),
    ):
        with pytest.raises(OptionError, match=words):
            medusa_export.export(model, out, **options)
    with pytest.raises(OptionError, match="brings its own tokenizer"):
        medusa_export.export(tiny_model_folder, out, tokenizer=AutoTokenizer.from_pretrained(tiny_model_folder))
    with pytest.raises(OptionError, match="There is no type 'fp8'"):
        medusa_export.export(tiny_model_folder, out, dtype="fp8")  # type: ignore[arg-type]
    assert not out.exists()


def test_verify(untrained_bundle: Bundle, tiny_model_folder: Path) -> None:
    reports = Reports()
    outcome = medusa_export.verify(
        untrained_bundle, tiny_model_folder, max_new_tokens=40, tree_sizes=[1, "full"], on_progress=reports
    )
    assert outcome.passed, [(check.name, check.notes) for check in outcome.checks]
    assert outcome.checks[0].name.startswith("weights")
    assert "comparing weights with their files" in reports.messages
    size = untrained_bundle.tree.size
    with pytest.raises(OptionError, match=f"The tree size {size + 1} is too large"):
        medusa_export.verify(untrained_bundle, tiny_model_folder, tree_sizes=[size + 1])


def test_a_difference_is_no_exception(
    untrained_bundle: Bundle, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    other.lm_head.weight.data += 0.5 * torch.randn_like(other.lm_head.weight)
    other.save_pretrained(tmp_path)
    outcome = medusa_export.verify(untrained_bundle.folder, tmp_path, max_new_tokens=12)
    assert not outcome.passed


def test_bench(tiny_bundle: Bundle) -> None:
    reports = Reports()
    result = medusa_export.bench(
        tiny_bundle.folder,
        tree_sizes=[3],
        prompts=[BenchPrompt("greeting", "Hello")],
        max_new_tokens=6,
        repeats=1,
        threads=1,
        on_progress=reports,
    )
    assert set(result.sizes) == {1, 3}
    assert result.figures()["identical"]
    assert set(result.categories) == {"greeting"}
    assert (reports[-1].done, reports[-1].total) == (1, 1)
    with pytest.raises(OptionError, match="The tree size 10 is too large"):
        medusa_export.bench(tiny_bundle.folder, tree_sizes=[10])


@pytest.mark.slow
def test_build_engine(tiny_bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    reports = Reports()
    engine = medusa_export.build_engine(
        tiny_bundle.folder, tmp_path / "engine", targets=["sm89"], max_seq_len=64, opt_level=0, on_progress=reports
    )
    assert engine.targets == ("sm89",)
    assert engine.limits.capacity == 64
    assert reports.messages[-1].startswith("wrote ")
    assert [report.done for report in reports if report.total == 100][-1] == 100


@pytest.mark.slow
def test_from_prompts_to_a_tree(tiny_model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    """Data, heads, a calibration, a tree and a bundle, each from the one before."""
    reports = Reports()
    options = DistillOptions(batch_size=4, max_new_tokens=12, heldout=0.3, temperature=1)
    made = medusa_export.distill(
        tiny_model_folder, tmp_path / "data", prompts=[prompts], options=options, on_progress=reports
    )
    assert made.splits["train"].rows > 0
    assert reports[-1].done == reports[-1].total
    reports.clear()
    trained = medusa_export.train(
        tiny_model_folder,
        [tmp_path / "data"],
        tmp_path / "heads",
        shape=HeadShape(num_heads=2),
        options=TrainOptions(epochs=1, batch_size=16),
        on_progress=reports,
    )
    assert trained.num_heads == 2
    assert trained.merged_perplexity is None
    assert 0 <= trained.heldout["head1_top1"] <= 1
    assert json.loads((tmp_path / "heads" / "training.json").read_text())["recipe"] == "medusa1"
    assert any(message.startswith("epoch 1: held-out loss") for message in reports.messages)
    with pytest.raises(OptionError, match="leave the shape out"):
        medusa_export.train(
            tiny_model_folder, [tmp_path / "data"], tmp_path / "more", heads=tmp_path / "heads", shape=HeadShape()
        )
    calibration = medusa_export.calibrate(tiny_model_folder, tmp_path / "heads", [tmp_path / "data"])
    calibration.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json").model == tiny_model_folder.name
    ranges = medusa_export.activations(tiny_model_folder, [tmp_path / "data"])
    assert ranges.model == tiny_model_folder.name and "lm_head.weight" in ranges.inputs
    tree = medusa_export.search_tree(tmp_path / "c.json", 5)
    assert tree == medusa_export.search_tree(calibration, 5)
    bundle = medusa_export.export(
        tiny_model_folder,
        tmp_path / "bundle",
        heads=tmp_path / "heads",
        calibration=calibration,
        tree_size=5,
        sampling=False,
    )
    assert bundle.acceptance.source == "calibrated"
    times = medusa_export.time_tree(tmp_path / "bundle", bundle.tree, bundle.acceptance)
    assert times.fastest in times.seconds


def test_commands_have_the_defaults_of_their_functions() -> None:
    for command, takers in {
        "activations": [medusa_export.activations],
        "bench": [medusa_export.bench],
        "calibrate": [medusa_export.calibrate],
        "distill": [medusa_export.distill, DistillOptions],
        "onnx": [medusa_export.export],
        "quality": [medusa_export.quality],
        "quantize": [medusa_export.quantize],
        "train": [medusa_export.train, HeadShape, TrainOptions],
        "tree": [medusa_export.search_tree],
        "trt": [medusa_export.build_engine],
        "verify": [medusa_export.verify],
    }.items():
        options = {option.name: option.default for option in main.get_command(None, command).params}
        parameters = {name: p for taker in takers for name, p in inspect.signature(taker).parameters.items()}
        for name in options.keys() & parameters.keys() - {"prefill_chunks"}:  # a text on the command line
            default = parameters[name].default
            if isinstance(default, (int, float, str)) and default is not False:
                assert options[name] == default, (command, name)
