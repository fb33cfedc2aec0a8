"""The encoder computes what Hugging Face's computes, reads what it writes, and believes no file before it is checked."""
import json
import math
import struct
from pathlib import Path

import pytest
import torch
from model import (Bert, BertConfig, BertForMaskedLM, Dropout, InputError, RunError, SelfAttention,
                   find_pretrained, load_pretrained, query_positions, read_safetensors, save_pretrained, to_hf, wordpiece_tokenizer,
                   write_atomic, write_safetensors)
from record_reference import inputs

REFERENCE = Path(__file__).parent / "data" / "reference"
CASES = [(kind, head) for kind in ("bert", "distilbert") for head in ("mlm", "classification")]


def load(kind, head):
    model, tokenizer = load_pretrained(REFERENCE / f"{kind}-{head}", head=head)
    batch = inputs()
    if kind == "distilbert":
        del batch["token_type_ids"]
    return model.eval(), tokenizer, batch, read_safetensors(REFERENCE / f"{kind}-{head}" / "answers.safetensors")


def small(**fields) -> BertConfig:
    return BertConfig(**{"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                         "intermediate_size": 24, "max_position_embeddings": 32, **fields})


# --- the same numbers as the reference implementation ----------------------------------------------------------------

@pytest.mark.parametrize("kind, head", CASES)
def test_logits_and_hidden_states_are_the_recorded_ones(kind, head):
    model, _, batch, answers = load(kind, head)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        logits, hidden = model(**batch), model.bert(**batch)
    if head == "mlm":
        logits, answers["logits"] = logits[real], answers["logits"][real]  # nobody reads padding
    torch.testing.assert_close(logits, answers["logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden[real], answers["hidden"][real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind, head", CASES)
def test_what_we_save_the_reference_opens(kind, head, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokenizer, batch, answers = load(kind, head)
    save_pretrained(model, tokenizer, tmp_path)
    auto = {"mlm": transformers.AutoModelForMaskedLM,
            "classification": transformers.AutoModelForSequenceClassification}[head]
    theirs = auto.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).logits, answers["logits"], atol=1e-5, rtol=1e-5)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("w1 w54 nonsense")["input_ids"]
    assert ids == [2, 6, 59, 1, 3]


@pytest.mark.parametrize("kind, head", CASES)
def test_save_then_load_gives_the_same_weights(kind, head, tmp_path):
    model, tokenizer, _, _ = load(kind, head)
    save_pretrained(model, tokenizer, tmp_path)
    again, _ = load_pretrained(tmp_path, head=head)
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


# --- fewer operations, the same numbers ------------------------------------------------------------------------------

@pytest.mark.parametrize("padded", [False, True])
def test_fused_attention_is_the_formula(padded):
    torch.manual_seed(0)
    attention, hidden = SelfAttention(small()).eval(), torch.randn(3, 7, 16)
    key_mask = (torch.arange(7) < torch.tensor([[7], [4], [1]]))[:, None, None] if padded else None
    fused = attention(hidden, key_mask)
    attention.fused = False
    torch.testing.assert_close(fused, attention(hidden, key_mask), atol=1e-6, rtol=1e-5)


def test_attention_by_hand():
    """One head of width 1, two tokens, identity projections: softmax([1·1, 1·2]) over values 1, 2."""
    attention = SelfAttention(small(hidden_size=1, num_attention_heads=1)).eval()
    for linear, rows in ((attention.qkv, 3), (attention.output, 1)):
        linear.weight.data, linear.bias.data = torch.ones(rows, 1), torch.zeros(rows)
    got = attention(torch.tensor([[[1.0], [2.0]]]))[0, 0, 0].item()
    assert got == pytest.approx((math.e * 1 + math.e ** 2 * 2) / (math.e + math.e ** 2), rel=1e-6)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_scales_the_rest(p):
    torch.manual_seed(0)
    x = torch.full((1001, 37), 3.0, requires_grad=True)
    y = Dropout(p)(x)
    y.sum().backward()
    dropped = y == 0
    torch.testing.assert_close(y[~dropped], torch.full_like(y[~dropped], 3 / (1 - p)), atol=0, rtol=1e-4)
    torch.testing.assert_close(x.grad, y.detach() / 3)
    assert abs(dropped.float().mean() - p) < 4 * math.sqrt(p * (1 - p) / x.numel())
    ahead = dropped.flatten()[:-1] & dropped.flatten()[1:]  # neighbours share a draw, and fall independently
    assert abs(ahead.float().mean() - p * p) < 5 * math.sqrt(p * p / x.numel())
    rows = dropped.flatten()[:x.numel() // 4 * 4].view(-1, 4).float().mean(0)  # each of the four coins of a draw
    assert ((rows - p).abs() < 5 * math.sqrt(4 * p * (1 - p) / x.numel())).all()


@pytest.mark.parametrize("p, kept", [(0.0, 1.0), (1.0, 0.0)])
def test_dropout_of_nothing_and_of_everything(p, kept):
    x = torch.ones(5, 3)
    torch.testing.assert_close(Dropout(p)(x), kept * x)
    torch.testing.assert_close(Dropout(p).eval()(x), x)


@pytest.mark.parametrize("padded", [False, True])
def test_head_and_last_block_on_masked_rows_only_change_nothing(padded):
    """Logits and every gradient, with rows of 0, 1 and several masked positions."""
    torch.manual_seed(0)
    model = BertForMaskedLM(small(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    batch = inputs() if padded else {"input_ids": inputs()["input_ids"]}
    positions = torch.zeros(3, 14, dtype=torch.bool)
    positions[0, [1, 5, 9]] = positions[2, 3] = True
    full = model(**batch)[positions]
    full.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    short = model(**batch, positions=positions)
    short.square().sum().backward()
    torch.testing.assert_close(short, full, atol=1e-5, rtol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


def test_bf16_stays_near_fp32():
    torch.manual_seed(0)
    model = BertForMaskedLM(small()).eval()
    plain = model(inputs()["input_ids"])
    with torch.autocast("cpu", torch.bfloat16):
        half = model(inputs()["input_ids"])
    assert half.dtype == torch.bfloat16
    assert (half.float() - plain).norm() / plain.norm() < 0.02


def test_query_positions_by_hand():
    columns, chosen = query_positions(torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]).bool())
    assert columns.shape == (3, 2) and columns[0].tolist() == [1, 3] and columns[2, 0] == 2
    assert chosen.tolist() == [0, 1, 4]


def test_inputs_embeds_replace_the_word_lookup():
    model = BertForMaskedLM(small()).eval()
    ids = inputs()["input_ids"]
    words = model.bert.embeddings.word_embeddings(ids)
    assert torch.equal(model(ids), model(inputs_embeds=words))


@pytest.mark.parametrize("name, millions", [("tiny", 4.4), ("mini", 11.2), ("small", 28.8), ("medium", 41.4),
                                            ("base", 109.5)])
def test_presets_have_the_published_sizes(name, millions):
    """Turc et al. 2019, table 1 (with the pooler, without the MLM head)."""
    with torch.device("meta"):
        count = sum(p.numel() for p in Bert(BertConfig.preset(name), pooler=True).parameters())
    assert round(count / 1e6, 1) == pytest.approx(millions, abs=0.1)


# --- checkpoints as they come ----------------------------------------------------------------------------------------

def rewrite(tmp_path, source, change):
    """A copy of a recorded checkpoint whose weights went through `change`."""
    for file in (REFERENCE / source).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = change(read_safetensors(tmp_path / "model.safetensors"))
    write_safetensors(tmp_path / "model.safetensors", weights)
    return tmp_path


def old_names(weights):
    return {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): w
            for name, w in weights.items()}


def bare(weights):
    return {name.removeprefix("bert."): w for name, w in weights.items() if name.startswith("bert.")}


def extra(weights):
    return weights | {"fit_denses.0.weight": torch.zeros(2, 2), "cls.seq_relationship.weight": torch.zeros(2, 16)}


@pytest.mark.parametrize("change, unused, missing", [
    (old_names, "", ""), (bare, "", "head.dense.weight"), (extra, "fit_denses.0.weight", "")])
def test_old_bare_and_larger_checkpoints_load_and_say_so(change, unused, missing, tmp_path, caplog):
    model, _, batch, _ = load("bert", "mlm")
    again, _ = load_pretrained(rewrite(tmp_path, "bert-mlm", change), head="mlm")
    torch.testing.assert_close(again.eval().bert(**batch), model.bert(**batch))
    assert unused in caplog.text and missing in caplog.text
    assert bool(caplog.text) == bool(unused or missing)


def test_a_pytorch_bin_is_read_as_tensors_only(tmp_path):
    model, _, batch, answers = load("bert", "mlm")
    rewrite(tmp_path, "bert-mlm", lambda weights: weights)
    torch.save(read_safetensors(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    again, _ = load_pretrained(tmp_path, head="mlm")
    torch.testing.assert_close(again.eval()(**batch), model(**batch))
    torch.save({"weights": Path("a class that code could hide in")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="plain tensors"):
        load_pretrained(tmp_path, head="mlm")


def test_a_pooler_that_is_not_there_is_named(caplog):
    load_pretrained(REFERENCE / "bert-mlm", head="classification", num_labels=2)
    assert "bert.pooler.weight" in caplog.text and "classifier.weight" in caplog.text


def test_another_number_of_labels_gets_a_fresh_head(caplog):
    model, _ = load_pretrained(REFERENCE / "bert-classification", head="classification", num_labels=5)
    assert model.classifier.out_features == 5 and "classifier.weight" in caplog.text
    same, _ = load_pretrained(REFERENCE / "bert-classification", head="classification")
    assert same.classifier.out_features == 3


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_is_what_the_caller_asks_for(dropout):
    """In the embeddings, in attention and before the classifier, whatever the checkpoint (0.1) says."""
    model, _ = load_pretrained(REFERENCE / "bert-classification", head="classification", dropout=dropout)
    ids, attention = inputs()["input_ids"], model.train().bert.layers[0].attention
    hidden = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    for module, example in ((model.bert.embeddings, ids), (attention, hidden), (model, ids)):
        assert torch.equal(module(example), module(example)) == (dropout == 0)


@pytest.mark.parametrize("name, value, said", [
    ("model_type", "roberta", "roberta"), ("hidden_act", "relu", "relu"), ("hidden_size", "16", "hidden_size"),
    ("num_attention_heads", 3, "3 heads"), ("hidden_size", 32, "word_embeddings"), ("vocab_size", 50, "word pieces"),
    ("num_hidden_layers", 4, "lack"), ("position_embedding_type", "relative_key", "relative_key")])
def test_a_config_that_does_not_fit_is_refused(name, value, said, tmp_path):
    rewrite(tmp_path, "bert-mlm", lambda weights: weights)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(InputError, match=said):
        load_pretrained(tmp_path, head="mlm")


def test_an_untied_decoder_is_refused(tmp_path):
    untie = rewrite(tmp_path, "bert-mlm", lambda weights: weights | {"cls.predictions.decoder.weight": torch.ones(60, 16)})
    with pytest.raises(InputError, match="not tied"):
        load_pretrained(untie, head="mlm")


def test_a_mistyped_path_never_goes_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/entrpy", "./bert", "../bert", "a/b/c", "bert base"):
        with pytest.raises(InputError, match="not a model directory"):
            find_pretrained(name)


def test_the_tokenizer_is_berts():
    """Wordpieces by hand: lower case, accents off, punctuation apart, longest match first."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "cafe", ",", "!"]
    tokenizer = wordpiece_tokenizer({word: i for i, word in enumerate(words)})
    assert tokenizer.encode("Unaffable, CAFÉ!").tokens == ["[CLS]", "un", "##aff", "##able", ",", "cafe", "!", "[SEP]"]
    assert tokenizer.encode("un [MASK] xyz").tokens == ["[CLS]", "un", "[MASK]", "[UNK]", "[SEP]"]


# --- safetensors: nothing is believed before it is checked -----------------------------------------------------------

def safetensors_bytes(header, body=b"", length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


GOOD = safetensors_bytes({"a": entry(), "b": entry("U8", (3,), (8, 11))}, bytes(11))
BAD = {
    "empty": b"", "cut in the length": GOOD[:4], "cut after the length": GOOD[:8], "cut in the header": GOOD[:30],
    "cut after the header": GOOD[:-11], "cut in the first tensor": GOOD[:-7], "cut between tensors": GOOD[:-3],
    "cut before the last byte": GOOD[:-1], "one byte too many": GOOD + b"\0",
    "header length 2^63": safetensors_bytes({"a": entry()}, bytes(8), 2 ** 63),
    "header length 2^64 - 1": safetensors_bytes({"a": entry()}, bytes(8), 2 ** 64 - 1),
    "header length 0": safetensors_bytes({"a": entry()}, bytes(8), 0),
    "header one byte short": safetensors_bytes({"a": entry()}, bytes(8), len(json.dumps({"a": entry()})) - 1),
    "header over 100 MB": safetensors_bytes({"a": entry()}, bytes(8), 100_000_001),
    "not JSON": safetensors_bytes(b"{nonsense", bytes(8)), "not UTF-8": safetensors_bytes(b'{"\xff": 1}', bytes(8)),
    "a list": safetensors_bytes([entry()], bytes(8)), "a number": safetensors_bytes(b"7"),
    "an entry that is no object": safetensors_bytes({"a": 7}, bytes(8)),
    "deeply nested": safetensors_bytes(b"[" * 100_000),
    "a key twice": safetensors_bytes(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
    "no dtype": safetensors_bytes({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "no shape": safetensors_bytes({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "no offsets": safetensors_bytes({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "unknown dtype": safetensors_bytes({"a": entry("F31")}, bytes(8)),
    "wrong dtype": safetensors_bytes({"a": entry("F64")}, bytes(8)),
    "a list as dtype": safetensors_bytes({"a": entry(["F32"])}, bytes(8)),
    "shape too large": safetensors_bytes({"a": entry(shape=(3,))}, bytes(8)),
    "shape that overflows": safetensors_bytes({"a": entry(shape=(2 ** 40, 2 ** 40))}, bytes(8)),
    "negative shape": safetensors_bytes({"a": entry(shape=(-1, -2))}, bytes(8)),
    "fractional shape": safetensors_bytes({"a": entry(shape=(2.0,))}, bytes(8)),
    "shape of booleans": safetensors_bytes({"a": entry("U8", (True,) * 3, (0, 1))}, bytes(1)),
    "shape that is a word": safetensors_bytes({"a": entry() | {"shape": "ab"}}, bytes(8)),
    "offsets beyond the file": safetensors_bytes({"a": entry(offsets=(8, 16))}, bytes(8)),
    "offsets backwards": safetensors_bytes({"a": entry(offsets=(8, 0))}, bytes(8)),
    "negative offsets": safetensors_bytes({"a": entry(offsets=(-8, 0))}, bytes(8)),
    "three offsets": safetensors_bytes({"a": entry(offsets=(0, 8, 8))}, bytes(8)),
    "overlap": safetensors_bytes({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "the same bytes twice": safetensors_bytes({"a": entry(), "b": entry()}, bytes(8)),
    "a gap": safetensors_bytes({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "a gap at the start": safetensors_bytes({"a": entry(offsets=(4, 12))}, bytes(12)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_safetensors_file_is_refused(name, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(BAD[name])
    with pytest.raises(InputError, match="x.safetensors is not a sound safetensors file"):
        read_safetensors(tmp_path / "x.safetensors")


def test_the_good_file_is_good(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(GOOD)
    read = read_safetensors(tmp_path / "x.safetensors")
    assert read["a"].tolist() == [0, 0] and read["b"].dtype == torch.uint8


def test_the_reference_library_reads_ours_and_we_read_its(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    tensors = {"f32": torch.randn(3, 5), "f16": torch.randn(7).half(), "bf16": torch.randn(2, 2).bfloat16(),
               "i64": torch.arange(4), "bool": torch.tensor([True, False, True]), "scalar": torch.tensor(2.5),
               "empty": torch.zeros(0, 4), "f64": torch.randn(2).double()}
    library.save_file(tensors, tmp_path / "theirs.safetensors")
    write_safetensors(tmp_path / "ours.safetensors", tensors)
    for read in (read_safetensors(tmp_path / "theirs.safetensors"), library.load_file(tmp_path / "ours.safetensors")):
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in tensors.items())


def test_hugging_face_names_are_the_recorded_ones():
    for kind, head in CASES:
        model = load(kind, head)[0]
        theirs = read_safetensors(REFERENCE / f"{kind}-{head}" / "model.safetensors")
        assert to_hf(model).keys() == theirs.keys()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "file", "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match="file cannot be written .No space left on device.: make room"):
        write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


