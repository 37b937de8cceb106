"""Stops: who asks a run to save itself and to end, by when, and with which status."""
