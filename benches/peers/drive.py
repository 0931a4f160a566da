"""Drives the rows of run.sh: prepares models, runs each row in a process of its own, interleaved over
rounds, and prints one table with ratios to the best peer of the same precision."""

import argparse
import contextlib
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time

from machine import Failed, confined, cores

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
WORK = ROOT / "target/peers"
LOADMASTER = pathlib.Path(os.environ["LOADMASTER"]).absolute()
STREAMING = pathlib.Path(os.environ["STREAMING"]).absolute()
KERNELS = pathlib.Path(os.environ["KERNELS"]).absolute()
MIB = 1 << 20
WHOLE_CGROUP = "bf16-in-all-of-cgroup"

# row: (engine, its precision there, precision class that ratios compare within)
ROWS = {
    "transformers-bf16": ("transformers", "bfloat16", "bf16"),
    "transformers-fp32": ("transformers", "float32", "fp32"),
    "ctranslate2-float32": ("ctranslate2", "float32", "fp32"),
    "ctranslate2-int8": ("ctranslate2", "int8", "int8"),
    "loadmaster-exact": ("loadmaster", "", "fp32"),
    "loadmaster-bf16": ("loadmaster", "--compute bf16", "bf16"),
    "loadmaster-4bit": ("loadmaster", "--compress-weight 1", "int8"),
}

# Options that not every table knows: the resident rows', Accelerate's offload, single products.
ONLY = {
    "--model": {"resident", "--offload"},
    "--batch": {"resident", "--offload"},
    "--prompt-len": {"resident", "--offload"},
    "--gen-len": {"resident", "--offload"},
    "--rows": {"resident"},
    "--repeat-under": {"resident"},
    "--threads": {"resident", "--products"},
    "--weights-memory": {"--offload"},
    "--unconfined": {"--offload"},
    "--shapes": {"--products"},
    "--product-rows": {"--products"},
}


def arguments():
    parser = argparse.ArgumentParser(
        prog="benches/peers/run.sh", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--model", default="opt-1.3b")
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--gen-len", type=int, default=32)
    parser.add_argument("--rows", default=",".join(ROWS), help="some of " + ", ".join(ROWS))
    parser.add_argument(
        "--threads", help="swept for the peers, best taken (default: all CPUs of this process, and half of them)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--repeat-under", type=float, default=20, help="seconds; longer rows run once"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--offload", action="store_true", help="Accelerate's disk offload instead")
    parser.add_argument(
        "--weights-memory", type=float, default=1, help="GiB of weights that Accelerate keeps in DRAM"
    )
    parser.add_argument(
        "--unconfined", action="store_true", help="offload without a control group: page cache is not limited"
    )
    instead.add_argument(
        "--products", action="store_true", help="single linear layers beside PyTorch's instead"
    )
    parser.add_argument("--shapes", default="2048x8192,8192x2048,7168x7168")
    parser.add_argument("--product-rows", default="1,8,64,512")
    args = parser.parse_args()
    table = "--offload" if args.offload else "--products" if args.products else "resident"
    for name in (word.split("=")[0] for word in sys.argv[1:]):
        if table not in ONLY.get(name, {table}):
            parser.error(f"{name} means nothing with {table}" if args.offload or args.products
                         else f"{name} goes with {' or '.join(sorted(ONLY[name]))}")  # fmt: skip
    args.batches = [int(b) for b in args.batch.split(",")]
    threads = args.threads or f"{cores()},{max(cores() // 2, 1)}"
    args.threads_list = list(dict.fromkeys(int(t) for t in threads.split(",")))
    args.rows = args.rows.split(",")
    return args


def call(words, **more):
    """stdout of a command; its failure is this script's."""
    ended = subprocess.run([str(w) for w in words], capture_output=True, text=True, **more)
    if ended.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{ended.stderr}")
    return ended.stdout


def peer(*words, **more):
    return call([sys.executable, HERE / "peer.py", *words], **more)


def environment():
    return dict(os.environ, LOADMASTER_HOME=str(WORK / "home"), TOKENIZERS_PARALLELISM="false")


def checkpoint(model, dtype):
    """Random weights in the real file format, made once."""
    out = WORK / f"{model}-{dtype}"
    if not out.exists():
        print(f"writing {out.relative_to(ROOT)}", file=sys.stderr)
        call([LOADMASTER, "synth", model, "--dtype", dtype, "--out", out])
    return out


def converted(model, source):
    out = WORK / f"{model}-ctranslate2"
    if not out.exists():
        print(f"converting for CTranslate2: {out.relative_to(ROOT)}", file=sys.stderr)
        peer("convert", source, out, env=environment())
    return out


def prompts(model_dir, count, length):
    vocab = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    out = WORK / f"prompts-{count}-{length}-{vocab}.jsonl"
    peer("prompts", out, count, length, vocab)
    return out


def loadmaster(model_dir, prompts_file, batch, gen, flags, inside=None):
    """One run of `loadmaster run`; a first, untimed one has packed and probed."""
    lines = WORK / f"lines-{batch}.jsonl"
    with open(prompts_file) as f:
        lines.write_text("".join(f.readlines()[:batch]))
    report, out = WORK / "report.json", WORK / "out.jsonl"
    call(
        [LOADMASTER, "run", "--model", model_dir, "--input", lines, "--gen-len", gen,
         "--ignore-eos", "--report", report, "--output", out, "--overwrite", *flags.split()],
        env=environment(), preexec_fn=inside,
    )  # fmt: skip
    measured = json.loads(report.read_text())["measured"]
    results = sorted(map(json.loads, out.read_text().splitlines()), key=lambda r: r["index"])
    return {
        "prefill_s": measured["prefill_s"],
        "decode_s": measured["decode_s"],
        "peak_bytes": measured["tiers"]["cpu"]["peak_bytes"],
        "tokens": [r["token_ids"] for r in results],
    }


def ceilings():
    """The machine's own limits, now."""
    out = call([STREAMING, "ceilings"])
    return out.strip().splitlines()[-1]


def versions():
    names = [line.split("==") for line in (HERE / "requirements.txt").read_text().split() if "==" in line]
    return ", ".join(f"{name} {version}" for name, version in names)


class Table:
    """Runs by (row, batch), each a list of measurements at the best thread count."""

    def __init__(self, gen):
        self.gen = gen
        self.runs = {}
        self.threads = {}

    def add(self, row, batch, threads, run):
        known = self.threads.get((row, batch))
        if known is None or threads == known:
            self.threads[row, batch] = threads
            self.runs.setdefault((row, batch), []).append(run)
        elif whole(run) < min(map(whole, self.runs[row, batch])):
            self.threads[row, batch] = threads
            self.runs[row, batch] = [run]

    def median(self, row, batch):
        runs = self.runs[row, batch]
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
        reference = self.runs.get(("transformers-fp32", batch))
        if not reference:
            return "-"
        pairs = [
            (a, b)
            for mine, theirs in zip(self.runs[row, batch][0]["tokens"], reference[0]["tokens"])
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
            f"\n{'row':20} {'batch':>5} {'thr':>3} {'prefill s':>9} {'decode s':>8} {'dec tok/s':>9} "
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
            best[row] = max(rates, default=(0, 0))
        for row, (rate, batch) in best.items():
            same = [r for r in rows if ROWS[r][2] == ROWS[row][2] and ROWS[r][0] != "loadmaster"]
            peer_rate = max((best[r][0] for r in same), default=0)
            ratio = f", {rate / peer_rate:.2f} x the best peer's" if peer_rate else ""
            print(f"best batch of {row}: {batch}, {rate:.2f} tok/s{ratio}")

    def line(self, row, batch):
        m = self.median(row, batch)
        text = (
            f"{row:20} {batch:5} {self.threads[row, batch]:3} {m['prefill']:9.3f} {m['decode']:8.3f} "
            f"{m['decode_rate']:9.2f} {m['rate']:7.2f} {m['peak']:8.0f} "
            f"{len(self.runs[row, batch]):4} {self.same(row, batch):>5}"
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


def known_rows(rows):
    """Rows whose flags this build has."""
    have = call([LOADMASTER, "run", "--help"])
    for row in rows:
        engine, flags, _ = ROWS[row]
        if engine == "loadmaster" and not all(w in have for w in flags.split() if w != "1"):
            print(f"{row}: this build has no {flags}", file=sys.stderr)
        else:
            yield row


def resident(args):
    source = checkpoint(args.model, "f16")
    rows = list(known_rows(args.rows))
    other = converted(args.model, source) if any("ctranslate2" in r for r in rows) else None
    file = prompts(source, max(args.batches), args.prompt_len)
    table = Table(args.gen_len)
    shape = "--percent 0 100 0 100 0 100 --num-gpu-batches 1 --gpu-batch-size"

    def once(row, batch, threads):
        engine, how, _ = ROWS[row]
        if engine == "loadmaster":
            return loadmaster(source, file, batch, args.gen_len, f"{shape} {batch} {how}")
        model = other if engine == "ctranslate2" else source
        text = peer(
            "run", engine, how, threads, batch, args.gen_len, file, model, env=environment()
        )
        return json.loads(text.strip().splitlines()[-1])

    for row in rows:
        if ROWS[row][0] == "loadmaster":
            once(row, 1, None)  # packs, and probes where there is no profile
    limits = [ceilings()]
    slow = set()
    for round_ in range(args.rounds):
        for batch in args.batches:
            for row in rows:
                ours = ROWS[row][0] == "loadmaster"
                known = table.threads.get((row, batch))
                sweep = [cores()] if ours else [known] if known else args.threads_list
                for threads in [] if (row, batch) in slow else sweep:
                    run = once(row, batch, threads)
                    table.add(row, batch, threads, run)
                    print(f"round {round_ + 1} {row} batch {batch} threads {threads}: "
                          f"{whole(run):.2f} s", file=sys.stderr)  # fmt: skip
                    if whole(run) > args.repeat_under:
                        slow.add((row, batch))
                        break  # fewer threads would take longer still
    limits.append(ceilings())
    print(f"{args.model}, {args.prompt_len} + {args.gen_len} tokens, greedy, end token ignored; {versions()}")
    print(f"this machine before: {limits[0]}\nand after:           {limits[1]}")
    table.show(args.batches, rows)
    table.show_best(args.batches, rows)


def offload(args):
    memory = int(args.weights_memory * (1 << 30))
    # Both run in this much, files that they read included.
    limit = memory + (2 << 30)
    with contextlib.nullcontext() if args.unconfined else confined(limit) as inside:
        source = checkpoint(args.model, "bf16")
        weights = sum(f.stat().st_size for f in source.glob("*.safetensors"))
        group = f"in a memory cgroup of {limit >> 20} MiB" if inside else "in NO memory cgroup: page cache is not limited"
        print(f"{args.model}, {weights / 1e9:.1f} GB of bf16 weights, {args.prompt_len} + {args.gen_len} tokens; "
              f"{versions()}; {group}")  # fmt: skip
        limits = [ceilings()]
        ROWS["accelerate"] = ("accelerate", "bfloat16", "bf16")
        ours = offload_rows(100 * memory / weights)
        for name, flags in ours:
            ROWS[name] = ("loadmaster", flags, "bf16")  # these weights are bf16, whoever multiplies them
        table = offload_rounds(args, (source, memory, limit), inside, ours)
    limits.append(ceilings())
    print(f"this machine before: {limits[0]}\nand after:           {limits[1]}")
    names = ["accelerate", *(name for name, _ in ours)]
    table.show(args.batches, names)
    table.show_best(args.batches, names)


def offload_rounds(args, place, inside, ours):
    source, memory, limit = place
    file = prompts(source, max(args.batches), args.prompt_len)
    table = Table(args.gen_len)
    for batch in args.batches * args.rounds:
        words = ["run", "accelerate", "bfloat16", cores(), batch, args.gen_len, file, source,
                 "--memory", memory, "--folder", WORK / "offload"]  # fmt: skip
        start = time.time()
        run = json.loads(peer(*words, env=environment(), preexec_fn=inside).strip().splitlines()[-1])
        print(f"accelerate batch {batch}: {whole(run):.1f} s ({time.time() - start:.0f} s with loading), "
              f"{run['away']}", file=sys.stderr)  # fmt: skip
        table.add("accelerate", batch, cores(), run)
        peak = run["peak_bytes"] // MIB
        loadmaster(source, file, 1, 1, "")  # packed by now, or packed here
        for name, flags in ours:
            budget = limit // MIB if name == WHOLE_CGROUP else peak
            shape = f"--gpu-batch-size {batch} --num-gpu-batches 1 --cpu-mem {budget}MiB"
            run = loadmaster(source, file, batch, args.gen_len, f"{shape} {flags}", inside)
            table.add(name, batch, cores(), run)
    return table


def offload_rows(percent):
    """With the peer's peak RSS as the budget; besides with no more of the weights in DRAM than it has (a little
    less, so that the buffers fit beside them); and with all memory that the peer and its page cache may take. Never
    in 4 bits, which the peer has not."""
    same = f"--percent 0 {0.95 * percent:.1f} 0 100 0 100"
    rows = [("loadmaster-exact", ""), ("same-weights-in-DRAM", same)]
    have = call([LOADMASTER, "run", "--help"])
    if "bf16" in have:
        rows.append(("loadmaster-bf16", "--compute bf16"))
        rows.append((WHOLE_CGROUP, "--compute bf16"))
    return [(name, f"{flags} --compress never") for name, flags in rows]


GEMM = re.compile(r"gemm +\S+ \S+ +(\d+)->(\d+) +M=(\d+) +([0-9.]+) ms")


def products(args):
    """Products of fp16 or bf16 weights: PyTorch's linear layer, the same in oneDNN's layout, loadmaster's."""
    rates, limits = {}, [ceilings()]
    for round_ in range(args.rounds):
        for dtype, section in [("float32", "gemm-f16"), ("bfloat16", "gemm-bf16")]:
            for threads in args.threads_list:
                found = json.loads(peer("products", dtype, threads, args.shapes, args.product_rows))
                for what, pair in found.items():
                    for name, seconds in zip(["torch", "oneDNN's layout"], pair):
                        rates.setdefault((what, dtype, name), []).append(rate(what, seconds))
            words = [KERNELS, section, f"shapes={args.shapes}", f"rows={args.product_rows}"]
            for inputs, outputs, m, ms in GEMM.findall(call(words)):
                what = f"{inputs}x{outputs} {m}"
                rates.setdefault((what, dtype, "loadmaster"), []).append(rate(what, float(ms) / 1e3))
            print(f"round {round_ + 1} {dtype}", file=sys.stderr)
    limits.append(ceilings())
    print(f"linear layers, {versions()}; the best run of each process, best of {args.rounds} rounds and all threads")
    print(f"this machine before: {limits[0]}\nand after:           {limits[1]}")
    print(f"{'inputs x outputs, rows':24} {'class':9} {'torch':>8} {'oneDNN':>8} {'loadmaster':>10}  GFLOP/s, x the better")
    for what in dict.fromkeys(what for what, _, _ in rates):
        for dtype in ["float32", "bfloat16"]:
            names = ["torch", "oneDNN's layout", "loadmaster"]
            torch, packed, ours = (max(rates[what, dtype, name]) for name in names)
            ratio = ours / max(torch, packed)
            print(f"{what:24} {dtype:9} {torch:8.0f} {packed:8.0f} {ours:10.0f}  {ratio:.2f}")


def rate(what, seconds):
    """GFLOP/s of a product named "INPUTSxOUTPUTS ROWS"."""
    inputs, outputs, rows = map(int, re.split("[x ]", what))
    return 2 * inputs * outputs * rows / seconds / 1e9


if __name__ == "__main__":
    asked = arguments()
    # So that what a row runs in is given back.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    work = products if asked.products else offload if asked.offload else resident
    try:
        work(asked)
    except Failed as why:
        sys.exit(str(why))
