"""OpenTelemetry traces: a span per request, within the trace of the client if it sends ``traceparent``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, Self

from medusa_runtime.server.settings import SettingError

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider

# Attributes of a span by the facts of a request's line in the log.
_ATTRIBUTES = {
    "request_id": "medusa.request_id",
    "status": "http.response.status_code",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
}
_UNTRACED = ("/health", "/metrics", "/status")


class Tracing(Protocol):
    """Begins and ends the spans of requests."""

    def begin(self, method: str, path: str, headers: Mapping[str, str]) -> Span | None:
        """Begins a request's span; None if the request has none."""
        ...

    def end(self, span: Span | None, facts: Mapping[str, object]) -> None:
        """Ends a request's span, with the facts of its line in the log."""
        ...

    def close(self) -> None:
        """Sends the spans that wait."""
        ...


class NoTracing:
    """Makes no spans."""

    def begin(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        return None

    def end(self, span: Span | None, facts: Mapping[str, object]) -> None:
        pass

    def close(self) -> None:
        pass


class SpanTracing:
    """Makes a span per request, except those for health, metrics and status.

    Args:
        provider: Makes the tracer.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        self._provider = provider
        self._tracer = provider.get_tracer("medusa_runtime.server")
        self._extract, self._kind = extract, SpanKind.SERVER

    @classmethod
    def to_endpoint(cls, endpoint: str) -> Self:
        """Makes spans that are sent to a collector by OTLP over HTTP.

        Args:
            endpoint: The collector's URL, such as ``http://localhost:4318/v1/traces``.

        Raises:
            SettingError: OpenTelemetry is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise SettingError(
                "OpenTelemetry is not installed. Install it with: pip install 'medusa-export[tracing]'."
            ) from error
        provider = TracerProvider(resource=Resource.create({"service.name": "medusa-export"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        return cls(provider)

    def begin(self, method: str, path: str, headers: Mapping[str, str]) -> Span | None:
        if path.startswith(_UNTRACED):
            return None
        attributes = {"http.request.method": method, "url.path": path}
        context = self._extract(headers)
        return self._tracer.start_span(f"{method} {path}", context, self._kind, attributes)

    def end(self, span: Span | None, facts: Mapping[str, object]) -> None:
        if span is None:
            return
        for name, attribute in _ATTRIBUTES.items():
            value = facts.get(name)
            if isinstance(value, str | int):
                span.set_attribute(attribute, value)
        span.end()

    def close(self) -> None:
        shutdown = getattr(self._provider, "shutdown", None)
        if shutdown is not None:
            shutdown()
