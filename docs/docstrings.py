"""A section "Example:" of a docstring holds code, as "Examples:" does for griffe."""

from typing import Any

from griffe import Extension, Object


class ExampleSections(Extension):
    """Names these sections as griffe knows them."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Change the docstring before it is parsed."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")
