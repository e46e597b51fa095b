"""From kept rows to shards of training pictures, and from shards to batches."""
