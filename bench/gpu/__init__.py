"""`python -m bench gpu`: proves, measures and trains on a GPU in minutes, from a packed folder.

`pack` lays down beside the checkout what a bare machine lacks; `run` runs the parts `right`,
`fast` and `learn`, each in a process of its own with a limit of time. What a part finds is a line
of `results.jsonl` at once, so that a part that fails, hangs or is killed loses nothing of it.
"""
