"""Run the parts of a benchmark one after the other, each in a process of its own with a time limit.

A part is a generator: it takes the command's settings and yields pieces, dictionaries, of what it
finds. A part that hangs, crashes or raises spoils no other, and what it had found by then is kept.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path


def tidy(value):
    """Round floats to 4 digits, and write those that JSON does not have as text."""
    if isinstance(value, dict):
        return {str(key): tidy(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value


def tell(name, part, args):
    """Run a part in this process, printing what it has found as it grows: whether it went well."""
    found = dict(part=name, quick=args.quick)
    try:
        for piece in part(args):
            found.update(piece)
            print(json.dumps(tidy(found)), flush=True)
    except Exception as error:  # whatever it is, the line has to come
        traceback.print_exc()
        found.update(error=f"{type(error).__name__}: {str(error)[:300]}")
        print(json.dumps(tidy(found)), flush=True)
    return "error" not in found


def watch(name, command, limit):
    """Run a command that prints the lines of a part and end it after `limit` seconds: the last.

    Returns it, and the SystemExit that SIGTERM raised meanwhile, or None.
    """
    begin, found, cut, ended = time.perf_counter(), dict(part=name), False, None
    # Files, not pipes: what outlives the command (a notebook's kernel) would hold a pipe open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            cut = True
        except SystemExit as stop:  # SIGTERM: what was found has to be told all the same
            cut, ended = True, stop
        finally:  # with all that it has started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        out.seek(0), err.seek(0)
        for line in out:
            with contextlib.suppress(ValueError):  # a step's own lines, or one that was cut
                row = json.loads(line)
                found = row if isinstance(row, dict) and row.get("part") == name else found
        if cut:
            found["cut"] = f"after {time.perf_counter() - begin:.0f} s"
        elif status and "error" not in found:
            last = (err.read().strip().splitlines() or [""])[-1]
            found["error"] = f"ended with status {status}: {last[-300:]}"
    return {**found, "seconds": time.perf_counter() - begin}, ended


def run_all(names, parts, args, say):
    """Run parts (names of `parts`) one by one and `say` the line of each: whether all went well."""
    begin, told = time.perf_counter(), []
    more = ["--data", args.data] + ["--quick"] * args.quick
    for name in names:
        left = args.budget - (time.perf_counter() - begin)
        line, ended = dict(part=name, cut=f"the budget of {args.budget:g} s is spent"), None
        if left > 0:
            command = [sys.executable, sys.argv[0], "--part", name, *more]
            line, ended = watch(name, command, min(parts[name][1], left))
        told.append(line)
        say(line)
        if ended:
            raise ended
    ends = {kind: [line["part"] for line in told if kind in line] for kind in ("error", "cut")}
    times = {line["part"]: line.get("seconds", 0.0) for line in told}
    say(dict(part="summary", total=time.perf_counter() - begin, seconds=times, **ends))
    return not ends["error"]


def main(parts, description, gpu=True):
    """Run what the command line asks for of parts: {name: (function, seconds it may take)}.

    gpu: whether there is one; without it --quick has to be asked for. Exits with status 1 where a
    part failed.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--parts", default=",".join(parts), help="parts to run, comma-separated")
    parser.add_argument("--part", choices=parts, help="run this one, in this process")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--data", default="data", help="where batches of CIFAR-10 lie, if at all")
    parser.add_argument("--out", default="", help="a file that also gets the lines")
    parser.add_argument("--budget", type=float, default=590, help="seconds for all parts together")
    args = parser.parse_args()
    if args.part:
        sys.exit(not tell(args.part, parts[args.part][0], args))
    if unknown := set(names := args.parts.split(",")) - set(parts):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}: take of {', '.join(parts)}")
    if not (gpu or args.quick):
        parser.error("there is no GPU here: give --quick to see that the parts run")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part in hand ends too
    if args.out:
        Path(args.out).write_text("", encoding="utf-8")

    def say(line):
        text = json.dumps(tidy(line))
        print(text, flush=True)
        if args.out:
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(f"{text}\n")

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TMPDIR"] = folder  # what a part leaves when it is cut goes with it
        sys.exit(not run_all(names, parts, args, say))
