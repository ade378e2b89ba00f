"""Processes, files and the machine: knows nothing of models."""
