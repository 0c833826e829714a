"""Evaluation during training: acceptance length, decoded and simulated.

decoded rounds, or chain decoding replayed over a text → acceptance metrics.
"""

from .acceptance import Evaluation
