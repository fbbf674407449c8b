# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Measured claims: a script for each question, and the modules that these share."""
