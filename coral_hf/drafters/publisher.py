"""The seam by which a drafter's `push_to_hub` gets its model card.

In: whoever knows how drafters are published registers it. Out: what `push_to_hub` calls.
"""

from collections.abc import Callable
from typing import Any

_find: Callable[[], Any] | None = None


def register_publisher(find: Callable[[], Any]) -> None:
    """Set who is asked: `find` returns a module with `pushing`, `finish_folder`, `drop_stale`."""
    global _find
    _find = find


def publisher() -> Any:
    """The publisher that was registered."""
    assert _find is not None, "`import coral_hf` registers one"
    return _find()
