"""The plug-in of vLLM by itself; what it registers runs in vLLM in `test_vllm.py`."""

import logging
import sys
from types import SimpleNamespace

import pytest

from coral_hf.serving import vllm_plugin


@pytest.mark.parametrize(("version", "is_known"), [("0.32.0+cpu", True), ("1.0.0", False)])
def test_an_unknown_major_version_of_vllm_is_refused_in_one_sentence(
    monkeypatch, caplog, version, is_known
):
    registered = []
    registry = SimpleNamespace(register_model=lambda name, _: registered.append(name))
    stand_in = SimpleNamespace(__version__=version, ModelRegistry=registry)  # no such vLLM exists
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    with caplog.at_level(logging.WARNING):
        vllm_plugin.register()
    assert registered == (["CoralDrafter", "EagleCoralDrafter"] if is_known else [])
    said = "serves drafters in vLLM 0.x, and this is 1.0.0: install vLLM 0.x or a newer coral_hf"
    assert (said in caplog.text) is not is_known
