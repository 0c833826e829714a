"""The guard: from target and call to a tree, a chain, or a refusal with its reason."""

from .calls import Call, accept_call, accept_keywords, refuse_continuous_batching
from .entries import CHAIN, REFUSED, TREE, Entry, Judgement, Way
from .target import accept_features, accept_target, judge_target
