"""Code of others in a target: its class, its modules, its attention function, its hooks.

In: a target. Out: what of it is neither of transformers nor of a library that the tables know, as
`Entry`s that a trial has decided: once for a target and what is foreign in it, in a process.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from ...target import all_modules
from .entries import TABLES, Finding, Findings, finding
from .trial import Verdict, small_copy, try_target

logger = logging.get_logger(__name__)

# packages whose modules, hooks and attention functions are known; the last two lines are of
# quantized layers, which have a table of their own
LIBRARIES = frozenset(
    """
    transformers torch accelerate peft deepspeed liger_kernel coral_hf
    aqlm auto_round awq bitsandbytes compressed_tensors eetq fbgemm_gpu fouroversix fp_quant
    gptqmodel hqq optimum quark sinq spqr_quant torchao vptq
    """.split()
)
# classes that keep their own text in trees or chains with every version, each tried by
# `test_a_class_keeps_its_own_text_or_is_refused_in_a_sentence`; a class that is in neither this
# list nor a table, as a newer one, is tried before it drafts
KNOWN_CLASSES = frozenset(Path(__file__).with_name("known_classes.txt").read_text().split())
PROMPTS = [(3,), (11, 4)]  # tokens of the rows of each call of a trial
NEW = 20  # tokens of a text of a copy, which crosses its window and its switch
REMEMBERED = 32  # trials of a target
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")

# what was tried of each target, and what was found
_found: WeakKeyDictionary[PreTrainedModel, dict[tuple, Verdict]] = WeakKeyDictionary()


def foreign_findings(model: PreTrainedModel, rows: int = 0) -> Findings:
    """What of a target is foreign, with the way in which it was exact.

    `rows`: of the call for which hooks are tried, since they may count them; 0 for no call.
    """
    if has_foreign_attention(model):
        name = model.config._attn_implementation
        function = ALL_ATTENTION_FUNCTIONS.get(name)
        yield _tried(model, "attention function", name, (function,))
    kind = own_class(type(model))
    is_foreign = root_of(kind) not in LIBRARIES
    if is_foreign or kind.__name__ not in KNOWN_CLASSES:
        name = "class" if is_foreign else "new class"
        yield _tried(model, name, kind.__name__, (kind,))
    if modules := foreign_modules(model):
        yield _tried(model, "modules", _name(modules[0]), tuple(modules))
    if rows and (hooks := foreign_hooks(model)):
        lengths = tuple(11 - row % 8 for row in range(rows))
        yield _tried(model, "hooks", _name(hooks[0]), tuple(hooks), [(3,) * rows, lengths])


def has_foreign_attention(model: PreTrainedModel) -> bool:
    """Whether the attention function of a target is in no table, or registered by others."""
    name = model.config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    is_known = function is None or root_of(function) in LIBRARIES
    return name not in TABLES["Attention functions"] or not is_known


def foreign_modules(model: PreTrainedModel) -> list[type | Callable]:
    """The classes of modules of a target, and functions that replace a forward, of others."""
    parts = ((type(one), one.__dict__.get("forward")) for one in all_modules(model))
    found = dict.fromkeys(part for both in parts for part in both if part is not None)
    return [one for one in found if one is not type(model) and root_of(one) not in LIBRARIES]


def foreign_hooks(model: PreTrainedModel) -> list[Callable]:
    """The forward hooks of a target that no library has put there."""
    hooks = (hook for hook in forward_hooks(model) if root_of(hook) not in LIBRARIES)
    return list(dict.fromkeys(hooks))


def forward_hooks(model: PreTrainedModel) -> Iterator[Callable]:
    """All forward hooks that a pass of a target runs."""
    for name in GLOBAL_HOOKS:
        yield from getattr(torch_module, name).values()
    for module in all_modules(model):
        for name in HOOKS:
            yield from vars(module)[name].values()


def _name(one: Any) -> str:
    """The name of a class, of a function, or of the class of an object."""
    return getattr(one, "__qualname__", type(one).__qualname__)


def own_class(kind: type) -> type:
    """The class of a target: what wraps it at run time, as FSDP does, is none."""
    bases = (base for base in kind.__mro__[:-1] if not base.__module__.startswith("torch."))
    return next(bases, kind)


def has_adapters_by_row(model: PreTrainedModel) -> bool:
    """Whether PEFT has given each row of the passes of a call an adapter or a task of its own.

    It does so by hooks that hang on the layers of a target for the time of a call.
    """
    return any(root_of(hook) == "peft" for hook in forward_hooks(model))


def root_of(one: Any) -> str:
    """The package that a function, a method, an object or a class comes from."""
    while isinstance(one, functools.partial):
        one = one.func
    if isinstance(one, type):
        one = own_class(one)
    module = getattr(one, "__module__", None) or type(one).__module__
    return module.partition(".")[0]


def _tried(
    model: PreTrainedModel, kind: str, name: str, parts: tuple, prompts: list = PROMPTS
) -> Finding:
    """Try a target once for its foreign parts, and return the entry of what was found.

    `kind`: of part; modules and hooks hang on the target itself, others are tried on a small copy.
    """
    found = _found.setdefault(model, {})
    key = kind, model.config._attn_implementation, len(prompts[0]), *parts
    if key not in found:
        if len(found) >= REMEMBERED:  # hooks may be new in each call
            del found[next(iter(found))]
        tried, new = model, 8
        if kind not in ("modules", "hooks"):
            try:
                tried, new = small_copy(model), NEW
            except Exception as error:  # a class of others may be made in another way
                logger.info(f"No small copy of {type(model).__name__} can be made: {error}")
        found[key] = try_target(tried, prompts, new)
        logger.info(f"The {kind} {name!r} of the target was tried: {found[key].way.name.lower()}.")
    way, said = found[key]
    _, entry = finding("Code of others, which is tried", kind)
    reason = f"{entry.reason} ({said})" if said else entry.reason
    return name, entry._replace(way=way, reason=reason)
