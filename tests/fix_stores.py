"""Pytest plugin: stores of every kind."""
