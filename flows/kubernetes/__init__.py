"""Kubernetes: training as TrainJobs, flows as pods. Nothing else imports this room."""
