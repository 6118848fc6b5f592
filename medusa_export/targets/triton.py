"""Writes a model repository of Triton Inference Server."""

from __future__ import annotations

import json
import re
import shutil
from os import PathLike
from pathlib import Path

from medusa_export.common import defaults
from medusa_export.common.errors import OptionError, OutputError
from medusa_export.common.files import atomic_folder, check_target
from medusa_export.common.progress import OnProgress, Progress, ignore_progress
from medusa_runtime.bundles.bundle import Bundle

_CONFIG = "config.pbtxt"
_VERSION = "1"
_BUNDLE = "bundle"

_MODEL = '''\
"""Serves the bundle in this folder."""

try:
    from medusa_runtime.integrations.triton import TritonPythonModel
except ModuleNotFoundError as error:
    message = f"{error.name} is not installed: run pip install 'medusa-export[server]' in the Python that Triton uses."
    raise ModuleNotFoundError(message, name=error.name) from error

__all__ = ["TritonPythonModel"]
'''

# Inputs and outputs by name: Triton's type, and the number of elements. They are those of Triton's vLLM backend.
_INPUTS = {
    "text_input": ("STRING", 1),
    "stream": ("BOOL", 1),
    "sampling_parameters": ("STRING", 1),
    "exclude_input_in_output": ("BOOL", 1),
    "return_finish_reason": ("BOOL", 1),
    "return_cumulative_logprob": ("BOOL", 1),
    "return_logprobs": ("BOOL", 1),
    "return_num_input_tokens": ("BOOL", 1),
    "return_num_output_tokens": ("BOOL", 1),
}
_OUTPUTS = {
    "text_output": ("STRING", -1),
    "finish_reason": ("STRING", -1),
    "cumulative_logprob": ("FP32", -1),
    "logprobs": ("STRING", -1),
    "num_input_tokens": ("UINT32", 1),
    "num_output_tokens": ("UINT32", -1),
}


def write_triton_repository(
    bundle: str | PathLike[str],
    output: str | PathLike[str],
    *,
    name: str | None = None,
    rows: int = defaults.SERVICE_ROWS,
    copy: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> Path:
    """Writes a model into a model repository of Triton, for its Python backend.

    Args:
        bundle: The bundle, or the folder of a compiled engine.
        output: The model repository. It may hold other models.
        name: Name of the model; None for the name of the bundle's folder.
        rows: Requests that run at a time.
        copy: If True, the model holds a copy of the bundle. If False, it holds a link to it.
        overwrite: Replace a model of this name.
        on_progress: Receives reports.

    Returns:
        The folder of the model.

    Raises:
        BundleError: The bundle can't be read.
        ExportError: There is something else in the model's place.
        OptionError: The name can't be that of a folder.
        OutputError: The model can't be written.
    """
    source = Path(bundle).absolute()
    Bundle.load(source, check_digests=False)
    name = source.name if name is None else name
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
        raise OptionError(f"`name` is {name!r}: use letters, digits, '.', '-' and '_'.")
    target = Path(output) / name
    check_target(target, replace_existing=overwrite, marker=_CONFIG, noun="model")
    try:
        with atomic_folder(target, replace_existing=overwrite) as folder:
            (folder / _CONFIG).write_text(_config(rows), encoding="utf-8")
            (folder / _VERSION).mkdir()
            (folder / _VERSION / "model.py").write_text(_MODEL, encoding="utf-8")
            if copy:
                shutil.copytree(source, folder / _VERSION / _BUNDLE)
            else:
                (folder / _VERSION / _BUNDLE).symlink_to(source, target_is_directory=True)
    except OSError as error:
        raise OutputError(f"The model can't be written to {target}: {error}.") from error
    on_progress(Progress(f"wrote the model {name}, with {'a copy of' if copy else 'a link to'} {source}"))
    return target


def _config(rows: int) -> str:
    """The model's configuration, in the text format of Triton."""
    parameters = {"bundle": _BUNDLE, "backend": "auto", "rows": str(rows)}
    return f"""\
# Written by medusa-export. Parameters are fields of medusa_runtime.server.settings.Settings.
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
# For several GPUs, use kind: KIND_GPU: each gets an instance.
instance_group [ {{ count: 1, kind: KIND_MODEL }} ]
{_list("input", [_tensor(name, *facts, optional=name != "text_input") for name, facts in _INPUTS.items()])}
{_list("output", [_tensor(name, *facts) for name, facts in _OUTPUTS.items()])}
{_list("parameters", [_parameter(name, value) for name, value in parameters.items()])}
"""


def _list(field: str, values: list[str]) -> str:
    return f"{field} [\n  " + ",\n  ".join(values) + "\n]"


def _tensor(name: str, kind: str, size: int, *, optional: bool = False) -> str:
    return f'{{ name: "{name}", data_type: TYPE_{kind}, dims: [ {size} ]{", optional: true" if optional else ""} }}'


def _parameter(name: str, value: str) -> str:
    return f'{{ key: "{name}", value: {{ string_value: {json.dumps(value)} }} }}'
