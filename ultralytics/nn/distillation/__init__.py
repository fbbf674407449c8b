# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""A trained network as a frozen function: where it comes from, how it is read, and where its answers are kept."""
