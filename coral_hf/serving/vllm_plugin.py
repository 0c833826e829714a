"""The door to vLLM: called in each of its processes, by the entry point `vllm.general_plugins`.

In: nothing. Out: vLLM knows the architecture of a CORAL checkpoint, and `import coral_hf` has told
the Auto classes its config, so that a checkpoint is served as it was published:

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
