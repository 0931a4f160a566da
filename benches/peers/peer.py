"""One peer, one workload, one process: loads a checkpoint, generates greedily from token-id prompts
with the end token ignored, prints one JSON line. Prefill ends when the first new tokens are there.

    peer.py prompts OUT COUNT LENGTH VOCAB          make the prompts (seeded token ids, one JSON a line)
    peer.py convert CHECKPOINT OUT                  make CTranslate2's copy of a checkpoint (float16)
    peer.py run ENGINE DTYPE THREADS BATCH GEN PROMPTS MODEL [--memory BYTES --folder DIR]
    peer.py products DTYPE THREADS SHAPES ROWS      times linear layers of PyTorch alone, as they are and
                                                    with oneDNN's own layout of the weights

ENGINE is transformers, ctranslate2 or accelerate (transformers with Accelerate's disk offload).
"""

import json
import os
import random
import sys
import time

SPECIAL = {0: "<s>", 1: "<pad>", 2: "</s>", 3: "<unk>"}


def token(i):
    return SPECIAL.get(i, f"t{i}")


def status_bytes(key):
    with open("/proc/self/status") as f:
        line = next(line for line in f if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def forget_peak():
    """From here on VmHWM is the peak of what follows."""
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        pass  # then the peak includes loading, which can only be to this process's disadvantage


def make_prompts(out, count, length, vocab):
    draw = random.Random(7)
    with open(out, "w") as f:
        for _ in range(count):
            ids = [draw.randrange(4, vocab) for _ in range(length)]
            f.write(json.dumps({"prompt": ids}) + "\n")


class Vocabulary:
    """All that CTranslate2's converter asks of a tokenizer; prompts are ids here."""

    bos_token = eos_token = "</s>"
    unk_token = "<unk>"

    def __init__(self, size):
        self.size = size

    def get_vocab(self):
        return {token(i): i for i in range(self.size)}


def convert(checkpoint, out):
    import transformers
    from ctranslate2.converters import TransformersConverter

    size = transformers.AutoConfig.from_pretrained(checkpoint).vocab_size
    transformers.AutoTokenizer.from_pretrained = lambda *a, **k: Vocabulary(size)
    TransformersConverter(checkpoint, load_as_float16=True, low_cpu_mem_usage=True).convert(
        out, quantization="float16", force=True
    )


def greedy(model, prompts, gen):
    """Prefill, then one token at a time: what `generate` does, without its bookkeeping."""
    import torch

    ids = torch.tensor(prompts)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        tokens = [out.logits[:, -1].argmax(-1)]
        prefill = time.perf_counter() - start
        for _ in range(gen - 1):
            out = model(
                input_ids=tokens[-1][:, None], past_key_values=out.past_key_values, use_cache=True
            )
            tokens.append(out.logits[:, -1].argmax(-1))
    decode = time.perf_counter() - start - prefill
    return prefill, decode, torch.stack(tokens, 1).tolist()


def torch_model(engine, dtype, threads, model, options):
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    kwargs = {}
    if engine == "accelerate":
        kwargs = {
            "device_map": "auto",
            "max_memory": {"cpu": options["memory"]},
            "offload_folder": options["folder"],
            "offload_state_dict": False,
        }
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), low_cpu_mem_usage=True, **kwargs
    )
    return loaded.eval()


def away(loaded):
    """What Accelerate keeps on disk."""
    homes = list(getattr(loaded, "hf_device_map", {}).values())
    return f"{homes.count('disk')} of {len(homes)} modules on disk"


def run_ctranslate2(dtype, threads, model, prompts, gen):
    import ctranslate2

    generator = ctranslate2.Generator(
        model, device="cpu", compute_type=dtype, inter_threads=1, intra_threads=threads
    )

    def once(prompts, gen):
        first = []

        def seen(step):
            if not first:
                first.append(time.perf_counter())
            return False

        words = [[token(i) for i in ids] for ids in prompts]
        start = time.perf_counter()
        results = generator.generate_batch(
            words,
            max_batch_size=0,
            max_length=gen,
            min_length=gen,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=seen,
        )
        end = time.perf_counter()
        return first[0] - start, end - first[0], [r.sequences_ids[0] for r in results]

    once([p[:8] for p in prompts], 2)
    forget_peak()
    return once(prompts, gen)


def run(engine, dtype, threads, batch, gen, prompts_file, model, options):
    threads, batch, gen = int(threads), int(batch), int(gen)
    with open(prompts_file) as f:
        prompts = [json.loads(line)["prompt"] for line in f][:batch]
    os.environ["OMP_NUM_THREADS"] = str(threads)
    note = None
    if engine == "ctranslate2":
        prefill, decode, tokens = run_ctranslate2(dtype, threads, model, prompts, gen)
    else:
        loaded = torch_model(engine, dtype, threads, model, options)
        if engine == "accelerate":
            note = away(loaded)
        else:
            greedy(loaded, [p[:8] for p in prompts], 2)
        forget_peak()
        prefill, decode, tokens = greedy(loaded, prompts, gen)
    assert [len(line) for line in tokens] == [gen] * batch
    result = {
        "prefill_s": prefill,
        "decode_s": decode,
        "peak_bytes": status_bytes("VmHWM"),
        "tokens": tokens,
        "away": note,
    }
    print(json.dumps(result))


def best_s(layers, x):
    """The best of many runs, each with the next of several layers, so that weights come from memory."""
    for layer in layers:
        layer(x)
    best, run, start = float("inf"), 0, time.perf_counter()
    while run < 2 * len(layers) or time.perf_counter() - start < 0.5:
        layer = layers[run % len(layers)]
        before = time.perf_counter()
        layer(x)
        best, run = min(best, time.perf_counter() - before), run + 1
    return best


def products(dtype, threads, shapes, row_counts):
    """Prints {"INPUTSxOUTPUTS M": [seconds as it is, seconds in oneDNN's layout]}; shapes as 2048x8192,…"""
    import torch

    torch.set_num_threads(int(threads))
    kind, results, ops = getattr(torch, dtype), {}, torch.ops.mkldnn
    counts = [int(rows) for rows in row_counts.split(",")]
    for shape in shapes.split(","):
        inputs, outputs = map(int, shape.split("x"))
        copies = max(2, (1 << 30) // (inputs * outputs * kind.itemsize))
        weights = [torch.rand(outputs, inputs).to(kind) for _ in range(copies)]
        for rows in counts:
            x = torch.rand(rows, inputs).to(kind)
            plain = [lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights]
            laid = [ops._reorder_linear_weight(w, rows) for w in weights]
            packed = [lambda x, w=w: ops._linear_pointwise(x, w, None, "none", [], "") for w in laid]
            with torch.inference_mode():
                results[f"{shape} {rows}"] = [best_s(plain, x), best_s(packed, x)]
            del laid, packed
    print(json.dumps(results))


def main(words):
    command, *rest = words
    options = {}
    while "--memory" in rest or "--folder" in rest:
        at = next(i for i, w in enumerate(rest) if w.startswith("--"))
        name, value = rest[at][2:], rest[at + 1]
        options[name] = int(value) if name == "memory" else value
        del rest[at : at + 2]
    match command:
        case "prompts":
            make_prompts(rest[0], *map(int, rest[1:]))
        case "convert":
            convert(*rest)
        case "run":
            run(*rest, options)
        case "products":
            products(*rest)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
