# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""A run in which a teacher guides a student, of any task."""
