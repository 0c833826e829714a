"""`python -m coral_hf.decoding.guard > docs/guard.md`: the tables as a page of the docs."""

from .page import guard_page

print(guard_page(), end="")
