"""For mkdocstrings: a section `Example:` is shown as `Examples:` is, as code and not as prose."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_TITLE = re.compile(r"^Example:$", re.MULTILINE)


class Examples(Extension):
    """Google's style knows both titles, griffe's reader one."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rename the section before the docstring is read."""
        if obj.docstring is not None:
            obj.docstring.value = _TITLE.sub("Examples:", obj.docstring.value)
