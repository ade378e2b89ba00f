"""Processes, files and the machine, independent of models."""
