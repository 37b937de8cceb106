"""Verifying: whether a program's runs end the same wherever they are stopped."""
