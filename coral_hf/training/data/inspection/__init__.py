"""Looking at training data: the tokens of a row, and numbers of a whole dataset.

In: rows of any layout, a tokenizer. Out: text on a terminal, or JSON.
"""
