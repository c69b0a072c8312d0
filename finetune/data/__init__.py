"""Data: from files to packed batches through a cache of tokens, without torch.

sources -> formats (rows) -> encode_* (examples) -> cache -> packing (sequences) -> batches (order) -> collate

The units of data, one word for each:

    row         an entry of a data file: a line of .jsonl or .csv, an entry of .parquet, an element of a .json array;
                in code its place (`path:line`) and its record, or the error in its stead
    record      the fields of a row, a dict
    document    the text of a row in causal language modelling
    example     the tokens of a row, or of a part of it: what the cache stores and a loss or metric counts
    window      an example that is a part: of a context (QA), or of a conversation that is too long (instruct)
    segment     the tokens of one example that lie in one sequence
    sequence    segments of at most task.max_length tokens in all: what a micro-batch counts and the order shuffles
"""
