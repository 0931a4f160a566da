"""Drives the rows of run.sh: prepares models, runs each row in a process of its own, interleaved over
rounds, and prints one table with ratios to the best peer of the same precision."""

import argparse
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

from machine import Failed, confined, cores
from table import MIB, ROWS, Table, show_failed, tried, whole

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
WORK = ROOT / "target/peers"
LOADMASTER = pathlib.Path(os.environ["LOADMASTER"]).absolute()
STREAMING = pathlib.Path(os.environ["STREAMING"]).absolute()
KERNELS = pathlib.Path(os.environ["KERNELS"]).absolute()
WHOLE_CGROUP = "bf16-in-all-of-cgroup"
# As benches/kernels.rs has it: where a ceiling changes by more, ratios within the run say nothing.
STEADY = 0.2

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
        "--threads",
        help="swept, best taken (default: all CPUs of this process, and half of them; for loadmaster its own default)",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--repeat-under", type=float, default=20, help="seconds; longer rows run once a number of threads"
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
    args.ours_list = args.threads_list if args.threads else [None]
    args.rows = args.rows.split(",")
    return args


def call(words, **more):
    """stdout of a command that did its work."""
    words = [str(w) for w in words]
    try:
        ended = subprocess.run(words, capture_output=True, text=True, **more)
    except subprocess.SubprocessError as why:
        raise Failed(f"{' '.join(words)}\n{why}") from why
    if ended.returncode:
        lines = [" ".join(words), *ended.stderr.splitlines(), fate(ended.returncode)]
        raise Failed("\n".join(line for line in lines if line.strip()))
    return ended.stdout


def fate(code):
    if code == -signal.SIGKILL:
        return "killed (SIGKILL), as the kernel does where memory runs out"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


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
    said = json.loads(report.read_text())
    measured = said["measured"]
    results = sorted(map(json.loads, out.read_text().splitlines()), key=lambda r: r["index"])
    return {
        "prefill_s": measured["prefill_s"],
        "decode_s": measured["decode_s"],
        "peak_bytes": measured["tiers"]["cpu"]["peak_bytes"],
        "tokens": [r["token_ids"] for r in results],
        "threads": said["plan"]["policy"]["threads"],
    }


def ceilings():
    """The machine's own limits, now."""
    out = call([STREAMING, "ceilings"])
    return out.strip().splitlines()[-1]


def show_ceilings(before, names):
    """The machine's limits before and now, above a table of what depends on those of these names."""
    after = tried({}, "ceilings", ceilings) or "not known"
    print(f"this machine before: {before}\nand after:           {after}")
    print(f"void where {' or '.join(names)} changes by more than {100 * STEADY:.0f} % between the two, or is under "
          f"{1 - STEADY} of what this machine has shown at other times")  # fmt: skip
    for name in names:
        found = re.findall(f"{name} ([0-9.]+)", f"{before}; {after}")
        low, high = sorted(map(float, found)) if len(found) == 2 else (0, 1)
        if low < (1 - STEADY) * high:
            change = f"changed by {100 * (1 - low / high):.0f} %" if low else "is not known before and after"
            print(f"-- VOID: {name} {change}")


def versions():
    names = [line.split("==") for line in (HERE / "requirements.txt").read_text().split() if "==" in line]
    return ", ".join(f"{name} {version}" for name, version in names)


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
    file = prompts(source, max(args.batches), args.prompt_len)
    table = Table(args.gen_len)
    shape = "--percent 0 100 0 100 0 100 --num-gpu-batches 1 --gpu-batch-size"

    def once(row, batch, asked):
        engine, how, _ = ROWS[row]
        if engine == "loadmaster":
            threads = f"--threads {asked}" if asked else ""
            return loadmaster(source, file, batch, args.gen_len, f"{shape} {batch} {how} {threads}")
        model = converted(args.model, source) if engine == "ctranslate2" else source
        text = peer("run", engine, how, asked, batch, args.gen_len, file, model, env=environment())
        return dict(last_line(text), threads=asked)

    def prepare(row):
        """Converts, or packs and for each number of threads probes where there is no profile."""
        if ROWS[row][0] == "ctranslate2":
            converted(args.model, source)
        for asked in args.ours_list if ROWS[row][0] == "loadmaster" else []:
            once(row, 1, asked)

    rows = list(known_rows(args.rows))
    for row in rows:
        tried(table.failed, row, lambda row=row: prepare(row))
    before = ceilings()
    sweep(args, [row for row in rows if row not in table.failed], table, once)
    print(f"{args.model}, {args.prompt_len} + {args.gen_len} tokens, greedy, end token ignored; {versions()}")
    show_ceilings(before, ["FMA"])
    table.show(args.batches, rows)
    table.show_best(args.batches, rows)
    return show_failed(table.failed)


def sweep(args, rows, table, once):
    """Every row on every number of threads, then again on those that may be its best."""
    for round_ in range(args.rounds):
        for batch in args.batches:
            for row in rows:
                threads = args.ours_list if ROWS[row][0] == "loadmaster" else args.threads_list
                for asked in table.again(row, batch, args.repeat_under) if round_ else threads:
                    run = table.take(once, row, batch, asked)
                    if run:
                        print(f"round {round_ + 1} {row} batch {batch} threads {run['threads']}: "
                              f"{whole(run):.2f} s", file=sys.stderr)  # fmt: skip


def last_line(text):
    return json.loads(text.strip().splitlines()[-1])


def offload(args):
    memory = int(args.weights_memory * (1 << 30))
    # Both run in this much, files that they read included.
    limit = memory + (2 << 30)
    ROWS["accelerate"] = ("accelerate", "bfloat16", "bf16")
    table = Table(args.gen_len)
    with contextlib.nullcontext() if args.unconfined else confined(limit) as inside:
        source = checkpoint(args.model, "bf16")
        weights = sum(f.stat().st_size for f in source.glob("*.safetensors"))
        ours = offload_rows(100 * memory / weights)
        for name, flags in ours:
            ROWS[name] = ("loadmaster", flags, "bf16")  # these weights are bf16, whoever multiplies them
        before = ceilings()
        offload_rounds(args, (source, memory, limit), inside, ours, table)
    group = f"in a memory cgroup of {limit >> 20} MiB" if inside else "in NO memory cgroup: page cache is not limited"
    print(f"{args.model}, {weights / 1e9:.1f} GB of bf16 weights, {args.prompt_len} + {args.gen_len} tokens; "
          f"{versions()}; {group}")  # fmt: skip
    show_ceilings(before, ["FMA", "disk read"])
    names = ["accelerate", *(name for name, _ in ours)]
    table.show(args.batches, names)
    table.show_best(args.batches, names)
    return show_failed(table.failed)


def offload_rounds(args, place, inside, ours, table):
    source, memory, limit = place
    file = prompts(source, max(args.batches), args.prompt_len)

    def accelerate(_, batch, threads):
        words = ["run", "accelerate", "bfloat16", threads, batch, args.gen_len, file, source,
                 "--memory", memory, "--folder", WORK / "offload"]  # fmt: skip
        start = time.time()
        run = last_line(peer(*words, env=environment(), preexec_fn=inside))
        print(f"accelerate batch {batch}: {whole(run):.1f} s ({time.time() - start:.0f} s with loading), "
              f"{run['away']}", file=sys.stderr)  # fmt: skip
        return dict(run, threads=threads)

    for batch in args.batches * args.rounds:
        run = table.take(accelerate, "accelerate", batch, cores())

        def mine(name, batch, _, run=run):
            if name != WHOLE_CGROUP and not run:
                raise Failed("its budget is Accelerate's peak, which failed")
            budget = (limit if name == WHOLE_CGROUP else run["peak_bytes"]) // MIB
            shape = f"--gpu-batch-size {batch} --num-gpu-batches 1 --cpu-mem {budget}MiB"
            return loadmaster(source, file, batch, args.gen_len, f"{shape} {ROWS[name][1]}", inside)

        # Packed by now, or packed here; where that fails the rows say so.
        tried({}, "packing", lambda: loadmaster(source, file, 1, 1, ""))
        for name, _ in ours:
            table.take(mine, name, batch, None)


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
    rates, failed, before = {}, {}, ceilings()

    def torch(dtype, threads):
        found = json.loads(peer("products", dtype, threads, args.shapes, args.product_rows))
        for what, pair in found.items():
            for name, seconds in zip(["torch", "oneDNN's layout"], pair):
                rates.setdefault((what, dtype, name), []).append(rate(what, seconds))

    def ours(dtype, threads):
        words = [KERNELS, {"float32": "gemm-f16", "bfloat16": "gemm-bf16"}[dtype]]
        words += [f"shapes={args.shapes}", f"rows={args.product_rows}", *([f"threads={threads}"] if threads else [])]
        for inputs, outputs, m, ms in GEMM.findall(call(words)):
            what = f"{inputs}x{outputs} {m}"
            rates.setdefault((what, dtype, "loadmaster"), []).append(rate(what, float(ms) / 1e3))

    for round_ in range(args.rounds):
        for dtype in ["float32", "bfloat16"]:
            for threads in args.threads_list:
                tried(failed, f"torch {dtype} threads {threads}", lambda: torch(dtype, threads))
            for threads in args.ours_list:
                tried(failed, f"loadmaster {dtype} threads {threads}", lambda: ours(dtype, threads))
            print(f"round {round_ + 1} {dtype}", file=sys.stderr)
    print(f"linear layers, {versions()}; the best run of each process, best of {args.rounds} rounds and all threads")
    show_ceilings(before, ["FMA"])
    show_products(rates)
    return show_failed(failed)


def show_products(rates):
    print(f"{'inputs x outputs, rows':24} {'class':9} {'torch':>8} {'oneDNN':>8} {'loadmaster':>10}  GFLOP/s, x the better")
    for what in dict.fromkeys(what for what, _, _ in rates):
        for dtype in ["float32", "bfloat16"]:
            names = ["torch", "oneDNN's layout", "loadmaster"]
            torch, packed, ours = (max(rates.get((what, dtype, name), [float("nan")])) for name in names)
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
        sys.exit(work(asked))
    except Failed as why:
        sys.exit(str(why))
