"""The one number that data and loss share."""

IGNORE = -100
"""Label of a token that is not scored."""
