"""The playground: a page on which a target answers a prompt alone and with a drafter, side by side.

`race.py`: two calls of `generate` in turn, and their rounds → `drawing.py`: HTML → `page.py`: the
page, in Gradio.
"""
