"""What can be wrong: what was asked, what was found, what came out."""

import logging

__all__ = [
    "AlarmError",
    "ClipError",
    "ConfigError",
    "DebugError",
    "LayoutError",
    "NonFiniteError",
    "SkipLimitError",
    "escaped",
]


def escaped(text: str) -> str:
    r"""The text with what isn't printable, such as codes that a terminal obeys, written out.

    Names of parameters, files and keys come from whoever made a model or a log.

    Example:
        >>> escaped("layer\x1b[2J")
        'layer\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def _escape_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = escaped(record.getMessage()), ()
    return True


logging.getLogger("gradclip").addFilter(_escape_record)


class ClipError(Exception):
    """Base of every error raised by gradclip."""

    def __str__(self) -> str:
        """The message, safe to print."""
        return escaped(super().__str__())


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


class AlarmError(ClipError, SystemExit):
    """An alarm ends the run (`alarm:` in the configuration).

    If nobody catches it, the process ends with exit code 76 and without a traceback, as after
    `sys.exit(76)`; the message was logged by the first rank. `except Exception` catches it.

    Args:
        message: Why, since when, and what to do.
        checkpoint: The last checkpoint from before the trouble, if one is known.

    Attributes:
        checkpoint: As given.
        code: 76.
    """

    code = 76

    def __init__(self, message: str, checkpoint: str | None = None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint
