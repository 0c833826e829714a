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
    round_lengths: list[
        int
    ]  # tokens of each target pass after the first; the first pass and its tokens are left out
    stage_seconds: dict[
        str, float
    ]  # "prefill", "draft", "verify", "other"; empty where a method does not tell
    peak_bytes: int | None  # of GPU memory; None on a CPU
    equals_plain: (
        bool | None
    )  # whether all tokens are those of "plain"; None where they are sampled

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / self.num_tokens
