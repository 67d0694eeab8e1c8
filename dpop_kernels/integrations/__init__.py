"""This package inside other libraries' trainers. Nothing here is imported unless asked for: each needs its library."""
