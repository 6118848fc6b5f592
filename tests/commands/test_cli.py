"""The command line: what it prints, what it imports, and how it refuses bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from transformers import ByT5Tokenizer

from medusa_export.cli import COMMANDS, main
from medusa_export.targets import bundle_writer
from medusa_runtime import Bundle, MedusaEngine
from support.cli import run
from support.interrupts import interrupt

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
sys.argv = ['medusa-export', *{arguments!r}]
from medusa_export.cli import main
main(prog_name='medusa-export')
"""
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "onnx_ir", "onnxscript", "numpy", "tokenizers", "rich")


def without(packages: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    code = BLOCKED.format(blocked=packages, arguments=arguments)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_help_needs_nothing() -> None:
    result = without(HEAVY, "--help")
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in COMMANDS)


def test_module_and_version() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "medusa_export", "--version"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0
    assert result.stdout.startswith("medusa-export, version ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_without_its_packages(name: str) -> None:
    result = without(HEAVY, name, "--help")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [("torch", ("onnx", "model", "--no-heads", "-o", "out"), "export"), ("onnx", ("inspect", "bundle"), "export")],
)
def test_a_missing_extra_is_named(package: str, arguments: tuple[str, ...], extra: str) -> None:
    result = without((package,), *arguments)
    assert result.returncode == 1
    assert f"medusa-export[{extra}]" in result.stderr
    assert "Traceback" not in result.stderr


def test_inspect_a_damaged_graph(tiny_bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))
    path = folder / "model.onnxruntime.onnx"
    path.write_bytes(b"\xff" * path.stat().st_size)
    code, output = run("inspect", folder)
    assert code == 1
    assert f"{path} is damaged" in output


def test_inspect(tiny_bundle: Bundle) -> None:
    code, output = run("inspect", tiny_bundle.folder)
    assert code == 0
    for words in ("llama", "9 nodes, 4 deep", "past_key_0 … 1", "TensorScatter 4", "GroupQueryAttention 2", "└─"):
        assert words in output
    code, output = run("inspect", tiny_bundle.folder, "--json")
    assert json.loads(output)["operators"]["model.onnx"]["Attention"] == 2


def test_generate(tiny_bundle: Bundle) -> None:
    with MedusaEngine.load(tiny_bundle.folder) as engine:
        expected = engine.generate("Hello", max_new_tokens=8, tree_size=1)
    code, output = run("generate", tiny_bundle.folder, "Hello", "-n", 8, "--tree-size", 4, "--json")
    assert code == 0
    data = json.loads(output)
    assert data["token_ids"] == list(expected.token_ids)
    assert data["text"] == expected.text
    code, output = run("generate", tiny_bundle.folder, "Hello", "-n", 8, "--chat", "--system", "Be brief")
    assert code == 0


def test_generate_stops_at_tokens_and_takes_them(tiny_bundle: Bundle) -> None:
    prompt = ("--ids", "5, 17 80", "-n", 8, "--json")
    tokens = json.loads(run("generate", tiny_bundle.folder, *prompt)[1])["token_ids"]
    with MedusaEngine.load(tiny_bundle.folder) as engine:
        assert list(engine.generate([5, 17, 80], max_new_tokens=8).token_ids) == tokens
    first = tokens.index(tokens[3])
    code, output = run("generate", tiny_bundle.folder, *prompt, "--stop-token-id", 100, "--stop-token-id", tokens[3])
    assert code == 0
    assert json.loads(output)["finish_reason"] == "stop"
    assert len(json.loads(output)["token_ids"]) in (first, first + 1)
    for wrong, words in (("5,x", "'x' is no token id"), ("-1", "no token id"), ("5 --chat", "drop --chat")):
        text, *more = wrong.split()
        code, output = run("generate", tiny_bundle.folder, "--ids", *more, "--", text)
        assert code == 2
        assert words in output


@pytest.mark.slow
def test_a_tokenizer_can_be_left_out(
    tiny_model_folder: Path, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export replaces a bundle with a tokenizer: nothing of that bundle stays."""
    source = Path(shutil.copytree(tiny_model_folder, tmp_path / "slow-model"))
    for file in source.glob("tokenizer*"):
        file.unlink()
    ByT5Tokenizer().save_pretrained(source)
    monkeypatch.chdir(source)
    shutil.copytree(tiny_bundle.folder, tmp_path / "out")
    arguments = ("onnx", ".", "--no-heads", "--greedy-only", "-o", tmp_path / "out", "--overwrite", "-q")
    code, output = run(*arguments)
    assert code == 1
    assert "ByT5Tokenizer can't be written as a tokenizer.json" in output
    assert "--no-tokenizer" in output
    assert run(*arguments, "--no-tokenizer")[0] == 0
    bundle = Bundle.load(tmp_path / "out")
    assert bundle.model.name == "slow-model"
    assert bundle.heads is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "slow-model"]
    assert not (bundle.folder / "tokenizer.json").exists()
    code, output = run("generate", bundle.folder, "--ids", "5 17", "-n", 2)
    assert code == 0


def test_a_prompt_that_is_no_utf8(tiny_bundle: Bundle) -> None:
    result = CliRunner().invoke(main, ["generate", str(tiny_bundle.folder), "-"], input=b"caf\xe9")
    assert result.exit_code == 2
    assert "not valid UTF-8" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--nonsense",), "No such option"),
        (("frobnicate",), "No such command"),
        (("onnx",), "Missing argument"),
        (("onnx", "m", "-o", "o"), "--init-heads K"),
        (("onnx", "m", "-o", "o", "--no-heads", "--init-heads", "2"), "exactly one of"),
        (("onnx", "m", "-o", "o", "--no-heads", "--tree", "t.json"), "A tree needs heads"),
        (("onnx", "m", "-o", "o", "--no-heads", "--dtype", "int3"), "int3"),
        (("onnx", "m", "-o", "o", "--no-heads", "--top-k", "3"), "--top-k has an effect only with --heads"),
        (("onnx", "m", "-o", "o", "--init-heads", "2", "--tree-size", "9"), "only with --calibration"),
        (("onnx", "m", "-o", "o", "--no-heads", "--block-size", "64"), "only with weights in int8 or int4"),
        (("onnx", "m", "-o", "o", "--no-heads", "--fused-attention"), "only with weights in int8 or int4"),
        (("onnx", "m", "-o", "o", "--no-heads", "--asymmetric"), "--symmetric/--asymmetric has an effect only"),
        (("generate", "b", "p", "--tree-size", "some"), "neither a number nor 'auto'"),
        (("verify", "b", "--model", "m", "--tree-sizes", "1,many"), "not a list of sizes"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], words: str) -> None:
    code, output = run(*arguments)
    assert code == 2
    assert words in output


@pytest.mark.parametrize(
    "arguments",
    [
        ("calibrate", "none", "--heads", "none", "--data", "none", "-o"),
        ("activations", "none", "--data", "none", "-o"),
        ("verify", "none", "--model", "none", "--json"),
        ("bench", "none", "--json"),
        ("quality", "none", "--model", "none", "--json"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_report_that_can_not_be_written_is_refused_first(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "file").touch()
    code, output = run(*arguments, tmp_path / "file" / "report.json")
    assert code == 1
    assert "can't be written, because of" in output


def test_an_unusable_request(tiny_bundle: Bundle) -> None:
    for arguments, words in (
        (("",), "The prompt is empty"),
        (("x" * 600,), "exceed the 512 tokens"),
        (("hi", "--tree-size", "10"), "allows 1 to 9"),
    ):
        code, output = run("generate", tiny_bundle.folder, *arguments)
        assert code == 1
        assert words in output
        assert output.count("\n") == 1


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ([[0], [1, 0]], "it has [1, 0], but not its parent [1]"),
        ([[0], [0, 0], [0, 0, 1]], "[0, 0, 1] is 3 deep, but there are 2 heads"),
        ([[0], [12]], "[12] uses rank 12"),
        ([[0], [0]], "[0] is listed twice"),
        ({"a": 1}, "A tree is a list of rank paths"),
    ],
)
def test_unusable_trees(tiny_model_folder: Path, tmp_path: Path, paths: object, words: str) -> None:
    tree = tmp_path / "tree.json"
    tree.write_text(json.dumps(paths))
    code, output = run("onnx", tiny_model_folder, "--init-heads", 2, "--tree", tree, "-o", tmp_path / "out", "-q")
    assert code == 1
    assert words in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tree.json"]


class Code:
    """A pickle of this would leave a trace."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return open, (self.path, "w")


def test_unusable_heads(tiny_model_folder: Path, tmp_path: Path) -> None:
    right = {"0.0.linear.weight": torch.zeros(64, 64), "0.0.linear.bias": torch.zeros(64)}
    save_file(right, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:200])
    save_file(
        {"0.0.linear.weight": torch.zeros(32, 32), "0.0.linear.bias": torch.zeros(32)}, tmp_path / "other.safetensors"
    )
    torch.save({"0.0.linear.weight": Code(str(tmp_path / "ran"))}, tmp_path / "code.pt")
    before = sorted(path.name for path in tmp_path.iterdir())
    for name, words in (
        ("cut.safetensors", "cut.safetensors ends too early"),
        ("other.safetensors", "has the shape [32, 32]"),
        ("code.pt", "asks to run code"),
        ("none.safetensors", "There are no heads at"),
    ):
        code, output = run("onnx", tiny_model_folder, "--heads", tmp_path / name, "-o", tmp_path / "out", "-q")
        assert code == 1
        assert words in output
        assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.slow
def test_an_export_that_fails_leaves_what_was_there(
    tiny_model_folder: Path, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(tiny_bundle.folder, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    arguments = ("onnx", tiny_model_folder, "--no-heads", "--greedy-only", "-o", out, "-q")
    code, output = run(*arguments)
    assert code == 1
    assert "--overwrite" in output

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(bundle_writer, "save_tokenizer", full)
    code, output = run(*arguments, "--overwrite")
    assert code == 1
    assert "No space left" in output
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_other_things_is_not_replaced(tiny_model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    code, output = run("onnx", tiny_model_folder, "--no-heads", "-o", tmp_path, "--overwrite", "-q")
    assert code == 1
    assert "holds other files and no bundle" in output
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("command", ["inspect", "generate"])
def test_a_closed_pipe_ends_quietly(tiny_bundle: Bundle, command: str) -> None:
    arguments = [command, str(tiny_bundle.folder), *(["Hello", "-n", "200"] if command == "generate" else [])]
    with subprocess.Popen(
        [sys.executable, "-m", "medusa_export", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # as 'head' does once it has enough
        errors = process.stderr.read().decode()
        process.wait(60)
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "code"),
    # An interrupted build, in tests/targets/test_trt.py, has the first signal.
    [pytest.param(signal.SIGINT, 1, marks=pytest.mark.exhaustive), (signal.SIGTERM, 143)],
)
def test_an_interrupted_export_leaves_nothing(
    tiny_model_folder: Path, tmp_path: Path, by: signal.Signals, code: int
) -> None:
    command = ["onnx", str(tiny_model_folder), "--init-heads", "2", "-o", str(tmp_path / "out")]
    returncode, errors = interrupt(command, at=["writing"], by=by)
    assert returncode == code
    assert "Traceback" not in errors
    assert "Aborted" in errors or by is signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_export_imports_nothing_that_only_a_training_needs() -> None:
    """transformers' Trainer imports datasets, pandas and peft, which take 100 MB."""
    program = (
        "import sys, medusa_export.commands.onnx, medusa_export.targets.bundle_writer;"
        "print([name for name in ('datasets', 'pandas', 'peft', 'transformers.trainer') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_the_wheel_holds_what_it_needs(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {
        "medusa_export/data/trees/mc_sim_7b_63.json",
        "medusa_runtime/engine.py",
        "medusa_runtime/py.typed",
    } <= names
