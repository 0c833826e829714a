"""What a round may not do on a device: wait for it, or copy to or from another one.

Without a device this is necessary, not sufficient: `tests/gpu` decides.
"""

from copy import deepcopy

import pytest
import torch
from fixed_calls import FAMILIES, PLAIN, SAMPLING, STATIC, drafted, pair, prompts
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from coral_hf.decoding.rounds import loop as loop_module
from coral_hf.decoding.rounds.fixed_rounds import FixedRounds


class NoSync(TorchDispatchMode):
    """Refuses what waits for a device, copies to it from Python, or compiles to something else."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.REFUSED, name
        # a list becomes a tensor; a number that is assigned is filled in on the device
        assert name != "lift_fresh" or args[0].dim() == 0, name
        # Inductor's kernel of it for a CPU reads lanes that nobody wrote
        assert name not in ("argmax", "argmin") or args[0].is_floating_point(), name
        if name in ("_to_copy", "copy_"):
            devices = {one.device for one in args if isinstance(one, torch.Tensor)}
            devices |= {torch.device(one) for one in [(kwargs or {}).get("device")] if one}
            assert len({device.type for device in devices}) == 1, f"{name} across {devices}"
        if name in ("index", "index_put", "index_put_"):
            assert all(one is None or one.dtype != torch.bool for one in args[1]), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("family", "sampling"),
    [
        *((family, {}) for family in FAMILIES),
        ("llama", SAMPLING),
        ("gemma3", {**SAMPLING, "top_p": 0.9, "drawn_tree": True}),
        ("llama", {**SAMPLING, "verification": "traversal"}),
    ],
)
def test_a_step_waits_for_no_device(family, sampling, monkeypatch):
    target, drafter = pair(family, torch.float32)
    target.set_experts_implementation("batched_mm")  # the eager one is a loop over experts

    def watched(step):
        def run(rounds):
            with NoSync():
                return step(rounds)

        return run

    steps = {name: watched(getattr(FixedRounds, name)) for name in ("draft", "verify", "token")}
    monkeypatch.setattr("coral_hf.decoding.rounds.steps.STEPS", steps)
    settings = {**PLAIN, **STATIC, **sampling, "speculation": "adaptive"}
    assert drafted(target, drafter, prompts(rows=2), **settings).stats.num_rounds > 0


class OnMeta(TorchFunctionMode):
    """Copies that `deepcopy` makes of tensors have their shapes, on a device that holds nothing.

    Fakes of CUDA tensors would do, but a torch without CUDA cannot index them.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in (torch.Tensor.__deepcopy__, torch.Tensor.clone):  # the second of parameters
            return func(*args, **(kwargs or {}))
        tensor, *memo = args
        with torch._C.DisableTorchFunction():
            size, stride = tensor.shape, tensor.stride()
            made = torch.empty_strided(size, stride, dtype=tensor.dtype, device="meta")
        return memo[0].setdefault(id(tensor), made) if memo else made


@pytest.mark.parametrize(
    ("family", "head", "sampling"),
    [
        *((family, "full", {}) for family in ("llama", "gemma3", "mistral_window", "gpt2")),
        ("llama", "routed", {}),
        ("llama", "full", {**SAMPLING, "drawn_tree": True}),
        ("gemma3", "full", {**SAMPLING, "verification": "traversal"}),
    ],
)
def test_a_round_stays_on_its_device(family, head, sampling, monkeypatch):
    # no proof: kernels are not run, and what reads a number of the device is found by `NoSync`
    target, drafter = pair(family, torch.float32)
    drafter.heads.add_router(4, 2)
    drafter.config.is_router_trained = True
    found, begin = [], loop_module.FixedLoop.begin_rounds

    def kept(self):
        begin(self)
        found.append(self.rounds)

    monkeypatch.setattr(loop_module.FixedLoop, "begin_rounds", kept)
    settings = {**PLAIN, **STATIC, **sampling, "draft_head": head, "speculation": "always"}
    monkeypatch.setattr(loop_module.FixedLoop, "end_rounds", lambda self: None)
    drafted(target, drafter, prompts(rows=2), **settings)
    with OnMeta():
        rounds = deepcopy(found[0])
    with NoSync(), torch.no_grad():
        rounds.draft()
        assert rounds.verify().is_meta and rounds.token().is_meta
