"""Studies: questions that were asked once, kept so that their answers can be checked."""
