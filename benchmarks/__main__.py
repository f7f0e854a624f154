"""`python -m benchmarks`: lists the benchmarks, runs one, or makes tables and plots of what was recorded."""

from __future__ import annotations

import importlib
import sys

from benchmarks import report
from benchmarks.lib import registry

USAGE = """\
python -m benchmarks list                 # what there is and what it measures
python -m benchmarks run NAME [OPTION...] # appends to benchmarks/results; --help lists the options of NAME
python -m benchmarks report [--check]     # tables, plots and quoted numbers from the records"""


def main(arguments: list[str]) -> int:
    runs = {one.name: one for one in registry.find() if one.module}
    match arguments:
        case ["list"]:
            for one in registry.find():
                print(f"{one.name:18}{one.measures}" + ("" if one.module else " (not run here)"))
            return 0
        case ["run", name, *options] if name in runs:
            return importlib.import_module(runs[name].module).main(options) or 0
        case ["report", *options]:
            return report.main(options)
    print(USAGE + f"\n\nNAME: {', '.join(runs)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
