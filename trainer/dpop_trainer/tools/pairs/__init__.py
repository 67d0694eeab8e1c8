"""Preference pairs: built from data that has good answers (`dpop pairs build`), by one recipe per file."""
