# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Datasets around a dataset, for teachers that are asked about its images."""
