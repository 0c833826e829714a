"""Classification loss of a chunk of logits with a Triton kernel of Liger, on GPUs.

In: logits (rows, vocab) and the target's probabilities. Out: the result of `TorchChunkLoss`; the
logits are read three times and written once, in their own dtype.

The kernel is the one inside `LigerFusedLinearKLDivLoss`, without the LM head around it: agreement
needs the logits too, and this way the head runs only once. KL(p ‖ q) is the cross-entropy less the
entropy of p, and has the same gradient.
"""

import os

import torch
from torch import Tensor
from transformers.utils.versions import require_version

from ..arguments import CoralTrainingArguments
from .token_loss import Chunk, Goal, TorchChunkLoss

REQUIRED = "liger-kernel>=0.8.5"
# below it, the kernel takes probabilities for 0
TINY = torch.finfo(torch.float32).tiny


class LigerChunkLoss(TorchChunkLoss):
    """The classification loss of chunks; there is no top-k loss."""

    def __call__(self, logits: Tensor, goal: Goal) -> Chunk:
        """Compute the loss of (rows, vocab) logits, which the gradient overwrites."""
        import liger_kernel.functional  # noqa: F401  names the kernels
        from liger_kernel.backends import dispatch

        first, scale = logits.argmax(-1), self.weights.classification
        # arguments: labels, the label that is ignored, temperature, eps, scale
        loss, slope = dispatch("kl_loss_and_grad", logits, goal.probs, None, -100, 1.0, TINY, scale)
        losses = loss / scale + torch.special.entr(goal.probs).sum(-1)
        return Chunk(losses, torch.zeros_like(losses), first == goal.first, slope)


def check_liger(args: CoralTrainingArguments) -> None:
    """Check that a run can use the kernel, which may read logits of any shape.

    Raises:
        ImportError: without a Liger that has the kernel.
        ValueError: on a device that Triton does not compile for.
    """
    require_version(REQUIRED, "`use_liger_kernel` needs it: pip install liger-kernel")
    if args.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "`use_liger_kernel` is True, but training runs on the CPU, for which Triton compiles no"
            " kernel; leave it out, or train on a GPU."
        )
