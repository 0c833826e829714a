"""Training data: loading → messages → encoding → dataset → documents.

In: conversations of any common layout (a file, a Hub id, a `datasets.Dataset`), the target's
tokenizer. Out: rows of `input_ids`, `attention_mask`, `labels`; [`CoralCollator`] pads them to a
batch. Trained is what the target writes: the assistant's turns or, of plain text, everything.
"""

from ...measure.chat import set_chat_options
from .check import check_dataset
from .dataset import prepare_dataset
from .documents import CoralCollator, pack_dataset, share_prompts
from .encoding import tokenize
from .loading import join_datasets, load_conversations, with_weight
from .messages import to_messages
from .show import show
