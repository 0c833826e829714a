"""vLLM plug-in: the entry point `vllm.general_plugins`, called in each process of vLLM.

In: nothing. Out: vLLM knows the architecture of a CORAL checkpoint, and `import coral_hf` has
registered its config, so a checkpoint is served as it was published:

    vllm serve TARGET --speculative-config
        '{"method": "eagle", "model": DRAFTER, "num_speculative_tokens": 4}'

A vLLM of another major version is left alone, with one sentence: an error here would end it for
models that have no drafter.
"""

import logging

ARCHITECTURE = "CoralDrafter"
IMPLEMENTATION = "coral_hf.serving.vllm_drafter:ServedDrafter"
MAJOR = "0"


def register() -> None:
    """Register the drafter; vLLM may call this several times in one process."""
    from vllm import ModelRegistry, __version__

    if __version__.split(".")[0] != MAJOR:
        logging.getLogger("vllm.coral_hf").error(  # under a name that vLLM prints
            f"coral_hf serves drafters in vLLM {MAJOR}.x, and this is {__version__}: install vLLM"
            f" {MAJOR}.x or a newer coral_hf, or serve what `coral-hf export --to vllm` writes."
        )
        return
    # vLLM looks up the name that a config holds, and later the same one with "Eagle" before it
    for name in (ARCHITECTURE, f"Eagle{ARCHITECTURE}"):
        ModelRegistry.register_model(name, IMPLEMENTATION)
