"""Use of an export: sampling, answers of the other heads, serving over HTTP, lm-eval."""
