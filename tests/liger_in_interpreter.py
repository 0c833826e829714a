"""Run by `test_liger_loss.py` with TRITON_INTERPRET=1: what Liger's kernel finds on the CPU."""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import launched
import torch
from loss_inputs import chunked_token_loss, features, make_head

from coral_hf.training.losses.liger_loss import LigerChunkLoss
from coral_hf.training.losses.token_loss import TokenWeights


def losses(cases: list[dict]) -> list[dict]:
    """Loss, agreement and gradient of each case; see `test_liger_loss.found_by`."""
    found = []
    for case in cases:
        predicted, target = features()
        head = make_head(getattr(torch, case["dtype"]), **case["finish"])
        weights, size = TokenWeights(case["weight"]), case["chunk_size"]
        given = weights, size, torch.tensor([1.0, 0.5, -2.0]), LigerChunkLoss
        out = chunked_token_loss(predicted, target, head.logits, *given)
        (gradient,) = torch.autograd.grad(out.loss, predicted)
        found.append({**out._asdict(), "loss": out.loss.detach(), "gradient": gradient})
    return found


def training(folder: Path) -> list[dict]:
    """What is logged of a few steps with the kernel, and of an evaluation."""
    rows = launched.make_rows(4)
    settings = {"use_liger_kernel": True, "max_steps": 3, "eval_prompts": 0}
    trainer = launched.make_trainer(folder, eval_dataset=rows, **settings)
    kernel = LigerChunkLoss.__call__
    with patch.object(LigerChunkLoss, "__call__", autospec=True, side_effect=kernel) as calls:
        trainer.train()
        trainer.evaluate()
    assert calls.call_count == 3 * (3 + 1)  # a chunk for each of 3 steps, in 3 batches and 1
    return trainer.state.log_history


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = {"losses": losses(json.loads(sys.argv[2])), "logs": training(folder / "run")}
    torch.save(found, folder / "found.pt")
