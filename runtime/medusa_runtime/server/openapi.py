"""Adds the types of bodies to the OpenAPI description, which FastAPI doesn't see, as a thread reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_PLACE = "#/components/schemas/{model}"


def describe_bodies(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> None:
    """Makes the application's OpenAPI description hold these types.

    Args:
        app: The application, with all routes.
        bodies: Types of bodies that its routes refer to.
    """
    _, found = models_json_schema([(body, "validation") for body in bodies], ref_template=_PLACE)
    described = app.openapi

    def openapi() -> dict[str, Any]:
        description = described()
        schemas = description.setdefault("components", {}).setdefault("schemas", {})
        for name, schema in found["$defs"].items():
            schemas.setdefault(name, schema)
        return description

    app.openapi = openapi  # type: ignore[method-assign]  # the way that FastAPI documents
