"""The exceptions that the runtime and the exporter raise on purpose.

Every message is one sentence or two: what was wrong, what was expected, how to fix it.
"""

from __future__ import annotations


class MedusaError(Exception):
    """Base of every error that this project raises on purpose."""


class TreeError(MedusaError):
    """A draft tree that can't be used: not prefix-closed, repeated, too deep or too wide."""


class BundleError(MedusaError):
    """A bundle that can't be served: missing, altered, from a newer contract, or unreadable."""


class BackendError(MedusaError):
    """A backend that is not installed, or that refused to load or run the graph."""


class RequestError(MedusaError, ValueError):
    """A request that can't be served as it stands: empty, too long, or of the wrong kind."""


class OutOfDeviceMemoryError(BackendError):
    """A GPU has no memory for what a backend must hold."""


class NotFiniteError(BackendError):
    """A request whose logits are NaN or infinite: some weight or activation exceeds the range of its type."""


class DoubtfulRowsError(BackendError):
    """A step that failed halfway. Its requests end, as their rows are no longer what they were before it."""


class QueueFullError(MedusaError):
    """A service whose queue is full: try again later."""


class ServiceClosedError(MedusaError):
    """A service that is closed, or that takes no more requests because it is about to be."""


class ForkError(MedusaError):
    """An engine, a service or a request used in a child that ``fork`` made of its process."""


class RequestCancelledError(MedusaError):
    """A request that somebody cancelled."""


class DeadlineError(MedusaError, TimeoutError):
    """A request that was not answered in the time it was given."""


class CallbackError(MedusaError):
    """A request whose callback raised; the cause says what."""
