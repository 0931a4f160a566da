"""What the rows of drive.py have measured, as a table; a row that fails takes no other with it."""

import statistics
import sys

from machine import Failed

MIB = 1 << 20
# A number of threads that takes so many times as long as the best one is not tried again.
BEHIND = 1.3
# What a row may end with and leave the others their turn.
ENDS = (Failed, LookupError, ValueError, OSError)

# row: (engine, its precision there, precision class that ratios compare within)
ROWS = {
    "transformers-bf16": ("transformers", "bfloat16", "bf16"),
    "transformers-fp32": ("transformers", "float32", "fp32"),
    "ctranslate2-float32": ("ctranslate2", "float32", "fp32"),
    "ctranslate2-int8": ("ctranslate2", "int8", "int8"),
    "loadmaster-exact": ("loadmaster", "", "fp32"),
    # Like for like: the peers of this class keep their cache in fp32.
    "loadmaster-exact-kv32": ("loadmaster", "--kv f32", "fp32"),
    "loadmaster-bf16": ("loadmaster", "--compute bf16", "bf16"),
    "loadmaster-4bit": ("loadmaster", "--compress-weight 1", "int8"),
}


def tried(failed, what, work):
    """What `work` gives; None where it fails, which is noted in `failed` and ends nothing else."""
    try:
        return work()
    except ENDS as why:
        text = str(why) if isinstance(why, Failed) else repr(why)
        print(f"FAILED: {what}: {text}", file=sys.stderr)
        said = text.splitlines()[1:] or [text]
        failed[what] = "; ".join(said[-2:])
        return None


def show_failed(failed):
    for what, why in failed.items():
        print(f"FAILED: {what}: {why}")
    if failed:
        print("ratios are to those that ran")
    return bool(failed)


class Table:
    """Runs by (row, batch), of each number of threads asked for a list; and what failed, by name."""

    def __init__(self, gen):
        self.gen = gen
        self.runs = {}
        self.failed = {}

    def take(self, once, row, batch, asked):
        """One more run; a failure is its own alone."""
        run = tried(self.failed, named(row, batch, asked), lambda: once(row, batch, asked))
        if run:
            self.runs.setdefault((row, batch), {}).setdefault(asked, []).append(run)
        return run

    def again(self, row, batch, repeat_under):
        """Numbers of threads that another run may show to be the best, unless that takes too long."""
        took = {asked: middle(runs) for asked, runs in self.runs.get((row, batch), {}).items()}
        best = min(took.values(), default=0)
        near = [asked for asked, seconds in took.items() if seconds <= BEHIND * best]
        return [n for n in near if best <= repeat_under and named(row, batch, n) not in self.failed]

    def best(self, row, batch):
        """Runs on the number of threads that takes least."""
        return min(self.runs[row, batch].values(), key=middle)

    def median(self, row, batch):
        runs = self.best(row, batch)
        of = lambda key: statistics.median(r[key] for r in runs)  # noqa: E731
        prefill, decode = of("prefill_s"), of("decode_s")
        return {
            "prefill": prefill,
            "decode": decode,
            "rate": batch * self.gen / (prefill + decode),
            "decode_rate": batch * (self.gen - 1) / max(decode, 1e-9),
            "peak": max(r["peak_bytes"] for r in runs) / MIB,
        }

    def same(self, row, batch):
        """Share of tokens that transformers in float32 gives too."""
        if ("transformers-fp32", batch) not in self.runs:
            return "-"
        reference = self.best("transformers-fp32", batch)
        pairs = [
            (a, b)
            for mine, theirs in zip(self.best(row, batch)[0]["tokens"], reference[0]["tokens"])
            for a, b in zip(mine, theirs)
        ]
        return f"{100 * sum(a == b for a, b in pairs) / len(pairs):.0f} %"

    def best_peer(self, row, batch, key):
        kind = ROWS[row][2]
        peers = [
            self.median(other, batch)
            for other, b in self.runs
            if b == batch and ROWS[other][2] == kind and ROWS[other][0] != "loadmaster"
        ]
        pick = min if key in ("prefill", "decode", "peak") else max
        return pick((p[key] for p in peers), default=None)

    def show(self, batches, rows):
        print(
            f"\n{'row':21} {'batch':>5} {'thr':>3} {'prefill s':>9} {'decode s':>8} {'dec tok/s':>9} "
            f"{'tok/s':>7} {'peak MiB':>8} {'runs':>4} {'same':>5}   x best peer: prefill, decode, whole"
        )
        for batch in batches:
            for row in rows:
                if (row, batch) in self.runs:
                    print(self.line(row, batch))

    def show_best(self, batches, rows):
        """Each row at whichever of the batches suits it, against the best such peer of its precision."""
        best = {}
        for row in rows:
            rates = [(self.median(row, b)["rate"], b) for b in batches if (row, b) in self.runs]
            if rates:
                best[row] = max(rates)
        for row, (rate, batch) in best.items():
            same = [r for r in best if ROWS[r][2] == ROWS[row][2] and ROWS[r][0] != "loadmaster"]
            peer_rate = max((best[r][0] for r in same), default=0)
            ratio = f", {rate / peer_rate:.2f} x the best peer's" if peer_rate else ""
            print(f"best batch of {row}: {batch}, {rate:.2f} tok/s{ratio}")

    def line(self, row, batch):
        m, runs = self.median(row, batch), self.best(row, batch)
        text = (
            f"{row:21} {batch:5} {runs[0]['threads']:3} {m['prefill']:9.3f} {m['decode']:8.3f} "
            f"{m['decode_rate']:9.2f} {m['rate']:7.2f} {m['peak']:8.0f} "
            f"{len(runs):4} {self.same(row, batch):>5}"
        )
        if ROWS[row][0] == "loadmaster" and self.best_peer(row, batch, "rate"):
            best = {key: self.best_peer(row, batch, key) for key in m}
            text += (
                f"   {best['prefill'] / m['prefill']:5.2f} {best['decode'] / m['decode']:5.2f} "
                f"{m['rate'] / best['rate']:5.2f}"
            )
        return text


def whole(run):
    return run["prefill_s"] + run["decode_s"]


def middle(runs):
    return statistics.median(map(whole, runs))


def named(row, batch, asked):
    return f"{row} batch {batch}" + (f" threads {asked}" if asked else "")
