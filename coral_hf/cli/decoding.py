"""The command that generates."""

from typing import Annotated

import typer

from .app import app
from .loading import load_drafter, load_target
from .options import (
    DepthOption,
    DrafterOption,
    DrawnOption,
    DtypeOption,
    HeadOption,
    NodesOption,
    RuleOption,
    TargetOption,
    TopKOption,
    given,
)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the target.")],
    target: TargetOption,
    drafter: DrafterOption,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    dtype: DtypeOption = "auto",
    draft_head: HeadOption = None,
    tree_depth: DepthOption = None,
    tree_top_k: TopKOption = None,
    tree_nodes: NodesOption = None,
    verification: RuleOption = None,
    drawn_tree: DrawnOption = None,
) -> None:
    """Generate with a drafter, streaming the text."""
    from transformers import TextStreamer

    from ..measure import Prompt, encode
    from ..measure.prompts import user_message

    model, tokenizer = load_target(target, dtype)
    asked = {"messages": (user_message(prompt),)} if tokenizer.chat_template else {"text": prompt}
    tree = given(
        draft_head=draft_head,
        tree_depth=tree_depth,
        tree_top_k=tree_top_k,
        tree_nodes=tree_nodes,
        verification=verification,
        drawn_tree=drawn_tree,
    )
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    output = model.generate(
        encode(Prompt(task="prompt", id="0", **asked), tokenizer).to(model.device),
        assistant_model=load_drafter(drafter, model),
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        **sampling,
        **tree,
    )
    stats = output.stats
    passes = len(stats.round_lengths)
    typer.echo(f"[{stats.acceptance_length:.2f} tokens per target pass, {passes} passes]", err=True)
