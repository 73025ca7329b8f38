"""Losses: parameter-free functions on tensors, each a sum over local elements divided by a global count.

Dividing by the count of the *global* batch makes the sum over micro-batches and processes equal the loss of the whole
batch, however unevenly the valid elements fall.
"""
