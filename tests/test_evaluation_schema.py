"""docs/evaluation.schema.json describes the evaluations there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluations import STORED, stored, whole

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads((ROOT / "docs" / "evaluation.schema.json").read_text(encoding="utf-8"))
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
KNOWN = {
    *("$schema", "title", "description", "type", "const", "enum", "minimum", "maximum", "pattern"),
    *("required", "properties", "additionalProperties", "items", "minItems", "maxItems"),
}


def problems(value: Any, schema: dict[str, Any], where: str = "") -> Iterator[str]:
    """Say what is wrong with a value, by the keywords of JSON Schema that the file uses."""
    assert set(schema) <= KNOWN, set(schema) - KNOWN
    names = schema.get("type", list(TYPES))
    names = [names] if isinstance(names, str) else names
    fits = [
        isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool))
        for name in names
    ]
    if not any(fits):
        yield f"{where}: {value!r} is not {' or '.join(names)}"
        return
    if "const" in schema and value != schema["const"]:
        yield f"{where}: not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is none of {schema['enum']}"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        yield f"{where}: {value} is out of range"
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{where}: {value!r} is not like {schema['pattern']}"
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{where}: {len(value)} items"
        for i, item in enumerate(value):
            yield from problems(item, schema.get("items", {}), f"{where}[{i}]")
    if isinstance(value, dict):
        yield from (f"{where}.{k} is missing" for k in schema.get("required", ()) if k not in value)
        for key, item in value.items():
            own = schema.get("properties", {}).get(key, schema.get("additionalProperties", {}))
            yield from problems(item, own, f"{where}.{key}")


@pytest.mark.parametrize("path", STORED, ids=lambda p: p.name)
def test_stored_evaluations_are_valid(path: Path) -> None:
    assert list(problems(stored(path.name), SCHEMA)) == []


def test_an_evaluation_with_every_field_is_valid_and_described() -> None:
    e = whole(snn_by_count=None, drop=None)
    assert list(problems(e, SCHEMA)) == []
    assert set(e) <= set(SCHEMA["properties"])


def test_what_every_stored_evaluation_has_is_required() -> None:
    common = set.intersection(*(set(stored(path.name)) for path in STORED))
    # --json prints the same object without these two.
    assert set(SCHEMA["required"]) == common - {"command", "created"}


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("images", 0, "out of range"),
        ("images", True, "is not integer"),
        ("schedule", "later", "none of"),
        ("data_sha256", "abc", "not like"),
        ("snn", {"top1_percent": 90.0}, "is missing"),
        ("snn", {"top1_percent": 90.0, "interval95_percent": [1.0]}, "1 items"),
        ("by_step", [{"step": "1", "top1_percent": None}], "is not integer"),
        ("first_within", {"ann": {"0.5": "soon"}}, "is not integer or null"),
        ("schema", "snnconv.evaluation/2", "not 'snnconv.evaluation/1'"),
    ],
)
def test_what_is_wrong_is_found(key: str, value: Any, word: str) -> None:
    (found,) = problems({**whole(), key: value}, SCHEMA)
    assert word in found


def described(schema: dict[str, Any], where: str = "") -> Iterator[str]:
    """Name the fields that have no description."""
    for key, own in schema.get("properties", {}).items():
        if not own.get("description"):
            yield f"{where}.{key}"
        yield from described(own, f"{where}.{key}")
        yield from described(own.get("items", {}), f"{where}.{key}[]")


def test_every_field_is_described() -> None:
    assert list(described(SCHEMA)) == []
    page = (ROOT / "docs" / "reports.md").read_text(encoding="utf-8")
    assert [key for key in SCHEMA["properties"] if f"`{key}`" not in page and key != "schema"] == []
