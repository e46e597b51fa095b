"""What holds when something breaks: processes, GPU slots, servers that are away."""
