"""Exports a model of Llama 2 7B's shape with random weights, and prints the time and the peak memory as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

_MAX_SHARD = 4 * 10**9
_IMPORTS = "import torch, transformers, onnx_ir, onnxscript; from transformers import LlamaForCausalLM"


def write_model(folder: Path, layers: int) -> None:
    """Writes random fp16 weights as sharded safetensors, one shard in memory at a time."""
    config = LlamaConfig(num_hidden_layers=layers)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shards: list[list[str]] = [[]]
    filled, total = 0, 0
    places = {}
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    for name, shape in shapes.items():
        size = 2 * shape.numel()
        if shards[-1] and filled + size > _MAX_SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
        total += size
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(
            {name: torch.empty(shapes[name], dtype=torch.float16).normal_(std=0.02) for name in names},
            folder / file,
            metadata={"format": "pt"},
        )
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_heads(path: Path, count: int) -> None:
    """Writes random fp16 heads as MEDUSA-1 has them: one residual block and an output projection for each head."""
    config = LlamaConfig()
    shapes = {"0.linear.weight": (config.hidden_size,) * 2, "0.linear.bias": (config.hidden_size,)}
    shapes["1.weight"] = (config.vocab_size, config.hidden_size)
    tensors = {
        f"{head}.{name}": torch.empty(shape, dtype=torch.float16).normal_(std=0.02)
        for head in range(count)
        for name, shape in shapes.items()
    }
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def measured(*command: str) -> dict[str, float]:
    """Runs a command, and returns its seconds and its peak of resident memory in GB."""
    started = time.perf_counter()
    measure = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    measure += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    out = subprocess.run(  # noqa: S603  # our own command
        [sys.executable, "-c", measure, *command], check=True, stdout=subprocess.PIPE, text=True
    )
    return {"seconds": time.perf_counter() - started, "peak_gb": int(out.stdout.split()[-1]) * 1024 / 1e9}


@click.command(help=__doc__)
@click.option("--layers", default=32, show_default=True, help="Decoder layers.")
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), help="Where to write: 30 GB at 32 layers.")
@click.option("--heads", default=0, show_default=True, help="Heads with output projections of their own.")
@click.option("--heads-file", type=click.Choice((".safetensors", ".pt")), default=".safetensors", show_default=True)
@click.argument("options", nargs=-1)
def main(layers: int, work: Path | None, heads: int, heads_file: str, options: tuple[str, ...]) -> None:
    """Runs the benchmark."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        model, bundle = Path(folder, "model"), Path(folder, "bundle")
        write_model(model, layers)
        with_heads = ["--no-heads"]
        if heads:
            file = Path(folder, f"medusa_lm_head{heads_file}")
            write_heads(file, heads)
            with_heads = ["--heads", str(file)]
        result = {
            "imports": measured(sys.executable, "-c", _IMPORTS),
            "export": measured(
                sys.executable, "-m", "medusa_export", "onnx", str(model), *with_heads, "-o", str(bundle), *options
            ),
            "bundle_gb": sum(file.stat().st_size for file in bundle.iterdir()) / 1e9,
        }
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
