"""The text model out of a larger one, such as a model for images and text.

transformers loads the larger model, so its own code names and converts the weights. Then the decoder and the output
projection are taken out. The weights of the other parts stay in their files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, ModelOutput

from medusa_export.common.errors import ModelNotSupportedError
from medusa_export.compat.transformers import CACHE, has_causal_lm, model_class
from medusa_export.models.checkpoint import LoadedModel
from medusa_export.models.packed import StoredBlocks

_DECODER, _PROJECTION = "model", "lm_head"


class TextModel(GenerationMixin):  # type: ignore[misc]  # it has no annotations
    """A causal language model made of the decoder and the output projection of a larger model.

    Classes made by ``text_model`` derive from it, and from the base class of the decoder.

    Attributes:
        whole: The larger model. It shares its modules with this one.
        softcap: The cap of the logits; None without one.
        divisor: The number that logits are divided by.
    """

    whole: PreTrainedModel
    model: PreTrainedModel
    lm_head: nn.Module
    softcap: float | None = None
    divisor: float = 1.0

    def forward(
        self, input_ids: Tensor | None = None, logits_to_keep: int | Tensor = 0, **given: Any
    ) -> CausalLMOutputWithPast:
        """Computes the logits as the larger model does for text alone."""
        output = self.model(input_ids=input_ids, **given)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept, :])
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.divisor != 1.0:
            logits = logits / self.divisor
        return CausalLMOutputWithPast(logits=logits, **{CACHE: output.get(CACHE)})


def text_model(whole: PreTrainedModel) -> PreTrainedModel:
    """Takes the text model out of a larger one. Both share their modules.

    Raises:
        ModelNotSupportedError: The larger model computes its logits in a way that the text model can't repeat.
    """
    generation_config, whole = whole.generation_config, _with_text(whole)
    decoder = _decoder(whole)
    projection = whole.get_output_embeddings()
    if decoder is whole or not isinstance(decoder, PreTrainedModel) or projection is None:
        raise ModelNotSupportedError(f"several models in one ({type(whole).__name__}) without a text model of its own")
    family = next(base for base in type(decoder).__mro__[1:] if issubclass(base, PreTrainedModel))
    # transformers looks up some facts about a class in the file of its module.
    members = {"__module__": type(decoder).__module__, "base_model_prefix": _DECODER}
    made: Any = type(f"{type(whole).__name__}Text", (TextModel, family), members)
    text = made(decoder.config)
    text.model, text.lm_head = decoder, projection
    vars(text)["whole"] = whole  # no submodule: its other parts are no parts of the text model
    text.generation_config = generation_config
    text.name_or_path = whole.name_or_path
    if projection.weight.device.type != "meta":  # a model without weights is looked at, and not run
        text.softcap, text.divisor = _behind_projection(whole, decoder, projection)
    text.train(whole.training)
    return text


def text_part(loaded: LoadedModel) -> LoadedModel:
    """Takes the text model out of a larger model that was loaded. All readers and names are those of the text model.

    Tensors of the files that have no place in the larger model stay unread. Weights of its other parts are dropped.
    """
    text: Any = text_model(loaded.model)
    tied = text.lm_head.weight is text.get_input_embeddings().weight
    text.config.tie_word_embeddings = tied  # the configuration of the larger model says it; this one may be written
    names = _names(loaded.model, text)
    return replace(
        loaded,
        model=text,
        missing=frozenset(names[name] for name in loaded.missing if name in names),
        mismatched=frozenset((names[name], found, own) for name, found, own in loaded.mismatched if name in names),
        readers={names[name]: read for name, read in loaded.readers.items() if name in names},
        blocks=dict(_renamed_blocks(loaded.blocks, names)),
        packed={names[name]: kind for name, kind in loaded.packed.items() if name in names},
    )


def _renamed_blocks(blocks: Mapping[str, StoredBlocks], names: Mapping[str, str]) -> Iterator[tuple[str, StoredBlocks]]:
    """Yields blocks with the text model's names. A matrix in a stack has the stack's name, a point, and its place."""
    for name, stored in blocks.items():
        stack, _, place = name.rpartition(".")
        if name in names:
            yield names[name], stored
        elif stack in names:
            yield f"{names[stack]}.{place}", stored


def check_stands_alone(model: PreTrainedModel) -> None:
    """Refuses a text model that can't be written: transformers could not load it without the larger model.

    Args:
        model: Any model. One that is no text model passes.

    Raises:
        ModelNotSupportedError: transformers has no model of its own for it, or one with other weights.
    """
    if whole_of(model) is model:
        return
    alone = False
    if has_causal_lm(model.config):
        build: Any = model_class(model.config)
        with torch.device("meta"):
            alone = build(model.config).state_dict().keys() == model.state_dict().keys()
    if not alone:
        raise ModelNotSupportedError(
            f"a text model ({model.config.model_type}) that transformers can't load without the larger model, so that "
            "no changed weights of it can be written"
        )


def whole_of(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the larger model that a text model was taken from; any other model as it is."""
    whole: PreTrainedModel = vars(model).get("whole", model)
    return whole


def read_weights(loaded: LoadedModel) -> LoadedModel:
    """Reads the weights that are still in the files into the model."""
    weights = dict(loaded.model.named_parameters(remove_duplicate=False))
    for name, read in loaded.readers.items():
        weights[name].data = read()
    return replace(loaded, readers={}, blocks={}, packed={})


def _with_text(whole: PreTrainedModel) -> PreTrainedModel:
    """The part of a larger model that answers with text; for most families it is the whole.

    The models of Qwen Omni hold one model that answers with text, and others that speak.
    """
    if whole.get_output_embeddings() is not None:
        return whole
    text = whole.config.get_text_config(decoder=True)
    for part in whole.children():
        if (
            isinstance(part, PreTrainedModel)
            and part.config.get_text_config(decoder=True) is text
            and part.get_output_embeddings() is not None
        ):
            return part
    return whole


def _decoder(whole: PreTrainedModel) -> Any:
    """The decoder of a larger model, without the output projection that some families keep in one model with it."""
    decoder: Any = whole.get_decoder()
    while isinstance(decoder, PreTrainedModel) and decoder.get_output_embeddings() is not None:
        inner = decoder.get_decoder()
        inner = getattr(decoder, "model", None) if inner is decoder else inner
        if inner is None or inner is decoder:
            break
        decoder = inner
    return decoder


def _names(whole: PreTrainedModel, text: Any) -> dict[str, str]:
    """The names of the text model's parameters and buffers, by their names in the larger model."""
    prefixes = {id(text.model): _DECODER, id(text.lm_head): _PROJECTION}
    names: dict[str, str] = {}
    for prefix, module in whole.named_modules():
        if id(module) in prefixes:
            own = prefixes[id(module)]
            names |= {f"{prefix}.{name}": f"{own}.{name}" for name in module.state_dict()}
    return names


class _NoOtherValues:
    """An output that says None where a larger model asks for a value that it lacks, such as the logits of a router."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _DecoderOutput(_NoOtherValues, BaseModelOutputWithPast):  # type: ignore[misc]  # it has no annotations
    """The output of a decoder: hidden states alone."""


class _LanguageOutput(_NoOtherValues, CausalLMOutputWithPast):  # type: ignore[misc]  # it has no annotations
    """The output of a decoder with its projection: logits alone."""


def _behind_projection(
    whole: PreTrainedModel, decoder: PreTrainedModel, projection: nn.Module
) -> tuple[float | None, float]:
    """Finds what a larger model does to logits behind its output projection: nothing, a soft cap, or a division.

    It runs on one token, with a decoder and a projection that give chosen values.

    Returns:
        The cap, or None; and the number that logits are divided by.

    Raises:
        ModelNotSupportedError: The larger model changes logits in another way.
    """
    size, vocab = decoder.config.hidden_size, int(projection.weight.shape[0])  # type: ignore[index]
    logits = torch.linspace(-50.0, 50.0, vocab).view(1, 1, vocab)
    hidden = _DecoderOutput(last_hidden_state=torch.zeros(1, 1, size))
    with ExitStack() as replaced:
        replaced.enter_context(_giving(decoder, lambda *_, **__: hidden))
        replaced.enter_context(_giving(projection, lambda *_, **__: logits.clone()))
        for part in _language_models(whole, projection):
            replaced.enter_context(_giving(part, partial(_logits_alone, part.forward)))
        found = whole(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits
    cap = getattr(decoder.config, "final_logit_softcapping", None)
    if torch.equal(found, logits):
        return None, 1.0
    if cap and torch.allclose(found, torch.tanh(logits / cap) * cap):
        return float(cap), 1.0
    divisor = round(float(logits[0, 0, 0] / found[0, 0, 0]), 6)
    if torch.allclose(found, logits / divisor, rtol=1e-6):
        return None, divisor
    raise ModelNotSupportedError(f"logits that {type(whole).__name__} changes behind its output projection")


def _language_models(whole: PreTrainedModel, projection: nn.Module) -> list[PreTrainedModel]:
    """The models within a larger one that hold its decoder and its projection."""
    parts = [part for part in whole.modules() if isinstance(part, PreTrainedModel) and part is not whole]
    return [part for part in parts if part.get_output_embeddings() is projection]


def _logits_alone(forward: Callable[..., Any], *args: Any, **given: Any) -> Any:
    """Runs a language model. Llama 4 asks its output for features of images in transformers 5.24, which has none."""
    output = forward(*args, **given)
    return _LanguageOutput(logits=output.logits) if isinstance(output, ModelOutput) else output


@contextmanager
def _giving(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces the forward of a module while the block lasts."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
