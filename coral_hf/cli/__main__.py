"""`python -m coral_hf.cli`, the same program as `coral-hf`."""

from . import main

main()
