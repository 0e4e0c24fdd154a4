"""Kills every training script at random moments, resumes it, and compares with the straight run.

python tests/kills.py [--kills 4] [--seed 0] [SCRIPT ...], 20 minutes for all: SIGKILL and SIGINT by
turns. Ends with status 1 if any number, log or sample differs, or if a file that is left cannot be
read.
"""

import argparse
import itertools
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import common
from harness import results, same

SCRIPTS = sorted(path.name for path in ROOT.glob("0[1-7]_*.py"))


def run(script, out, data):
    """A --quick run of longer training than usual, so that more than imports can be hit."""
    longer = ["--steps", "60"] if script != "03_unrolled_gan.py" else []
    return subprocess.Popen([sys.executable, ROOT / script, "--quick", "--resume", *longer,
                             "--out", out, "--data-dir", data],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(script, out, data):
    """Lets a run end; its seconds, and what it left."""
    began = time.monotonic()
    process = run(script, out, data)
    error = process.communicate()[1]
    if process.returncode:
        sys.exit(f"{script} ended with status {process.returncode}: {error}")
    return time.monotonic() - began, results(out / "quick")


def kill(script, out, data, after, sign):
    """Starts a run, kills it after so many seconds, reads what it left; False if it was over."""
    process = run(script, out, data)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(sign)
    error = process.communicate()[1]
    before = "<frozen importlib" in error or "\n    import " in error  # ours had not begun
    if "Traceback" in error and not before:
        sys.exit(f"{script}, killed by {sign.name}: {error}")
    for file in out.rglob("*.pt"):
        torch.load(file, weights_only=True)
    return process.returncode != 0


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("scripts", nargs="*", default=SCRIPTS, metavar="SCRIPT")
    p.add_argument("--kills", type=common.number(int, 1), default=4,
                   help="of each script, at least")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    rng, rows, lost = random.Random(args.seed), [], 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = folder / "data"
        common.load_digits(argparse.Namespace(data_dir=data), train=True)  # drawn once for all
        for script in args.scripts:
            seconds, straight = finish(script, folder / script / "straight", data)
            hits, lives = 0, 0
            while hits < args.kills:  # one run after the other, each killed until it is over
                out = folder / script / str(lives)
                lives += 1
                for sign in itertools.cycle([signal.SIGKILL, signal.SIGINT]):
                    if not kill(script, out, data, rng.uniform(0.3, 0.8) * seconds, sign):
                        break
                    hits += 1
                lost += not same(results(out / "quick"), straight)
            rows.append([script, f"{seconds:.0f}", str(hits), str(lives)])
            print(*rows[-1], "different so far:", lost, flush=True)
    common.print_table(["script", "seconds", "kills", "runs"], rows)
    print(f"{lost} runs ended with other numbers than the straight one")
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
