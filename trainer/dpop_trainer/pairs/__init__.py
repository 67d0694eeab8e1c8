"""Building preference pairs that differ in a single place, from data that has only good answers."""
