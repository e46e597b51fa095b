"""What `python -m gigagan` understands, a file a command: `add` its arguments, `run` it."""
