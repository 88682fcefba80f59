"""How every configuration model behaves."""

from pydantic import ConfigDict

__all__ = ["STRICT"]

STRICT = ConfigDict(
    frozen=True,
    extra="forbid",
    strict=True,
    use_attribute_docstrings=True,
    ser_json_inf_nan="constants",
)
"""Nothing is guessed, nothing unknown is let through."""
