"""All that talks to torch.distributed. Everything else takes a `World`.

Networks stay plain modules: gradients are averaged, and optimizer state divided, from outside.
"""
