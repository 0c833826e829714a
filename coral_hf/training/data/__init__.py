"""From conversations to what the trainer reads: loading → messages → encoding → dataset → collator.

In: conversations in any common layout (file, hub id, `datasets.Dataset`), the target's tokenizer.
Out: rows of `input_ids`, `attention_mask`, `labels`; [`CoralCollator`] pads them to a batch.
Trained is what the target writes itself: the assistant's turns or, of plain text, everything.
"""

from .collator import CoralCollator
from .dataset import prepare_dataset
from .encoding import tokenize
from .joining import join_datasets
from .loading import load_conversations
from .messages import to_messages
from .packing import pack_dataset
from .show import render_mask, show

__all__ = [
    "CoralCollator",
    "join_datasets",
    "load_conversations",
    "pack_dataset",
    "prepare_dataset",
    "render_mask",
    "show",
    "to_messages",
    "tokenize",
]
