"""Exports: write, reopen, merge and convert weights, and prove them equal to what was trained."""
