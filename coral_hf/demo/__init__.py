"""The demo: all that CORAL does, on a small target that it trains itself, without a network."""

from .run import DemoResult, run_demo
from .settings import Budget, DemoSettings, OwnTarget

__all__ = ["Budget", "DemoResult", "DemoSettings", "OwnTarget", "run_demo"]
