"""DPOP inside other libraries' trainers. Nothing here is imported unless asked for: each file needs its library."""
