"""What `import coral_hf` imports beside what transformers' own generation does.

Imported by conftest.py before anything else of the package, so that no test needs a process for it.
"""

import gc
import sys

gc.disable()  # until tests are collected, see conftest.py: what is imported stays

import transformers.generation.utils  # noqa: E402, F401  what it imports is not ours to spare

_before = set(sys.modules)

import coral_hf  # noqa: E402, F401

IMPORTED = set(sys.modules) - _before
