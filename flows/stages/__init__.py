"""The six stages as flows, and the pipeline that runs them in order."""
