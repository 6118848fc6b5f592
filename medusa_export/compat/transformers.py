"""transformers: silence, and facts that only its private parts hold.

Tried with transformers 5.24.0.

* ``quiet_libraries``: transformers shows a progress bar for the tensors of a GGUF file whatever its settings say. It
  and the hub's library report and warn of much that a user can do nothing about. Without it all that is on the
  terminal.
* ``has_causal_lm``, ``calls_attention_interface``, ``has_state``: the public interface lacks these facts. Without them,
  a model that can't be exported fails later and with a worse message, or is exported wrongly.
* ``is_larger``, ``model_class``: ``AutoModelForCausalLM`` takes no weights in memory without a path, and lacks
  a class for most models of images and text. Without them, a weight format would have to write its weights to a folder
  first.
* ``loaded_by_transformers``: the models of Qwen Omni add voices to what they load, and fail if they are asked for the
  names of tensors that they did not find. Without it, their text models can't be loaded.
* ``experts_of``, ``experts_layout``, ``register_experts``, ``experts_function``: the interface by which layers
  call their experts. Without it, the code of experts would have to be replaced for each family of models.
* ``CACHE``, ``cache_argument``: transformers 5.24 gave ``past_key_values`` the name ``cache``, in arguments and in
  outputs. Without them, each call would warn there, and fail from 5.40 on.
* ``noting_masks``: transformers makes no masks for an attention function of ours. Without it, a model would be exported
  wrongly whose masks have a window that its layers don't hand to their attention.
* ``may_be_missing``, ``may_be_left_out``: tensors that a class of models leaves out on purpose. Without them ``verify``
  would report such tensors as missing.
* ``attention_of``, ``default_attention``: the attention that a model uses, and the one that transformers would choose.
  Without them ``verify`` could not compare with transformers' own attention.
* ``using_attention``: the attention of a model that takes no other one by the public interface. Without it, an MPT that
  was loaded with our attention would ask for a mask that no function makes.
* ``one_gpu_per_process``: the Trainer uses all GPUs in threads of one process. Without it, tensors of a step are split
  between GPUs.
* ``restore_weights``: ``Trainer.train`` does one more step for a checkpoint within an epoch, even after the last.
  Without it, a job that was finished trains on when it is started again.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from logging import ERROR
from typing import TYPE_CHECKING, Any

import huggingface_hub.utils.logging as hub_logging
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

if TYPE_CHECKING:  # Trainer brings datasets, pandas and peft: a second and 100 MB that only a training needs
    from transformers import Trainer, TrainingArguments

# The field of a model's output that holds its cache, and the argument by which transformers' own layers take it.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def cache_argument(model: nn.Module) -> str:
    """The name of the argument by which a model takes its cache. Models with their own code may have the older one."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), CACHE)


@contextmanager
def noting_masks(attention: str, make: Callable[[int | None], Tensor]) -> Iterator[None]:
    """Lets a function make the masks of models with an attention implementation, while the block lasts.

    Args:
        attention: The name of the attention implementation. It has no masks outside the block.
        make: Called with the number of tokens that a token attends to, itself included: the window, or the size of a
            chunk; None for all. It returns what layers get as their mask.
    """

    def mask(*_: object, local_size: int | None = None, **__: object) -> Tensor:
        return make(local_size)

    known = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    known[attention] = mask
    try:
        yield
    finally:
        del known[attention]


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


def is_larger(config: PreTrainedConfig) -> bool:
    """True if a configuration is that of several models, one of which is a text model."""
    return config.get_text_config(decoder=True) is not config


def attention_of_text(config: PreTrainedConfig, name: str) -> dict[str, Any] | None:
    """The attention of the text model in a larger configuration, in the form that ``from_pretrained`` takes.

    Args:
        config: The configuration.
        name: The name of the attention.

    Returns:
        A dictionary by the names of configurations in each other; None if ``config`` holds no text model.
    """
    text = config.get_text_config(decoder=True)
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if part is text:
            return {key: name}
        inner = attention_of_text(part, name) if isinstance(part, PreTrainedConfig) and part.sub_configs else None
        if inner is not None:
            return {key: inner}
    return None


def has_causal_lm(config: PreTrainedConfig) -> bool:
    """True if transformers has a model for a configuration that gives logits of the next token."""
    return any(type(config) in mapping for mapping in _mappings(config))


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """transformers' causal language model for a configuration that has one.

    For a larger model it is the class of the whole, which ends in a causal language model.
    """
    found: type[PreTrainedModel] = next(m[type(config)] for m in _mappings(config) if type(config) in m)
    return found


def loaded_by_transformers(found: type[PreTrainedModel], path: str | None, **arguments: Any) -> Any:
    """transformers' ``from_pretrained`` for a class, without what the class adds to it."""
    load: Any = PreTrainedModel.from_pretrained
    return load.__func__(found, path, **arguments)


def _mappings(config: PreTrainedConfig) -> list[Any]:
    if is_larger(config):
        return [AutoModelForImageTextToText._model_mapping, AutoModelForMultimodalLM._model_mapping]
    return [AutoModelForCausalLM._model_mapping]


def takes_attention(model: type[PreTrainedModel]) -> bool:
    """True if the layers of a class of models call transformers' attention interface."""
    return bool(model._can_set_attn_implementation())


def calls_attention_interface(model: PreTrainedModel) -> bool:
    """True if the layers of a model call transformers' attention interface."""
    return takes_attention(type(model))


def has_state(model: PreTrainedModel) -> bool:
    """True if transformers says that a model keeps a state other than keys and values."""
    return bool(model._is_stateful)


@dataclass(frozen=True)
class ExpertsLayout:
    """The parts of a module of experts.

    Attributes:
        num_experts: E, the number of experts.
        first: The name of the weights that a hidden state is multiplied with first. Those after it are ``down_proj``.
        transposed: True if the matrices of an expert are stored as [inputs, outputs].
        has_bias: True if each weight has a bias, whose name ends in ``_bias``.
        activate: The function between both products.
        finish: The function after them.
    """

    num_experts: int
    first: str
    transposed: bool
    has_bias: bool
    activate: Callable[[Tensor], Tensor]
    finish: Callable[[Tensor], Tensor]


def calls_experts_interface(module: nn.Module) -> bool:
    """True if a module of experts calls transformers' interface for experts."""
    return hasattr(module, "_apply_gate") and hasattr(module, "has_gate")


def experts_of(model: PreTrainedModel) -> list[Any]:
    """The modules of a model that call transformers' interface for experts."""
    return [module for module in model.modules() if calls_experts_interface(module)]


def experts_layout(module: nn.Module) -> ExpertsLayout:
    """The parts of a module that calls transformers' interface for experts."""
    experts: Any = module
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    return ExpertsLayout(
        num_experts=int(getattr(experts, first).shape[0]),
        first=first,
        transposed=bool(experts.is_transposed),
        has_bias=bool(experts.has_bias),
        activate=experts._apply_gate if experts.has_gate else experts.act_fn,
        finish=experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else nn.Identity(),
    )


def register_experts(name: str, function: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Adds a function to transformers' interface for experts."""
    ALL_EXPERTS_FUNCTIONS.register(name, function)


@contextmanager
def experts_function(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Makes the experts of a model, if it has any, call a registered function for the duration of a block."""
    configs: dict[int, Any] = {id(experts.config): experts.config for experts in experts_of(model)}
    before = {key: config._experts_implementation for key, config in configs.items()}
    for config in configs.values():
        config._experts_implementation = name
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]


def may_be_missing(model: PreTrainedModel, name: str) -> bool:
    """True if a weight of a model may be missing in its files."""
    return _matches(model._keys_to_ignore_on_load_missing, name)


def may_be_left_out(model: PreTrainedModel, name: str) -> bool:
    """True if a tensor of the files may have no place in the model."""
    return _matches(model._keys_to_ignore_on_load_unexpected, name)


def _matches(patterns: Any, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def attention_of(model: PreTrainedModel) -> str:
    """The name of the attention that a model uses."""
    return str(model.config._attn_implementation)


def default_attention(model: PreTrainedModel) -> str:
    """The name of transformers' fastest attention on a CPU for a model."""
    return "sdpa" if model._supports_sdpa else "eager"


@contextmanager
def using_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Sets the name of a model's attention while the block lasts, whether or not its layers choose by it."""
    before = attention_of(model)
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def one_gpu_per_process(arguments: TrainingArguments) -> None:
    """Makes the Trainer use one GPU. Several are for ``accelerate launch``."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1


def restore_weights(trainer: Trainer, checkpoint: str) -> None:
    """Loads the weights of a checkpoint without training."""
    trainer._load_from_checkpoint(checkpoint)
