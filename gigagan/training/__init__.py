"""Training: the loop, one step, and what makes a run resumable. No Prefect, no downloads."""
