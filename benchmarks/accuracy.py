# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Does a teacher make the student better? Paired runs on real images, plain and distilled, seed by seed.

Usage:
    python benchmarks/accuracy.py source=path/to/idx/files
    python benchmarks/accuracy.py train=100 epochs=20 seeds=0,1,2,3,4 variants="plain,distilled,temperature=2"

Arguments, as key=value: the settings here and in paired_runs.py, and any training or distillation argument for the
students. `dataset` is `fashion-mnist` or scikit-learn's `digits`; `source` is a folder with Fashion-MNIST's four
`*-ubyte.gz` files, without which torchvision downloads them. `teacher` is a `.pt`; by default one is trained, once. A
variant is `plain`, `distilled` (all defaults) or such arguments, separated by spaces. Results are written after every
run, and an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, read_settings
from benchmarks.paired_runs import RUN_SETTINGS, compare, parse_variants

SETTINGS = {
    **RUN_SETTINGS,
    "variants": "plain,distilled,response_distill=False,feature_distill=False,attention_distill=False",
    "output": str(RESULTS / "accuracy.json"),
}


def main(arguments: list[str]) -> None:
    """Run the benchmark with `key=value` arguments."""
    settings, given = read_settings(arguments, __doc__, SETTINGS)
    compare(settings, given, parse_variants(settings["variants"], {}, {"plain": None}))


if __name__ == "__main__":
    main(sys.argv[1:])
