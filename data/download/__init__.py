"""From lists to pictures and the fate of every row."""
