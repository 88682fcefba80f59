"""What can be wrong: what was asked, what was found, what came out."""

__all__ = [
    "ClipError",
    "ConfigError",
    "DebugError",
    "LayoutError",
    "NonFiniteError",
    "SkipLimitError",
]


class ClipError(Exception):
    """Base of every error raised by gradclip."""


class ConfigError(ClipError, ValueError):
    """Something a user wrote is wrong: a value, a key, a combination of policies."""


class LayoutError(ClipError, RuntimeError):
    """Something found in the model or the process groups can't be clipped rightly."""


class DebugError(ClipError, AssertionError):
    """With `debug: true`: something that has to hold around a clipping step doesn't."""


class NonFiniteError(ClipError, RuntimeError):
    """A gradient is NaN or infinite and the configuration asks to stop."""


class SkipLimitError(ClipError, RuntimeError):
    """More steps in a row would be withheld than allowed, and `fallback` is "raise"."""
