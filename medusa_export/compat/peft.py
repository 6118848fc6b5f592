"""peft: LoRA of the linear layers that its caller names, and of nothing else.

Tried with peft 0.21.2.

* ``lora_as_named``: peft changes the names of layers for adapters that were trained with transformers 4. In models
  with experts it takes the names of dense layers and of shared experts for names of experts. Without it, Medusa-2 would
  train the experts in place of these layers, and fail with dropout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

_MODULE, _FUNCTION = "peft.utils.transformers_weight_conversion", "convert_peft_config_for_transformers"


@contextmanager
def lora_as_named() -> Iterator[None]:
    """While the block lasts, peft adapts exactly the layers that its configuration names."""
    if find_spec(_MODULE) is None:  # older versions change no names
        yield
        return
    module = import_module(_MODULE)
    convert = getattr(module, _FUNCTION)
    setattr(module, _FUNCTION, _as_named)
    try:
        yield
    finally:
        setattr(module, _FUNCTION, convert)


def _as_named(config: Any, model: Any, conversions: Any) -> None:
    """Takes the place of peft's function, and leaves the configuration as it is."""
