"""The link from a drafter's `push_to_hub` to the code that publishes it, which imports drafters.

In: a function that finds that code. Out: the module that `push_to_hub` calls.
"""

from collections.abc import Callable
from typing import Any

_find: Callable[[], Any] | None = None


def register_publisher(find: Callable[[], Any]) -> None:
    """Set what publishes: `find` returns a module with `push` and `upload_saved`."""
    global _find
    _find = find


def publisher() -> Any:
    """The module that was registered."""
    assert _find is not None, "`import coral_hf` registers one"
    return _find()
