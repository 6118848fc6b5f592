"""Exceptions of the runtime, and the base of the exporter's exceptions.

Every message says what was wrong, what was expected, and how to fix it.
"""

from __future__ import annotations


class MedusaError(Exception):
    """Base of all exceptions that this project defines."""


class TreeError(MedusaError):
    """A draft tree that can't be used: not prefix-closed, repeated, too deep or too wide."""


class BundleError(MedusaError):
    """A bundle that can't be served: missing, altered, unreadable, or of a newer contract version."""


class BackendError(MedusaError):
    """A backend that is not installed, or failed to load or run the graph."""


class RequestError(MedusaError, ValueError):
    """A request that can't be served: empty, too long, or of the wrong type."""


class ContextLengthError(RequestError):
    """A prompt and answer of more tokens than the model or the backend's caches hold."""


class OutOfDeviceMemoryError(BackendError):
    """A GPU with too little free memory for a backend's weights or caches."""


class DeviceLostError(BackendError):
    """A GPU that takes no more calls from this process, after a fault of a kernel or of its memory."""


class NotFiniteError(BackendError):
    """A request with NaN or infinite logits: a weight or an activation exceeds the range of its type."""


class DoubtfulRowsError(BackendError):
    """A step that failed halfway and may have changed its rows. The requests in these rows end."""


class QueueFullError(MedusaError):
    """A request to a service whose queue is full: try again later."""


class ServiceClosedError(MedusaError):
    """A request to a service that is closed or about to close."""


class ForkError(MedusaError):
    """An engine, a service or a request used in a child that ``fork`` made of its process."""


class RequestCancelledError(MedusaError):
    """A request that was cancelled."""


class DeadlineError(MedusaError, TimeoutError):
    """A request that was not answered before its deadline."""


class CallbackError(MedusaError):
    """A request whose callback raised an exception, which is this exception's ``__cause__``."""
