"""What we learn from: rows of metadata → files → scored, selected shards → batches."""
