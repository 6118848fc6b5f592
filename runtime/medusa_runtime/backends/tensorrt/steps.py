"""Launches of the engine: an execution context for each size of tree, captured as a CUDA graph, and one for prompts.

The contexts that were used last are kept, ``MOST_CONTEXTS`` of them, or fewer where the device has no memory for more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from medusa_runtime.backends.tensorrt.buffers import ID, Buffers
from medusa_runtime.backends.tensorrt.choices import ChoiceSizes
from medusa_runtime.backends.tensorrt.cuda import Graph, Stream
from medusa_runtime.backends.tensorrt.loading import LoadedEngine
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.contract import fixed_shape
from medusa_runtime.errors import BackendError, DeviceLostError, OutOfDeviceMemoryError
from medusa_runtime.tuning import MOST_CONTEXTS

# The engine's optimization profiles.
_DECODE, _PREFILL = 0, 1


@dataclass
class _Decoder:
    """Runs decoding steps of one size, with or without sampling.

    Attributes:
        context: The execution context, bound.
        warm: True once it has run, which a capture needs.
        graph: The captured step, once there is one.
        refused: TensorRT's or CUDA's words if it can't be captured.
    """

    context: Any
    warm: bool = False
    graph: Graph | None = None
    refused: str = ""


class EngineSteps:
    """Puts steps of an engine into a stream.

    Args:
        loaded: The engine.
        buffers: The memory that steps read and write.
        stream: The stream.
        bundle: The bundle.
        rows: The number of rows (B).
        capacity: Slots per row (C).
        capture: True if steps are captured as CUDA graphs.
    """

    def __init__(
        self,
        loaded: LoadedEngine,
        buffers: Buffers,
        stream: Stream,
        bundle: Bundle,
        rows: int,
        capacity: int,
        *,
        capture: bool,
    ) -> None:
        self._loaded, self._buffers, self._stream, self._bundle = loaded, buffers, stream, bundle
        self._rows, self._capacity, self._captures = rows, capacity, capture
        # By tree size and sizes of the inputs for sampling, in the order of their last use.
        self._decoders: dict[tuple[int, ChoiceSizes], _Decoder] = {}
        self._capturing = False
        self._prefiller: Any = None
        pending = [group.pending for group in bundle.state_groups if group.pending is not None]
        # Outputs that the next step reads, by the inputs that it reads them from.
        self._carried = {name: f"next_{name}" for name in ("cache_lengths", *pending)}

    @property
    def uncaptured(self) -> dict[tuple[int, int], str]:
        """Why some steps are launched one by one, by tree size and numbers to draw with."""
        return {
            (size, sizes.draws): decoder.refused for (size, sizes), decoder in self._decoders.items() if decoder.refused
        }

    def decode(self, size: int, sizes: ChoiceSizes, doing: str) -> None:
        """Verifies the first ``size`` nodes of each drafted tree.

        Args:
            size: S.
            sizes: Sizes of the inputs for sampling and constraints.
            doing: The action that this is part of, for the message of a failure.
        """
        decoder = self._decoders.pop((size, sizes), None)
        if decoder is None:
            while len(self._decoders) >= MOST_CONTEXTS:
                self._drop_oldest(doing)
            decoder = _Decoder(self._context_with_room(_DECODE, size, sizes, doing, eager=True))
        self._decoders[size, sizes] = decoder
        if self._captures and decoder.graph is None and decoder.warm and not decoder.refused:
            self._capture(decoder, size, doing)
        if decoder.graph is not None:
            decoder.graph.launch(doing)
            return
        self._decode_once(decoder, size, doing)
        decoder.warm = True

    def _decode_once(self, decoder: _Decoder, size: int, doing: str) -> None:
        address, width = self._buffers.address, size * ID.itemsize
        pitch = self._bundle.tree.size * ID.itemsize
        self._stream.copy_rows(address["input_ids"], width, address["next_input_ids"], pitch, width, self._rows, doing)
        self._execute(decoder.context, doing)

    def _capture(self, decoder: _Decoder, size: int, doing: str) -> None:
        """Makes the step a graph, or notes why it can't be captured."""
        able = getattr(decoder.context, "is_stream_capturable", lambda _: True)  # TensorRT for all GPUs can't tell
        if not able(self._stream.handle):
            decoder.refused = f"not capturable: {self._loaded.words()}"
            return
        self._capturing = True
        try:
            while decoder.graph is None:
                try:
                    work = partial(self._decode_once, decoder, size, doing)
                    decoder.graph = self._stream.capture(work, f"capturing, {doing}")
                except OutOfDeviceMemoryError:
                    if len(self._decoders) == 1:
                        raise
                    self._drop_oldest(doing)
        except DeviceLostError:
            raise
        except BackendError as error:
            decoder.refused = str(error)
        finally:
            self._capturing = False

    def _drop_oldest(self, doing: str) -> None:
        """Gives up the context that has not been used for longest, and its graph."""
        self._stream.synchronize(doing)  # its last step may be in flight
        decoder = self._decoders.pop(next(iter(self._decoders)))
        if decoder.graph is not None:
            decoder.graph.close()

    def _context_with_room(self, profile: int, size: int, sizes: ChoiceSizes, doing: str, *, eager: bool) -> Any:
        """A new context; gives up others, the oldest first, while there is no memory for it."""
        while True:
            try:
                return self._context(profile, size, sizes, eager=eager)
            except OutOfDeviceMemoryError:
                if not self._decoders:
                    raise
                self._drop_oldest(doing)

    def prefill(self, size: int, sizes: ChoiceSizes, doing: str) -> None:
        """Runs a step whose token ids, [B, size], are in ``input_ids`` already; arguments as for ``decode``."""
        if self._prefiller is None:
            self._prefiller = self._context_with_room(_PREFILL, size, sizes, doing, eager=False)
        self._set_shapes(self._prefiller, size, sizes, doing)
        self._execute(self._prefiller, doing)

    def _execute(self, context: Any, doing: str) -> None:
        """Runs the engine once, and brings its state to where the next step reads it."""
        if not self._agrees(context.execute_async_v3, self._stream.handle):
            raise self._failure(f"TensorRT failed while {doing}: {self._loaded.words()}")
        buffers = self._buffers
        for target, source in self._carried.items():
            size = buffers.size(buffers.specs[target])
            self._stream.copy(buffers.address[target], buffers.address[source], size, doing)

    def _context(self, profile: int, size: int, sizes: ChoiceSizes, *, eager: bool) -> Any:
        """An execution context for steps of a size, with everything bound."""
        doing = f"preparing steps of {size} tokens over {self._rows} rows"
        context = self._loaded.new_context(eager=eager)
        if not self._agrees(context.set_optimization_profile_async, profile, self._stream.handle):
            raise self._failure(f"TensorRT failed while {doing}, at profile {profile}: {self._loaded.words()}")
        self._set_shapes(context, size, sizes, doing)
        for name, address in self._buffers.address.items():
            if not self._agrees(context.set_tensor_address, name, address):
                raise self._failure(f"TensorRT failed while {doing}, at the address of {name}: {self._loaded.words()}")
        context.set_device_memory(self._buffers.scratch, self._buffers.scratch_size)
        self._stream.synchronize(doing)
        return context

    def _set_shapes(self, context: Any, size: int, sizes: ChoiceSizes, doing: str) -> None:
        free = {"batch": self._rows, "sequence": size, "capacity": self._capacity, **asdict(sizes)}
        for spec in self._bundle.inputs:
            self._set_input_shape(context, spec.name, fixed_shape(spec, free), doing)

    def _set_input_shape(self, context: Any, name: str, shape: tuple[int, ...], doing: str) -> None:
        if not self._agrees(context.set_input_shape, name, shape):
            raise self._failure(f"TensorRT refused {list(shape)} for {name} while {doing}: {self._loaded.words()}")

    def _failure(self, message: str) -> BackendError:
        """The error of a call that TensorRT refused; CUDA says whether the device is lost."""
        if not self._capturing:  # a wait would spoil the capture
            try:
                self._stream.synchronize("looking for the cause")
            except BackendError as error:
                return type(error)(f"{message} {error}")
        return BackendError(message)

    def _agrees(self, call: Callable[..., bool], *arguments: Any) -> bool:
        """Calls TensorRT. False if it refuses: where the C++ interface says so, its Python bindings may raise."""
        try:
            return call(*arguments)
        except RuntimeError as error:
            self._loaded.log.errors.append(str(error))
            return False

    @property
    def closing(self) -> list[Callable[[], None]]:
        """The calls that give contexts and graphs back, each to be called once. Nothing may be in flight then."""
        graphs = [decoder.graph.close for decoder in self._decoders.values() if decoder.graph is not None]
        return [*graphs, self._forget]

    def _forget(self) -> None:
        self._decoders.clear()
        self._prefiller = None
        del self._loaded  # the engine's memory is given back with its last reference
