"""The door to `generate`: the one place that knows `GenerationMixin`.

In: `target.generate(..., assistant_model=drafter)`. Out: the same call with our loop as its
decoding method. transformers has no registry for assistants, so its public `generate` is wrapped
once; calls without a CORAL drafter pass untouched. So is the function by which a pipeline takes an
`assistant_model`. Both take the folder or the Hub id of a drafter too. `generate_batch` would leave
out a drafter without a word, and refuses it.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.pipelines import base as pipelines

from ..identity import check_tokenizer
from ..lm_head import execution_device
from ..target import read_target, sliding_windows
from .caches.continuation import MEMORY, continued_cache, given_cache, is_user_cache, returned_cache
from .drafting import Drafting, Family, family_of, family_options
from .guard import Call, accept_call, accept_keywords, refuse_continuous_batching
from .loop import CoralGenerateOutput, DecodingLoop, Plan, decode_plainly
from .outputs import OutputCollector
from .plain.draft_policy import Costs, choose_policy, choose_speculation
from .plain.own_loop import OwnLoop
from .preparation.needs import Preparation, choose_preparation
from .preparation.runner import make_runner
from .rounds.loop import FixedPlan, with_constant_shapes
from .sequences import Sequences
from .settings import (
    DECODING_KEYWORDS,
    TREE_DEFAULTS,
    Settings,
    choose_rule,
    choose_shape,
    max_length_of,
    with_stop_strings,
)

# by target: the name of the drafter that was loaded last, and what else it depends on; the drafter
_NAMED: WeakKeyDictionary[PreTrainedModel, tuple[tuple, PreTrainedModel]] = WeakKeyDictionary()


def install() -> None:
    """Let `generate` and pipelines take a CORAL drafter as `assistant_model`; once is enough."""
    if hasattr(GenerationMixin.generate, "is_coral_door"):
        return
    plain, signature = GenerationMixin.generate, inspect.signature(GenerationMixin.generate)
    plain_batch, plain_loading = GenerationMixin.generate_batch, pipelines.load_assistant_model

    @functools.wraps(plain)
    def generate(self, *args, **kwargs):
        call = signature.bind_partial(self, *args, **kwargs).arguments
        if isinstance(call.get("assistant_model"), (str, Path)):
            call["assistant_model"] = named_drafter(call["assistant_model"], self)
        if family_of(call.get("assistant_model")) is None:
            return plain(self, *args, **kwargs)
        return generate_with_drafter(plain, {**call.pop("kwargs", {}), **call})

    @functools.wraps(plain_batch)
    def generate_batch(self, *args, **kwargs):
        if is_drafter(kwargs.get("assistant_model")):
            refuse_continuous_batching()
        return plain_batch(self, *args, **kwargs)

    @functools.wraps(plain_loading)
    def load_assistant_model(model, assistant_model, assistant_tokenizer):
        drafter = assistant_model
        if isinstance(drafter, str) and model.can_generate() and is_drafter(drafter):
            drafter = named_drafter(drafter, model)
        if family_of(drafter) is None:
            return plain_loading(model, assistant_model, assistant_tokenizer)
        # a drafter has its target's tokens, whatever their special ones are called
        if assistant_tokenizer is not None:
            check_tokenizer(assistant_tokenizer, drafter.config)
        return drafter, None

    vars(generate)["is_coral_door"] = True
    GenerationMixin.generate, GenerationMixin.generate_batch = generate, generate_batch
    pipelines.load_assistant_model = load_assistant_model


def uninstall() -> None:
    """Give `generate` and pipelines back as they were before `import coral_hf`."""
    if hasattr(GenerationMixin.generate, "is_coral_door"):
        GenerationMixin.generate = GenerationMixin.generate.__wrapped__
        GenerationMixin.generate_batch = GenerationMixin.generate_batch.__wrapped__
        pipelines.load_assistant_model = pipelines.load_assistant_model.__wrapped__


def load_drafter(name: str | Path, target: PreTrainedModel) -> PreTrainedModel:
    """Load a drafter from a folder or the Hub: in its target's dtype, where its LM head is."""
    drafter = AutoModel.from_pretrained(name, dtype=target.dtype)
    return drafter.to(execution_device(read_target(target).head.module)).eval()


def named_drafter(name: str | Path, target: PreTrainedModel) -> PreTrainedModel:
    """Return the drafter in a folder or on the Hub, which stays loaded as long as its target.

    A folder is read again when a file in it has changed.

    Raises:
        ValueError: if it is no drafter.
    """
    stamps = [path.stat().st_mtime_ns for path in Path(name).glob("*")]
    key = (str(name), max(stamps, default=None), target.dtype, target.device)
    loaded = _NAMED.get(target)
    if loaded is None or loaded[0] != key:
        if not is_drafter(name):
            raise ValueError(
                f"`assistant_model` is {str(name)!r}, which is no drafter of coral_hf. Load a small"
                " model with AutoModelForCausalLM.from_pretrained, and pass the model, or"
                " `LanguageModelDrafter(model)`, which drafts trees."
            )
        _NAMED[target] = loaded = key, load_drafter(name, target)
    return loaded[1]


def is_drafter(assistant: Any) -> bool:
    """Whether an assistant, or what a folder or a Hub id holds, is of a registered family."""
    if isinstance(assistant, (str, Path)):
        assistant = SimpleNamespace(config=AutoConfig.from_pretrained(assistant))
    return family_of(assistant) is not None


def generate_with_drafter(plain: Callable, call: dict[str, Any], only_compiles: bool = False):
    """Call plain `generate` with our loop as its decoding method; `call` is by keyword.

    `only_compiles`: compile the rounds of such calls, and decode nothing.
    """
    model, drafter = call.pop("self"), call.pop("assistant_model")
    if hasattr(drafter, "get_base_model"):  # of PEFT, whose adapter acts within its layers
        drafter = drafter.get_base_model()
    accept_keywords(model, call)
    family = family_of(drafter)
    assert family is not None, "`generate` hands over drafters of registered families alone"
    ours = (*DECODING_KEYWORDS, *family_options())
    own = {name: call.pop(name) for name in ours if name in call}
    known = [*DECODING_KEYWORDS, *family.options]
    if unknown := sorted(own.keys() - known):
        raise ValueError(f"Unknown settings {unknown}; use {known}.")
    if call.get("tokenizer") is not None:
        check_tokenizer(call["tokenizer"], drafter.config)
    own = {name: value for name, value in own.items() if value is not None}
    keywords = tuple(name for name in call if call[name] is not None)
    # `generate` hands a callable no streamer, so it is bound here
    loop = BoundDrafter(drafter, family, own, call.get("streamer"), keywords, only_compiles)
    call["stopping_criteria"] = with_stop_strings(call, model.generation_config)
    return plain(model, **{**call, "custom_generate": loop})


@dataclass(frozen=True)
class BoundDrafter:
    """A drafter with the settings of a call: the decoding loop, as `custom_generate` takes one."""

    drafter: PreTrainedModel
    family: Family
    settings: Settings  # by keyword, the options of the drafter's family included
    streamer: BaseStreamer | None
    keywords: tuple[str, ...]  # of `generate`, that the caller has set
    only_compiles: bool

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs,
    ) -> Tensor | CoralGenerateOutput:
        """Decode what `generate` has prepared for the target: `input_ids` are (batch, length)."""
        config, watchers = generation_config, (logits_processor, stopping_criteria)
        own, settings = getattr(self.drafter, "generation_config", None), self.settings
        names = DECODING_KEYWORDS  # of what calls may leave out
        defaults: Settings = {name: getattr(own, name, TREE_DEFAULTS.get(name)) for name in names}
        rule = choose_rule(config.do_sample, defaults, settings)
        speculation = choose_speculation((defaults | settings)["speculation"])
        if speculation == "never":  # rounds are none, so that the guard has nothing to say
            choose_shape(None, defaults, settings, rule)
            self._start(model)()
            sequences = Sequences(input_ids, *watchers, self.streamer)
            return decode_plainly(OwnLoop(model, sequences, config, model_kwargs))
        call = Call(model, input_ids, config, model_kwargs, *watchers, self.keywords)
        judgement = accept_call(call, rule)
        longest = max_length_of(model, stopping_criteria)
        need = choose_preparation(model, model_kwargs, len(input_ids), longest)
        shape, takes_tree = choose_shape(judgement.obstacle, defaults, settings, rule)
        pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
        keeps_rows = need > Preparation.DIRECT or judgement.keeps_rows
        sequences = Sequences(input_ids, *watchers, self.streamer, pad, not takes_tree, keeps_rows)
        # the two models, each with what it has read before the call
        given, windows = given_cache(model_kwargs), sliding_windows(model)
        # a caller who gets a cache may continue from it
        keep_cache = config.return_dict_in_generate or is_user_cache(given)
        start = self._start(model)
        drafting = start(memory=getattr(given, MEMORY, None))
        cache = continued_cache(input_ids, model_kwargs, windows)
        collector = OutputCollector(config, len(input_ids))
        sides = read_target(model), need, takes_tree, drafting.layers
        runner = make_runner(*sides, cache, keep_cache)
        costs = Costs(**(getattr(own, "draft_costs", None) or {}))
        # drawn text follows from its seed, and so never from a clock
        timed, fixed_costs = (None, costs) if config.do_sample else (model, None)
        policy = choose_policy(timed, shape, speculation, costs)
        plan = Plan(rule, longest, keep_cache)
        loop = DecodingLoop(drafting, runner, sequences, collector, policy, plan)
        how = FixedPlan(shape, speculation == "adaptive", fixed_costs, self.only_compiles)
        loop = with_constant_shapes(loop, how, need > Preparation.DIRECT or not takes_tree)
        del drafting  # the loop gives it up where it does not pay
        loop.run(model_kwargs)
        filled = returned_cache(given, runner.whole_cache())
        setattr(filled, MEMORY, loop.memory())
        return loop.output(filled)

    def _start(self, model: PreTrainedModel) -> Callable[..., Drafting]:
        """What makes the drafter's side of a call."""
        options = {one: self.settings[one] for one in self.family.options if one in self.settings}
        return functools.partial(self.family.start, self.drafter, read_target(model), **options)
