"""Losses: parameter-free functions on tensors, each a sum over local elements divided by a global count.

Because the count is that of the *global* batch, the sum over micro-batches and processes equals the loss of the whole
batch, even where they hold different numbers of valid elements.
"""
