"""The playground: a page on which a target answers a prompt alone and with a drafter, side by side.

`turns.py`: the machine, used in turn → `race.py`: two calls of `generate` and their rounds →
`drawing.py`: HTML → `page.py`: the page, in Gradio.
"""
