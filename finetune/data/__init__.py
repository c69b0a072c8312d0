"""Data: from files to packed batches through a cache of tokens, without torch.

sources -> formats (records) -> encode_* (examples) -> cache -> packing (rows) -> batches (order) -> collate
"""
