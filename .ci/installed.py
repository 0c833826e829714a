"""The installed package, outside of its repository: a drafter changes no token of a target."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import coral_hf

assert Path(__file__).parents[1] not in Path(coral_hf.__file__).parents, coral_hf.__file__
sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
torch.manual_seed(0)
target = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, pad_token_id=0)).double().eval()
drafter = coral_hf.CoralDrafter.from_target(target).eval()
prompt, settings = torch.arange(3, 9)[None], {"do_sample": False, "max_new_tokens": 20}
plain = target.generate(prompt, **settings)
assert target.generate(prompt, assistant_model=drafter, **settings).equal(plain)
print("installed:", coral_hf.__version__)
