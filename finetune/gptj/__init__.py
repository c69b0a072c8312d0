"""The fast GPT-J: attention, loss without logits, streaming loader. Weights and module names are Hugging Face's."""
