"""Where outputs lie: keys, folders and URLs, leases, and keeping house."""
