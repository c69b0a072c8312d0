"""What ships with the project: GPT-J's tokenizer and configuration, a tiny model, and small data sets."""
