"""The memory planner: the ZeRO stage, offload and micro-batch that fit, without torch or weights.

Read in this order: job.py (inputs), states.py (exact), activations.py and estimate.py (estimates),
choose.py (the options, the choice, advice), show.py (for people). machine.py measures, shape.py
reads a model's config.json.
"""
