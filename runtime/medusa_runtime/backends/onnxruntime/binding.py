"""Arrays that are bound to inputs and outputs of a session, once for many steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True)
class Bound:
    """Memory that is an input of a session, an output, or both.

    Attributes:
        input: The input's name, None if it is no input.
        output: The output's name, None if it is no output.
        array: The memory as an array of the host, [rows, …].
        on_device: The memory as an ``OrtValue`` of a device; ``array`` is None then.
    """

    input: str | None
    output: str | None
    array: NDArray[Any] | None = None
    on_device: Any = None


class Binding:
    """The inputs and outputs of a session, bound to memory.

    Args:
        ort: The module ``onnxruntime``.
        session: The session.
        bound: The memory to bind at the beginning.

    Attributes:
        values: ONNX Runtime's ``IOBinding``, which the session runs with.
        outputs: The names of the bound outputs, in order.
    """

    def __init__(self, ort: Any, session: Any, bound: Sequence[Bound]) -> None:
        self._ort = ort
        self._arrays: dict[str, tuple[NDArray[Any], Any]] = {}  # inputs in host memory
        self._on_device: dict[str, Any] = {}
        self._results: dict[str, NDArray[Any]] = {}  # outputs that are bound by ``bind_output``
        self.values = session.io_binding()
        self.outputs: list[str] = []
        for item in bound:
            value = item.on_device
            if item.input is not None and value is not None:
                self._on_device[item.input] = value
                self.values.bind_ortvalue_input(item.input, value)
            elif item.input is not None and item.array is not None:
                self._bind_array(item.input, item.array)
            if item.output is not None:
                if value is None:
                    value = ort.OrtValue.ortvalue_from_numpy(item.array)
                self.values.bind_ortvalue_output(item.output, value)
                self.outputs.append(item.output)

    def bind(self, name: str, array: NDArray[Any]) -> None:
        """Binds an input to an array, unless it is bound to this array already."""
        if name not in self._arrays or self._arrays[name][0] is not array:
            self._bind_array(name, array)

    def bind_output(self, name: str, array: NDArray[Any]) -> None:
        """Binds an output to an array, unless it is bound to this array already."""
        if self._results.get(name) is not array:
            if name not in self._results:
                self.outputs.append(name)
            self._results[name] = array
            self.values.bind_ortvalue_output(name, self._ort.OrtValue.ortvalue_from_numpy(array))

    def refresh(self) -> None:
        """Binds all inputs again. A provider with memory of its own copies them then, and not when it runs."""
        for name, (array, _) in list(self._arrays.items()):
            self._bind_array(name, array)
        for name, value in self._on_device.items():
            self.values.bind_ortvalue_input(name, value)

    def _bind_array(self, name: str, array: NDArray[Any]) -> None:
        self._arrays[name] = array, self._ort.OrtValue.ortvalue_from_numpy(array)
        self.values.bind_ortvalue_input(name, self._arrays[name][1])
