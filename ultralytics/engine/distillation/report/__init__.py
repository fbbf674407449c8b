# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What a distilled run has to show: a page with charts, and the plain runs that it is compared with."""
