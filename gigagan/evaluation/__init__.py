"""How good the pictures are: distances between sets, agreement with captions, one result file."""
