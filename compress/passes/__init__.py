"""The passes, one a file: each takes a state and returns a new one. `compress/pipeline.py` holds what they share."""
