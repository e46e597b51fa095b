"""From pictures to scores: what frozen models say of each picture and caption."""
