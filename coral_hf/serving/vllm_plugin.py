"""vLLM plug-in: the entry point `vllm.general_plugins`, called in each process of vLLM.

In: nothing. Out: vLLM knows the architecture of a CORAL checkpoint, and `import coral_hf` has
registered its config, so a checkpoint is served as it was published:

    vllm serve TARGET --speculative-config
        '{"method": "eagle", "model": DRAFTER, "num_speculative_tokens": 4}'
"""

ARCHITECTURE = "CoralDrafter"
IMPLEMENTATION = "coral_hf.serving.vllm_drafter:ServedDrafter"


def register() -> None:
    """Register the drafter; vLLM may call this several times in one process."""
    from vllm import ModelRegistry

    # vLLM looks up the name that a config holds, and later the same one with "Eagle" before it
    for name in (ARCHITECTURE, f"Eagle{ARCHITECTURE}"):
        ModelRegistry.register_model(name, IMPLEMENTATION)
