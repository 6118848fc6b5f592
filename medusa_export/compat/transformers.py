"""transformers: silence, and facts that only its private parts hold.

Tried with transformers 5.23.0.

* ``quiet_libraries``: transformers shows a progress bar for the tensors of a GGUF file whatever its settings say. It
  and the hub's library report and warn of much that a user can do nothing about. Without it all that is on the
  terminal.
* ``has_causal_lm``, ``calls_attention_interface``, ``has_state``: the public interface doesn't tell. Without them, a
  model that can't be exported fails later and with a worse message, or is exported wrongly.
* ``causal_lm_class``: ``AutoModelForCausalLM`` takes no weights in memory without a path. Without it, a weight format
  would have to write its weights to a folder first.
* ``may_be_missing``, ``may_be_left_out``: tensors that a class of models leaves out on purpose. Without them ``verify``
  would report such tensors as missing.
* ``attention_of``, ``default_attention``: the attention that a model uses, and the one that transformers would choose.
  Without them ``verify`` could not compare with transformers' own attention.
* ``one_gpu_per_process``: the Trainer uses all GPUs in threads of one process. Without it, tensors of a step are split
  between GPUs.
* ``restore_weights``: ``Trainer.train`` does one more step for a checkpoint within an epoch, even after the last.
  Without it, a job that was finished trains on when it is started again.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from logging import ERROR
from typing import Any

import huggingface_hub.utils.logging as hub_logging
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps reports, warnings and progress bars of transformers and the hub's library off the terminal."""
    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    bars: Any = logging  # its functions have no annotations
    had_bars = bars.is_progress_bar_enabled()
    gguf_utils: Any = modeling_gguf_pytorch_utils
    bar = gguf_utils.tqdm  # shown whatever transformers' setting is
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity(ERROR)
        hub_logging.set_verbosity(ERROR)
        bars.disable_progress_bar()
        gguf_utils.tqdm = partial(bar, disable=True)
        try:
            yield
        finally:
            gguf_utils.tqdm = bar
            if had_bars:
                bars.enable_progress_bar()
            hub_logging.set_verbosity(hub_verbosity)
            logging.set_verbosity(verbosity)


def has_causal_lm(config: PreTrainedConfig) -> bool:
    """Whether transformers has a causal language model for a configuration."""
    return type(config) in AutoModelForCausalLM._model_mapping


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """transformers' causal language model for a configuration that has one."""
    found: type[PreTrainedModel] = AutoModelForCausalLM._model_mapping[type(config)]
    return found


def calls_attention_interface(model: PreTrainedModel) -> bool:
    """Whether the layers of a model call transformers' attention interface."""
    return bool(model._can_set_attn_implementation())


def has_state(model: PreTrainedModel) -> bool:
    """Whether transformers says that a model keeps a state other than keys and values."""
    return bool(model._is_stateful)


def may_be_missing(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight of a model may be missing in its files."""
    return _matches(model._keys_to_ignore_on_load_missing, name)


def may_be_left_out(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor of the files may have no place in the model."""
    return _matches(model._keys_to_ignore_on_load_unexpected, name)


def _matches(patterns: Any, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def attention_of(model: PreTrainedModel) -> str:
    """The name of the attention that a model uses."""
    return str(model.config._attn_implementation)


def default_attention(model: PreTrainedModel) -> str:
    """The name of transformers' fastest attention on a CPU for a model."""
    return "sdpa" if model._supports_sdpa else "eager"


def one_gpu_per_process(arguments: TrainingArguments) -> None:
    """Makes the Trainer use one GPU. Several are for ``accelerate launch``."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1


def restore_weights(trainer: Trainer, checkpoint: str) -> None:
    """Loads the weights of a checkpoint without training."""
    trainer._load_from_checkpoint(checkpoint)
