"""The playground as a Hugging Face Space, or anywhere: python app.py

TARGET and DRAFTER, variables of the Space, name models of the Hub; without them the demo's small
models are trained when the Space starts, which takes five minutes.
"""

import os
from pathlib import Path

from coral_hf.cli import main

target, drafters = os.environ.get("TARGET"), os.environ.get("DRAFTER", "").split()
names = ["--target", target] if target else []
for drafter in drafters:
    names += ["--drafter", drafter]
if not target and not Path("coral-demo", "drafter").is_dir():
    main(["demo", "--no-compile"])
main(["playground", *names])
