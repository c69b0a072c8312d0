"""Tasks, one file per head: encoding, loss sum and count, metrics; build.py is the only place that chooses."""
