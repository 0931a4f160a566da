"""Makes tests/goldens: small OPT checkpoints of every switch and file format, what transformers
generates from them in float32, and what its tokenizers make of texts.

    python tests/make_goldens.py            (torch, transformers, safetensors, numpy)

The versions used are noted in tests/goldens/versions.json. Every weight comes from a seed; the seed
is searched so that greedy text is varied and never hangs on a near tie.
"""

import collections
import hashlib
import json
import pathlib
import shutil

import numpy
import safetensors
import safetensors.torch
import tokenizers
import torch
import transformers
from transformers import GPT2Tokenizer, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).parent / "goldens"
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
PROMPT_LENGTHS = [1, 4, 11, 23, 40]
GENERATED = 12
LEAST_DISTINCT = 8
LEAST_GAP = 1e-3  # between the best two logits, as a share of the largest magnitude

# name: switches of the configuration; how the file is written.
MODELS = {
    "opt-like": (dict(hidden_size=64, num_attention_heads=4, ffn_dim=256), dict(dtype="f16")),
    "post-norm-projections": (
        dict(hidden_size=64, num_attention_heads=4, ffn_dim=256, word_embed_proj_dim=32, do_layer_norm_before=False),
        dict(dtype="f16", format="bin", prefix="decoder."),
    ),
    "wide-embedding": (
        dict(hidden_size=48, num_attention_heads=2, ffn_dim=160, word_embed_proj_dim=96),
        dict(dtype="bf16", shards=3),
    ),
    "no-bias": (dict(hidden_size=64, num_attention_heads=2, ffn_dim=144, enable_bias=False), dict(dtype="f32")),
    "no-affine": (
        dict(hidden_size=80, num_attention_heads=4, ffn_dim=200, layer_norm_elementwise_affine=False),
        dict(dtype="f16", format="bin"),
    ),
    "gelu": (
        dict(hidden_size=64, num_attention_heads=4, ffn_dim=192, activation_function="gelu"),
        dict(dtype="f16", format="bin", shards=2),
    ),
    "untied": (
        dict(hidden_size=64, num_attention_heads=4, ffn_dim=256, tie_word_embeddings=False),
        dict(dtype="f16", shards=2),
    ),
    "untied-post-norm": (
        dict(
            hidden_size=48, num_attention_heads=3, ffn_dim=192, tie_word_embeddings=False, do_layer_norm_before=False
        ),
        dict(dtype="bf16", format="bin"),
    ),
    "no-final-norm": (
        dict(hidden_size=64, num_attention_heads=4, ffn_dim=256, _remove_final_layer_norm=True),
        dict(dtype="f16", prefix="decoder."),
    ),
    "galactica-like": (
        dict(
            hidden_size=96, num_attention_heads=3, ffn_dim=384, activation_function="gelu", enable_bias=False,
            vocab_size=500, bos_token_id=0,
        ),
        dict(dtype="f16", format="bin", parameters=True),
    ),
    "head-80": (
        dict(hidden_size=160, num_attention_heads=2, ffn_dim=200, vocab_size=300),
        dict(dtype="f16", format="bin", head="lm_head"),
    ),
    "head-20": (
        dict(hidden_size=100, num_attention_heads=5, ffn_dim=132, vocab_size=333),
        dict(dtype="f32", format="bin"),
    ),
    "head-16": (
        dict(hidden_size=48, num_attention_heads=3, ffn_dim=80, num_hidden_layers=3),
        dict(dtype="bf16", prefix="decoder."),
    ),
    "iml-like": (
        dict(hidden_size=128, num_attention_heads=4, ffn_dim=256, vocab_size=600, max_position_embeddings=128),
        dict(dtype="f16", head="lm_head"),
    ),
    "shared-and-strided": (
        dict(hidden_size=32, num_attention_heads=2, ffn_dim=128, num_hidden_layers=3),
        dict(dtype="f16", format="bin", head="both", views=True),
    ),
    "wide-small-tensors": (
        dict(hidden_size=72, num_attention_heads=3, ffn_dim=300),
        dict(dtype="f16", small_dtype="f32", note_dtype=False),
    ),
}


def configuration(switches):
    common = dict(
        vocab_size=320, num_hidden_layers=2, max_position_embeddings=64, dropout=0.0, pad_token_id=1, bos_token_id=2,
        eos_token_id=2, architectures=["OPTForCausalLM"],
    )
    return OPTConfig(**{**common, **switches})


def fill(model, seed, dtype, small_dtype):
    """Weights like trained ones: norms near one, biases not zero, every value exact in its format."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda shape, mean, deviation: torch.randn(shape, generator=generator) * deviation + mean
    for name, parameter in sorted(model.named_parameters()):
        shape = parameter.shape
        if name.endswith("layer_norm.weight"):
            values = normal(shape, 1.0, 0.15)
        elif name.endswith("bias"):
            values = normal(shape, 0.0, 0.1)
        elif "embed_positions" in name:
            # Strong enough that a text does not run in circles.
            values = normal(shape, 0.0, 0.3)
        elif "embed_tokens" in name or "lm_head" in name:
            values = normal(shape, 0.0, 0.1)
        else:
            values = normal(shape, 0.0, 1.5 / shape[1] ** 0.5)
        kept = dtype if values.dim() == 2 else small_dtype
        parameter.data.copy_(values.to(kept).float())


@torch.no_grad()
def greedy(model, prompt):
    """Ids and last-position logits, the prompt alone, without padding, end token ignored."""
    ids, logits, past, step = [], [], None, torch.tensor([prompt])
    for _ in range(GENERATED):
        out = model(input_ids=step, past_key_values=past, use_cache=True)
        past, last = out.past_key_values, out.logits[0, -1].float()
        logits.append(last)
        ids.append(int(last.argmax()))
        step = torch.tensor([[ids[-1]]])
    return ids, torch.stack(logits)


def is_varied(ids, logits):
    best = logits.topk(2, dim=1).values
    gap = (best[:, 0] - best[:, 1]) / logits.abs().max(dim=1).values
    return len(set(ids)) >= LEAST_DISTINCT and bool((gap > LEAST_GAP).all())


def search(config, dtype, small_dtype):
    for seed in range(1, 2000):
        torch.manual_seed(seed)
        # Its own initialisation fails where norms have no weight; every value is filled in below.
        with transformers.modeling_utils.no_init_weights():
            model = OPTForCausalLM._from_config(config, attn_implementation="eager").float().eval()
        model.tie_weights()
        is_tied = model.lm_head.weight is model.model.decoder.embed_tokens.weight
        assert is_tied == config.tie_word_embeddings
        fill(model, seed, dtype, small_dtype)
        chooser = numpy.random.default_rng(seed)
        prompts = [chooser.integers(4, config.vocab_size, length).tolist() for length in PROMPT_LENGTHS]
        prompts[1][0] = config.bos_token_id
        runs = []
        for prompt in prompts:
            runs.append(greedy(model, prompt))
            if not is_varied(*runs[-1]):
                break
        else:
            return seed, model, prompts, runs
    raise SystemExit("no seed gives varied text")


def renamed(model, how):
    """The state dict under the names and in the shape that this file is to have."""
    tensors = collections.OrderedDict()
    head = how.get("head", "embed_tokens")
    tied = model.config.tie_word_embeddings
    for name, value in model.state_dict().items():
        if tied and name == "lm_head.weight" and head == "embed_tokens":
            continue
        if tied and name.endswith("embed_tokens.weight") and head == "lm_head":
            continue
        kept = how["dtype"] if value.dim() == 2 else how.get("small_dtype", how["dtype"])
        if how.get("prefix") == "decoder.":
            name = name.removeprefix("model.")
        tensors[name] = value.to(DTYPES[kept]).contiguous()
    return tensors


def with_views(tensors):
    """The same values as views: of one storage, transposed, with a gap between rows, every second element."""
    out = collections.OrderedDict(tensors)
    for name, value in tensors.items():
        if name.endswith("q_proj.weight"):
            names = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
            joined = torch.cat([tensors[part] for part in names])
            for part, view in zip(names, joined.chunk(3)):
                out[part] = view
        elif name.endswith("fc1.weight"):
            out[name] = value.t().contiguous().t()
        elif name.endswith("fc2.weight"):
            out[name] = torch.cat([value, torch.full_like(value, 9.0)], dim=1)[:, : value.shape[1]]
        elif name.endswith("out_proj.weight"):
            out[name] = torch.repeat_interleave(value, 2, dim=1)[:, ::2]
        elif name.endswith("fc1.bias"):
            out[name] = torch.repeat_interleave(value, 3)[::3]
    out["lm_head.weight"] = out["model.decoder.embed_tokens.weight"]
    return out


def save(tensors, how, folder):
    torch_format = how.get("format") == "bin"
    stem, ending = ("pytorch_model", "bin") if torch_format else ("model", "safetensors")
    if how.get("views"):
        tensors = with_views(tensors)
    if how.get("parameters"):
        tensors = collections.OrderedDict((n, torch.nn.Parameter(v, requires_grad=False)) for n, v in tensors.items())

    def write(part, name):
        if torch_format:
            torch.save(part, folder / name)
        else:
            safetensors.torch.save_file(dict(part), folder / name, metadata={"format": "pt"})
            (folder / name).chmod(0o644)

    shards = how.get("shards", 1)
    if shards == 1:
        return write(tensors, f"{stem}.{ending}")
    names, index = list(tensors), {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05}-of-{shards:05}.{ending}"
        part = collections.OrderedDict((n, tensors[n]) for n in names[shard::shards])
        index.update({n: file for n in part})
        write(part, file)
    total = sum(value.numel() * value.element_size() for value in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    (folder / f"{stem}.{ending}.index.json").write_text(text)


def make_model(name, switches, how):
    config = configuration(switches)
    dtype = DTYPES[how["dtype"]]
    seed, model, prompts, runs = search(config, dtype, DTYPES[how.get("small_dtype", how["dtype"])])
    # An end token that some of these texts do reach, at different steps, and others do not.
    end = runs[2][0][6]
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = 1
    cases, everything = [], []
    for prompt, (ids, logits) in zip(prompts, runs):
        given = torch.tensor([prompt])
        mask = torch.ones_like(given)
        out = model.generate(given, attention_mask=mask, do_sample=False, max_new_tokens=GENERATED)
        stopped = out[0, len(prompt):].tolist()
        assert stopped == ids[: len(stopped)] and (stopped[-1] == end or len(stopped) == GENERATED)
        cases.append({"prompt": prompt, "ids": ids, "stopped_ids": stopped})
        everything.append(logits.numpy().astype("<f4"))
    folder = HERE / "models" / name
    folder.mkdir(parents=True)
    config.eos_token_id = end
    if how.get("note_dtype", True):
        config.dtype = dtype
    keys = config.to_diff_dict()
    if how.get("note_dtype", True):
        keys["torch_dtype"] = str(dtype).removeprefix("torch.")
    keys.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(keys, indent=1, sort_keys=True) + "\n")
    save(renamed(model, how), how, folder)
    digest = lambda value: hashlib.sha256(value.float().contiguous().numpy().astype("<f4").tobytes()).hexdigest()
    golden = {
        "seed": seed, "vocab": config.vocab_size, "eos_id": end, "cases": cases,
        "logits": "logits.bin: f32 little-endian, case by case, step by step, vocabulary",
        "tensors_sha256_as_f32": {n: digest(v) for n, v in model.state_dict().items()},
    }
    (folder / "golden.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    (folder / "logits.bin").write_bytes(b"".join(part.tobytes() for part in everything))
    lengths = [len(case["stopped_ids"]) for case in cases]
    print(f"{name:24} seed {seed:4} end {end:4} stopped after {lengths}")


CORPUS = """
The loadmaster plans where the load goes, so that the aircraft flies balanced; then the loadmaster flies with it.
What does not fit in the hold goes by road. A plan that is written down can be compared with the flight.
It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.
They're sure that we've seen what he'd said: it's 10 o'clock, I'll go, don't wait. 1234567890 3.14159 2026-11-23.
def main():\n    for i in range(100):\n\tprint(i, i ** 2)\n    return {"key": [1, 2, 3], 'other': None}\n
Der schnelle braune Fuchs springt über den faulen Hund. Größe, Übermut, Straße, Äpfel und Öl.
Le cœur a ses raisons que la raison ne connaît point. L'été dernier, à l'hôtel, ça allait très bien.
El niño comió una manzana; ¿qué pasó después? ¡Nada! Mañana será otro día.
Съешь же ещё этих мягких французских булок, да выпей чаю. Широкая электрификация южных губерний.
敏捷的棕色狐狸跳过了懒狗。今天天气很好,我们去公园散步吧。
いろはにほへと ちりぬるを わかよたれそ つねならむ。カタカナとひらがなと漢字。
키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.
نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر ومغلف بجلد أزرق.
דג סקרן שט בים מאוכזב ולפתע מצא לו חברה. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.
ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश करने वाले विष्णुवतार भगवान।
😀 😃 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 ❤️ ✈️ 🚚 — “quotes” ‘single’ … • © ® ™ € £ ¥ ½ ² ∑ ∫ √ ≤ ≥ ≠ → ⇒ ∞
"""


def texts():
    lines = [line for line in CORPUS.split("\n") if line]
    out = ["", " ", "  ", "\n", "\r\n", "\t", "a", " a", "a ", "  a  b   c    ", "\n\n\na\n\n b \n", "x" * 500, " " * 64]
    out += ["é", "e\u0301", "\u00a0", "\u200b", "\ufeffbom", "\u3000全角", "\U0001f600", "\u0000", "a\u0000b", "\u007f"]
    out += ["</s>", "</s></s>", "a</s>b", " </s> ", "<pad>", "x<pad>y", "<s>", "<unk>", "<mask>", "</s", "< /s>", "</S>"]
    out += ["it's", "IT'S", "they'll we've I'd you're I'm don't", "''s", "'", "\u2019s", "x's'd", "1's"]
    out += ["3.14159", "1,234,567", "0x1F", "-1e-10", "12345678901234567890", "٣٤٥", "Ⅻ", "①②"]
    out += ["line\r\nline\r\n", "tab\tsep\t\tarated", "trailing   ", "   leading", "a  \n  b", "\x0b\x0c", "\u2028\u2029"]
    out += ["http://example.org/a?b=c&d=%20#e", "user@example.com", "C:\\temp\\x", "a_b-c.d/e", "!!!???...", "(((([[[[{{{{"]
    out += lines + [line.upper() for line in lines] + [line.lower() for line in lines]
    out += [line[3:] for line in lines] + [" " + line for line in lines] + [line + "\r\n" for line in lines]
    out += [line.replace(" ", "  ") for line in lines] + [line.replace(" ", "\n") for line in lines]
    out += ["</s>".join(line.split(" ")[:4]) for line in lines] + [line[::-1] for line in lines]
    out.append("\n".join(lines))
    out.append(" ".join(lines) * 3)
    chooser = numpy.random.default_rng(5)
    letters = sorted(set(CORPUS))
    for length in range(1, 120):
        out.append("".join(letters[i] for i in chooser.integers(0, len(letters), length % 40 + 1)))
    return list(dict.fromkeys(out))


def trained(pre_tokenizer, specials, vocab):
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = pre_tokenizer
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS.split("\n"), trainer)
    return bpe


def cases_of(encode, decode, list_of_texts):
    rows = []
    for text in list_of_texts:
        ids = encode(text)
        rows.append({"text": text, "ids": ids, "decoded": decode(ids)})
    return rows


def make_tokenizers():
    pre = tokenizers.pre_tokenizers
    folder = HERE / "tokenizer-opt"
    folder.mkdir(parents=True)
    opt = trained(pre.ByteLevel(add_prefix_space=False), ["<s>", "<pad>", "</s>", "<unk>"], 700)
    opt.model.save(str(folder))
    slow = GPT2Tokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), errors="replace", unk_token="</s>", bos_token="</s>",
        eos_token="</s>", pad_token="<pad>", add_prefix_space=False, add_bos_token=True,
    )
    rows = cases_of(slow.encode, lambda ids: slow.decode(ids, skip_special_tokens=True), texts())
    (folder / "cases.json").write_text(json.dumps({"vocab": 700, "cases": rows}) + "\n")
    folder = HERE / "tokenizer-galactica"
    folder.mkdir(parents=True)
    specials = ["<s>", "<pad>", "</s>", "<unk>", "[START_REF]", "[END_REF]", "<work>", "</work>"]
    split = [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    galactica = trained(pre.Sequence(split), specials, 600)
    galactica.save(str(folder / "tokenizer.json"), pretty=False)
    fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    more = ["A [START_REF] Paper, Author [END_REF] 2017", "<work>12 + 30 = 42</work>", "[START_REF]", "[START_REF"]
    decode = lambda ids: fast.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    rows = cases_of(fast.encode, decode, more + texts()[:150])
    (folder / "cases.json").write_text(json.dumps({"vocab": 600, "cases": rows}) + "\n")
    print(f"tokenizers: {len(texts())} and {len(rows)} texts")


def main():
    torch.set_num_threads(1)
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    modules = [torch, transformers, tokenizers, safetensors, numpy]
    versions = {module.__name__: module.__version__ for module in modules}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
    for name, (switches, how) in MODELS.items():
        make_model(name, switches, how)
    make_tokenizers()


if __name__ == "__main__":
    main()
