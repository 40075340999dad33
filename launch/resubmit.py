"""`tandem resubmit`: the same run again, after its job has ended."""

import argparse
import dataclasses
from pathlib import Path

from launch import cluster as clusters
from launch import folders, state, submit
from launch.state import Status
from trainer import config as configuration
from trainer.errors import shown

HELP = """\
Submit runs again whose job has ended: the code and the config of the submission before, not those of today, going on
from the newest checkpoint. Of a sweep those of its runs that are neither done nor on their way, each as a job of its
own.
"""
EXAMPLE = """\
examples:
  tandem resubmit runs/vaegan_fashion
  tandem resubmit runs/vaegan_fashion cluster.time=2-00 --cluster configs/cluster/slurm.yaml
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tandem resubmit",
        description=HELP,
        epilog=EXAMPLE,
        usage="tandem resubmit RUN [RUN ...] [cluster.key=value ...] [--cluster FILE] [--force]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a submitted run, or of a sweep")
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="another than before")
    parser.add_argument("--force", action="store_true", help="also where RUN/failed says that nobody should")
    options = parser.parse_args(argv)
    words = [word for word in options.runs if word.startswith(submit.CLUSTER) and "=" in word]
    given, own = [Path(word) for word in options.runs if word not in words], submit.sorted_words(words)[1]
    if not given:
        raise ValueError("command line: no run; see `tandem resubmit --help`")
    found, notes = state.look(folders.chosen(given))
    for note in notes:
        raise ValueError(note)
    several = len(found) > 1
    sent = 0
    for one in found:
        refusal = refused(one, force=options.force)
        if refusal is None:
            number, job, run = again(one.run, options.cluster, own, command=["tandem", "resubmit", *argv])
            print(submit.told(job, number, run), flush=True)
            sent += 1
        elif several:
            print(shown(f"{one.run}: {refusal}"))
        else:
            raise ValueError(f"run: {one.run} {refusal}")
    return 0 if sent or all(one.state == "done" or one.active for one in found) else 2


def refused(one: Status, *, force: bool) -> str | None:
    """Why a run is not to be submitted again."""
    if not (one.run / "submit" / "job.json").exists():
        return "was not submitted; `tandem submit` or `tandem train` with its config goes on"
    if one.active:
        return f"is on its way: {one.state}"
    if one.state == "unknown":
        return f"may be on its way: {one.why}"
    if one.state == "done":
        return "is done; for more, `tandem submit` with larger `images`"
    marked = folders.first_line(one.run / "failed")
    if marked is not None and not force:
        return f"is marked as failed ({marked}); read {one.run / 'failed'}, mend it, then --force"
    return None


def again(run: Path, cluster: Path | None, own: list[str], *, command: list[str]) -> tuple[str, submit.AnyJob, Path]:
    """Submits it; (SLURM's id, the job, the run)."""
    about = folders.read_json(run / "submit" / "job.json")
    config = configuration.load(run / "submit" / "config.yaml", [])
    asked = clusters.load(cluster or run / "submit" / "cluster.yaml", own)
    config = dataclasses.replace(config, run=run.resolve() if not run.is_absolute() else run)
    job = submit.plan(config, asked, folder=Path(about["folder"]))
    (run / "failed").unlink(missing_ok=True)  # there is one only with --force
    return submit.submit(job, config, command=command, again=True), job, run
