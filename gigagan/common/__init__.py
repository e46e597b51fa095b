"""What data, flows and networks share: files, retries, progress, settings, pictures. No torch."""
