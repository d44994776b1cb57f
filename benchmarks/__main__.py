"""`python -m benchmarks`: runs the families, writes the table, the figures and the charts."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

import click

from benchmarks import report
from benchmarks.measure import Bench, Plan

# In the order of the table.
FAMILIES = (
    "floor",
    "fetch",
    "follow",
    "names",
    "queues",
    "arrays",
    "parked",
    "pool",
    "startup",
    "restart",
    "memory",
    "scaling",
)
ROOT = Path(__file__).parent.parent


@click.command()
@click.argument("families", nargs=-1, type=click.Choice(FAMILIES))
@click.option("--quick", is_flag=True, help="Tiny counts: to see that it works, not how fast.")
@click.option("--rounds", type=int, help="How often each side has its turn.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to write; benchmarks/ and docs/img/, if everything is run.",
)
def main(families: tuple[str, ...], quick: bool, rounds: int | None, out: Path | None) -> None:
    """Measures fdshare beside its peers: all FAMILIES, or those named."""
    plan = Plan(rounds=1, slice=0.001, scale=0.01) if quick else Plan()
    if rounds:
        plan = Plan(rounds, plan.slice, plan.scale)
    started = time.monotonic()
    chosen = families or FAMILIES
    with report.progress(len(chosen)) as show:
        bench = Bench(plan, show.tell)
        for family in chosen:
            measure(bench, family)
            show.done(family, bench)
    seconds = time.monotonic() - started
    report.print_table(bench, seconds)
    if out is not None:
        report.write(bench, seconds, out, out)
    elif not families and not quick:
        report.write(bench, seconds, ROOT / "benchmarks", ROOT / "docs" / "img")


def measure(bench: Bench, family: str) -> None:
    module = importlib.import_module(f"benchmarks.{family}")
    with bench.of(family):
        module.run(bench)


if __name__ == "__main__":
    sys.exit(main())
