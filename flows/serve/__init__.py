"""What serves: Prefect and MLflow with their workers, and what a server needs to know of us."""
