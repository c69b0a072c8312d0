"""The training loop and its guards: stop signals, run lock, hangs, failed ranks, memory that ran out."""
