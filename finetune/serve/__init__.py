"""An OpenAI-compatible endpoint for trying a model out: requests (api), HTTP (server), start (program)."""
