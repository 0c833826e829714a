"""One timed call of one method on one prompt: the record that a report is computed from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """What a call of `generate` cost and gave."""

    item: int  # the same for all methods and repeats on one turn of one prompt
    task: str
    prompt: str  # its id in its file
    turn: int  # 0 is the first
    method: str
    repeat: int
    prompt_length: int
    num_tokens: int  # new ones, the first included
    seconds: float  # of the whole call, the prefill included
    # tokens of each target pass after the first; the first pass and its tokens are left out
    round_lengths: list[int]
    # "prefill", "draft", "verify", "other"; what a method does not tell is left out
    stage_seconds: dict[str, float]
    peak_bytes: int | None  # of GPU memory; None on a CPU
    # whether all tokens are those of "plain"; None where they are sampled
    equals_plain: bool | None

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / self.num_tokens

    @property
    def decoding_seconds_per_token(self) -> float | None:
        """Without the prompt's pass and its token; None where the method does not tell."""
        if "prefill" not in self.stage_seconds or self.num_tokens < 2:
            return None
        return (self.seconds - self.stage_seconds["prefill"]) / (self.num_tokens - 1)
