"""The GPT-J network, with Hugging Face's weights and module names: attention, loss without logits, loader, adapters."""
