"""From scores to the rows that are kept, and why the others are not."""
