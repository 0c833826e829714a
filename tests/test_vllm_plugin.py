"""The plug-in of vLLM by itself; what it registers runs in vLLM in `test_vllm.py`."""

import sys
from types import SimpleNamespace

from coral_hf.serving import vllm_plugin


def test_both_names_that_vllm_looks_up_are_registered(monkeypatch):
    registered = []
    registry = SimpleNamespace(register_model=lambda name, _: registered.append(name))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    vllm_plugin.register()
    assert registered == ["CoralDrafter", "EagleCoralDrafter"]
