"""The JSON schema of the configuration, for editors: `gradclip schema`."""

from __future__ import annotations

import json

from gradclip.config.models import ClipConfig

__all__ = ["schema_text"]


def schema_text() -> str:
    """The schema as text, always the same for the same models."""
    schema = ClipConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=2) + "\n"
