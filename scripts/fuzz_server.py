"""Sends requests to a server that schemathesis makes from its OpenAPI description, and reports answers of 5xx.

To make a body takes ten times as long as to answer it, and one wrong field is enough to have it refused. So each of
its fields is also sent alone, in a body that is right otherwise. Answers must also follow the description. Without an
address, the script serves a tiny random model.

    scripts/fuzz_server.py --examples 2500
    scripts/fuzz_server.py http://localhost:8000
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from tiny_bundle import bundle_folder

from medusa_runtime import MedusaService
from medusa_runtime.server.prometheus import ServerMetrics
from medusa_runtime.server.settings import Settings

MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
# Share of the cases that each endpoint without a body gets, against one with a body.
WITHOUT_BODY = 0.1
# Bodies that are right, by the label of their endpoint. Fields of examples are put into them.
RIGHT_BODIES: dict[str, dict[str, Any]] = {
    "POST /v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8},
    "POST /v1/completions": {"prompt": "Hi", "max_tokens": 8},
    "POST /v1/responses": {"input": "Hi", "max_output_tokens": 16},
    "POST /tokenize": {"prompt": "Hi"},
}


def kept_short(body: Any) -> Any:
    """A body whose answer is short, so that a fuzz takes no hours: wrong values stay wrong."""
    if not isinstance(body, dict):
        return body
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if name in body and isinstance(body[name], int) and body[name] > 8:
            body[name] = 8 + body[name] % 8 if body[name] < 10**6 else body[name]
    if "input" in body:
        body.setdefault("max_output_tokens", 8)
    elif "messages" in body and "add_generation_prompt" not in body:
        body.setdefault("max_tokens", 8)
    if isinstance(body.get("n"), int) and 2 < body["n"] <= 128:
        body["n"] = 2
    return body


def bodies_of(label: str, body: Any) -> Iterator[Any]:
    """The body of an example, and bodies with one of its fields each.

    Args:
        label: The endpoint's label.
        body: The body.
    """
    yield body
    if isinstance(body, dict) and label in RIGHT_BODIES:
        for name, value in body.items():
            yield kept_short(RIGHT_BODIES[label] | {name: value})


def fuzz(address: str, examples: int, *, seed: int | None = None) -> Counter[tuple[str, int]]:
    """Fuzzes a server.

    Args:
        address: The server's address.
        examples: Number of examples over all endpoints, about. Each gives up to a dozen requests.
        seed: Seed of the examples; None for other examples each time.

    Returns:
        Numbers of answers by endpoint and status.

    Raises:
        Exception: An answer is 5xx or does not follow the description. The exception shows a request that is as small
            as possible.
    """
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    weights = [1.0 if operation.method == "post" else WITHOUT_BODY for operation in operations]
    found: Counter[tuple[str, int]] = Counter()
    for operation, weight in zip(operations, weights, strict=True):
        modes = MODES if operation.method == "post" else MODES[:1]  # without a body nothing can be wrong
        for mode in modes:
            count = max(5, round(examples * weight / sum(weights) / len(modes)))
            check(operation, mode, count, address, found, seed)
    return found


def check(
    operation: Any, mode: Any, count: int, address: str, found: Counter[tuple[str, int]], seed: int | None
) -> None:
    """Sends requests to one endpoint, as many as ``count`` examples give."""

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=seed is not None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        for body in bodies_of(operation.label, kept_short(case.body)):
            case.body = body
            send_body(case)

    def send_body(case: Any) -> None:
        while True:
            response = case.call(base_url=address, timeout=60)
            found[operation.label, response.status_code] += 1
            assert response.status_code < 500, f"{operation.label}: {response.status_code} {response.text:.500}"
            if response.status_code < 405 and "event-stream" not in response.headers.get("content-type", [""])[0]:
                operation.validate_response(response)
            refused = refused_field(response) if isinstance(case.body, dict) else None
            if refused is None or refused not in case.body:
                return
            del case.body[refused]  # and once more without it, to get further

    send()


def refused_field(response: Any) -> str | None:
    """The field that a server refuses because it does not serve it; None if it refuses none."""
    if response.status_code not in (400, 404):
        return None
    error = response.json().get("error", {})
    serves_not = error.get("code") in ("unsupported_parameter", "model_not_found")
    return error.get("param") if serves_not else None


@contextmanager
def tiny_server(bundle: Path | None) -> Iterator[str]:
    """A context manager that serves a bundle; gives the address."""
    with bundle_folder(bundle, tokenizer=True) as folder:
        from support.servers import running  # noqa: PLC0415  # ``bundle_folder`` has added its path

        metrics = ServerMetrics("tiny")
        with (
            MedusaService.load(folder, rows=4, threads=1, tree_size=4, metrics=metrics) as service,
            running(service, metrics, Settings(bundle=folder)) as address,
        ):
            yield address


def main() -> None:
    """Runs the fuzz and prints the numbers of answers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("address", nargs="?", help="The server's address. Default: a tiny model is served.")
    parser.add_argument("--bundle", type=Path, help="The bundle to serve in place of the tiny one.")
    parser.add_argument("--examples", type=int, default=1000, help="Number of examples. Default: 1000.")
    arguments = parser.parse_args()
    started = time.monotonic()
    with nullcontext(arguments.address) if arguments.address else tiny_server(arguments.bundle) as address:
        found = fuzz(address, arguments.examples)
    for (label, status), count in sorted(found.items()):
        print(f"{label:32} {status} {count:6}")
    print(f"{found.total()} requests of {arguments.examples} examples in {time.monotonic() - started:.0f} s, none 5xx")


if __name__ == "__main__":
    main()
