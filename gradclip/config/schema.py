"""The JSON schema of the configuration, for editors: `python -m gradclip.config.schema FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gradclip.config.models import ClipConfig

__all__ = ["schema_text"]


def schema_text() -> str:
    """The schema as text, always the same for the same models."""
    schema = ClipConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(schema_text(), encoding="utf-8")
