"""Training data: loading → messages → encoding → dataset → collator.

In: conversations of any common layout (a file, a Hub id, a `datasets.Dataset`), the target's
tokenizer. Out: rows of `input_ids`, `attention_mask`, `labels`; [`CoralCollator`] pads them to a
batch. Trained is what the target writes: the assistant's turns or, of plain text, everything.
"""

from ...measure.chat import set_chat_options
from .collator import CoralCollator
from .dataset import prepare_dataset
from .encoding import tokenize
from .inspection.check import DataCheck, check_dataset
from .inspection.show import describe, render_mask, show
from .loading import join_datasets, load_conversations, with_weight
from .messages import to_messages
from .packing import pack_dataset, share_prompts
