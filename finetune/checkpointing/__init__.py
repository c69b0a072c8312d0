"""Checkpoints: the format on disk, saving and resuming, and the faults that tests inject."""
