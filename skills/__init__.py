"""The ground: what a skill is, how it is packed, signed, described and asked for. Imports nothing heavy."""

__version__ = "0.1.0"
