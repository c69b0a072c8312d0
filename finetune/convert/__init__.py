"""Checkpoints from one form into another, tensor by tensor: Hugging Face's directories and mesh-transformer-jax's."""
