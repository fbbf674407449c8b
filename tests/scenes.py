"""Arguments of short runs on scenes of digits, for detectors and what is built on them."""

TASKS = ("detect", "segment", "pose", "obb")
SETTINGS = {
    **{"imgsz": 64, "batch": 8, "nbs": 8, "epochs": 1, "optimizer": "AdamW", "lr0": 0.002, "plots": False},
    **{"device": "cpu", "workers": 0, "verbose": False},
}
STILL = {"mosaic": 0.0, "fliplr": 0.0, "scale": 0.0, "translate": 0.0}
