"""What MLflow is told: runs, lineage, the registry and its champion."""
