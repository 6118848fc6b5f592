"""The settings of a server, checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from medusa_runtime.errors import MedusaError
from medusa_runtime.metrics import Metrics
from medusa_runtime.server.output.formats import ReasoningFormat
from medusa_runtime.service import MedusaService


class SettingError(MedusaError):
    """A setting of the server that can't be used: unknown, out of range or of the wrong type."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a server.

    Attributes:
        bundle: The bundle's folder.
        backend: Name of the backend, as for ``MedusaService.load``.
        rows: Requests that run at a time.
        threads: CPU threads of one step; None for all that this process may use.
        device: Number of the GPU that runs a compiled engine, among those that CUDA sees.
        gpu_memory: Memory of that GPU that may be used, in bytes, or as a fraction up to 1; None for all.
        max_queue: Requests that may wait for a row.
        model_names: Names of the model; the folder's name if there are none.
        api_keys: Keys of which a request must have one; none is asked for if there are none.
        cors_origins: Origins whose pages may use the server; ``*`` for all.
        max_body: The most bytes of a request's body.
        max_prompt_tokens: The most tokens of a prompt; None for what the model holds.
        max_client_requests: Answers that one client may wait for at a time; None for no limit. A client is an API key,
            or an address if no keys are asked for.
        request_seconds: Seconds after which a request ends with an error; None for no limit.
        drain_seconds: Seconds that requests may take to end after SIGTERM.
        keep_alive_seconds: Seconds without a chunk after which a stream gets a comment.
        tool_format: Name of the format of tool calls, ``auto`` or ``none``.
        reasoning_format: ``auto``, ``think`` or ``none``.
        otlp_endpoint: URL of the OpenTelemetry collector that gets a span per request; None for no spans.
    """

    bundle: Path
    backend: str = "auto"
    rows: int = 4
    threads: int | None = None
    device: int = 0
    gpu_memory: float | None = None
    max_queue: int = 256
    model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body: int = 2**20  # parsing JSON of this size can hold up all threads for 0.2 s
    max_prompt_tokens: int | None = None
    max_client_requests: int | None = None
    request_seconds: float | None = None
    drain_seconds: float = 30.0
    keep_alive_seconds: float = 10.0
    tool_format: str = "auto"
    reasoning_format: ReasoningFormat = "auto"
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise SettingError(
                    "An API key is empty or holds a space or a character that is not ASCII: use letters and digits."
                )
        for name in ("max_body", "max_prompt_tokens", "max_client_requests"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"`{name}` is {value}: expected a number of at least 1.")
        for name in ("request_seconds", "keep_alive_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SettingError(f"`{name}` is {value}: expected more than 0 seconds.")

    @property
    def most_answers(self) -> int:
        """The most answers of one request: what rows and queue hold."""
        return self.rows + self.max_queue

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the model; answers hold the first. Cached, because each chunk of a stream needs it."""
        return self.model_names or (self.bundle.resolve().name,)

    def load_service(self, metrics: Metrics | None = None) -> MedusaService:
        """Loads the service that answers.

        Args:
            metrics: Hooks that the service calls while it runs.

        Raises:
            MedusaError: The bundle can't be served.
        """
        return MedusaService.load(
            self.bundle,
            self.backend,
            rows=self.rows,
            threads=self.threads,
            device=self.device,
            gpu_memory=self.gpu_memory,
            max_queue=self.max_queue,
            metrics=metrics,
        )
