"""Reading what a trace says once, in its first line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from gradclip.errors import ConfigError
from gradclip.records.trace_file import FORMAT, VERSION, TraceHeader

__all__ = ["parse_header", "refuse"]

_STRICT = ConfigDict(strict=True, extra="ignore")
_Count = Annotated[int, Field(ge=0)]


class _Counts(BaseModel):
    model_config = _STRICT

    steps: _Count
    clipped: _Count
    skipped: _Count
    nonfinite: _Count


class _Fields(BaseModel):
    """The fields of `TraceHeader` as JSON holds them."""

    model_config = _STRICT

    norm_type: Annotated[float, Field(gt=0)] = 2.0
    source: str = "recorder"
    config: dict[str, Any] | None = None
    created: str | None = None
    parameters: list[str] | None = None
    counts: _Counts | None = None


_ALLOWED = {
    "norm_type": 'a number above 0, or ".inf"',
    "source": "text",
    "config": "an object or null",
    "created": "text or null",
    "parameters": "a list of names or null",
    "counts": "null, or an object with the whole numbers steps, clipped, skipped and nonfinite",
}


def parse_header(line: bytes, path: Path) -> TraceHeader:
    """The header in the first line of a trace.

    Raises:
        ConfigError: If it isn't one, or is of an unknown version.
    """
    try:
        content = from_json(line)
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        msg = (
            f'{path}, line 1: this isn\'t the header of a trace, {{"format": "{FORMAT}", ...}}. '
            "Give a file of the flight recorder, or make one from a log: gradclip import LOG."
        )
        raise ConfigError(msg)
    if content.get("version") != VERSION:
        msg = (
            f"{path}, line 1: version is {content.get('version')!r}; this gradclip reads "
            f"{VERSION}. Use the gradclip that wrote it, or a newer one."
        )
        raise ConfigError(msg)
    try:
        given = _Fields.model_validate(_number(content)).model_dump()
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        refuse(path, "line 1", f"{name} is {content[name]!r:.80}", _ALLOWED[name])
    if given["parameters"] is not None:
        given["parameters"] = tuple(given["parameters"])
    return TraceHeader(**given)


def refuse(path: Path, where: str, found: str, allowed: str) -> NoReturn:
    """Refuse a trace for what stands at a place of it."""
    msg = f"{path}, {where}: {found}; allowed: {allowed}."
    raise ConfigError(msg)


def _number(value: Any) -> Any:
    """The same with the numbers that JSON lacks, which the header spells as YAML does."""
    if isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_number(item) for item in value]
    special = {".inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
    return special.get(value, value) if isinstance(value, str) else value
