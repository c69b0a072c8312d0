"""Files that ship with the project (tokenizer, configuration, a tiny model, small data sets), and their paths."""
