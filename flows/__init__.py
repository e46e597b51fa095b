"""WHEN: the order of the stages, how they are launched and recorded. No maths, no parsing."""
