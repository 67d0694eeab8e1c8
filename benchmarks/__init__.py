"""Measurements, their records, and the report that README and docs are generated from."""
