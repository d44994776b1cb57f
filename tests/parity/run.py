"""All cases in one column: `python -m parity.run COLUMN METHOD` prints {case: outcome} as JSON."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
import warnings

from parity import endings, failures, features, objects
from parity.columns import column


def main() -> None:
    name, method = sys.argv[1:]
    warnings.simplefilter("ignore")
    # What the threads of broken pools print is not what is compared.
    report = os.fdopen(os.dup(1), "w")
    errors = os.fdopen(os.dup(2), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    subject = column(name, method)
    modules = (objects, failures, features, endings) if method == "fork" else (objects,)
    try:
        found = {case: outcome for module in modules for case, outcome in module.cases(subject)}
    except BaseException:
        traceback.print_exc(file=errors)
        errors.flush()
        raise
    print(*endings.ERRORS, sep="\n", file=errors, flush=True)
    json.dump(found, report)
    report.flush()
    for package in ("multiprocessing", "multiprocess"):
        for child in importlib.import_module(package).active_children():
            child.kill()
    os._exit(0)  # whatever thread of a broken pool still runs


if __name__ == "__main__":
    main()
