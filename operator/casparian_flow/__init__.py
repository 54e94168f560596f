"""Casparian Flow: every file version read once, by signed code, with lineage behind each row."""

__version__ = "0.1.0"
