"""The encoder computes what Hugging Face's computes, reads what it writes, and believes no file
before it is checked."""
import hashlib
import json
import math
import re
import struct
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from distill import kd_loss
from model import (SPECIAL_TOKENS, Bert, BertConfig, BertForMaskedLM, Block, InputError, Queries,
                   RunError, SelfAttention, find_pretrained, load_pretrained, load_tokenizer,
                   local_start, query_positions, read_safetensors, read_weights,
                   save_pretrained, to_hf, weights_digest, wordpiece_tokenizer, write_atomic,
                   write_safetensors)
from record_reference import TEXTS, inputs, write_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece

REFERENCE = Path(__file__).parent / "data" / "reference"
CASES = [(kind, head) for kind in ("bert", "distilbert") for head in ("mlm", "classification")]


def load(kind, head):
    model, tokenizer = load_pretrained(REFERENCE / f"{kind}-{head}", head=head)
    batch = inputs()
    if kind == "distilbert":
        del batch["token_type_ids"]
    answers = read_safetensors(REFERENCE / f"{kind}-{head}" / "answers.safetensors")
    return model.eval(), tokenizer, batch, answers


def small(**fields) -> BertConfig:
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 24, "max_position_embeddings": 32}
    return BertConfig(**(sizes | fields))


# --- configuration --------------------------------------------------------------------------------

@pytest.mark.parametrize("name, millions", [
    ("tiny", 4.4), ("mini", 11.2), ("small", 28.8), ("medium", 41.4), ("base", 109.5)])
def test_presets_have_the_published_sizes(name, millions):
    """Turc et al. 2019, table 1 (with the pooler, without the MLM head)."""
    with torch.device("meta"):
        count = sum(p.numel() for p in Bert(BertConfig.preset(name), pooler=True).parameters())
    assert round(count / 1e6, 1) == pytest.approx(millions, abs=0.1)


def test_every_layer_norm_has_the_configurations_epsilon():
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=8, max_position_embeddings=8, layer_norm_eps=0.125)
    norms = [m for m in BertForMaskedLM(config).modules() if isinstance(m, torch.nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [0.125] * (1 + 2 * 2 + 1)


# --- the encoder ----------------------------------------------------------------------------------

@pytest.mark.parametrize("padded", [False, True])
def test_fused_attention_is_the_formula(padded):
    torch.manual_seed(0)
    attention, hidden = SelfAttention(small()).eval(), torch.randn(3, 7, 16)
    key_mask = (torch.arange(7) < torch.tensor([[7], [4], [1]]))[:, None, None] if padded else None
    fused = attention(hidden, hidden, key_mask)
    attention.fused = False
    torch.testing.assert_close(fused, attention(hidden, hidden, key_mask), atol=1e-6, rtol=1e-5)


def attention_in_loops(attention, asking, hidden, readable):
    """Vaswani et al. 2017 §3.2 for one text, number by number: asking (M, H), hidden (L, H) and
    readable (L,) bool -> (M, H)."""
    def project(linear, x):
        return x @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy()

    q, k = project(attention.query, asking), project(attention.key, hidden)
    v = project(attention.value, hidden)
    width = q.shape[1] // attention.heads
    mixed = np.zeros_like(q)
    for head in range(attention.heads):
        columns = range(head * width, (head + 1) * width)
        for i in range(len(q)):
            strengths = []
            for j in range(len(k)):
                score = sum(q[i, c] * k[j, c] for c in columns) / math.sqrt(width)
                strengths.append(math.exp(score) if readable[j] else 0.0)
            for c in columns:
                mixed[i, c] = sum(s * v[j, c] for j, s in enumerate(strengths)) / sum(strengths)
    return project(attention.output, mixed)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("M", [5, 2])
def test_attention_is_the_papers_formula_in_loops(fused, M):
    """Two heads of width 3, five tokens, some unreadable, all or two of them asking."""
    torch.manual_seed(0)
    attention = SelfAttention(small(hidden_size=6)).eval()
    attention.fused = fused
    for p in attention.parameters():
        torch.nn.init.normal_(p)
    hidden = torch.randn(3, 5, 6)
    readable = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [0, 1, 0, 0, 0]]).bool()
    got = attention(hidden[:, -M:], hidden, readable[:, None, None])
    for b in range(3):
        numbers = hidden[b].double().numpy()
        expected = attention_in_loops(attention, numbers[-M:], numbers, readable[b])
        np.testing.assert_allclose(got[b].detach(), expected, rtol=1e-4, atol=1e-5)


def test_attention_drops_weights_and_not_what_is_read():
    """Uniform attention over 8 values of 1, dropout 1/2: a head reads 2/8 of the number of weights
    that it kept, the same in every one of its columns, and 1 on average."""
    torch.manual_seed(0)
    attention = SelfAttention(small(hidden_size=8, attention_probs_dropout_prob=0.5))
    for p in attention.parameters():
        torch.nn.init.zeros_(p)
    torch.nn.init.eye_(attention.output.weight)
    torch.nn.init.ones_(attention.value.bias)
    hidden = torch.randn(200, 8, 8)
    read = attention(hidden, hidden).unflatten(-1, (2, 4))  # (200, 8, 2 heads, 4)
    torch.testing.assert_close(read, read[..., :1].expand_as(read))
    kept = read[..., 0] * 4  # (200, 8, 2), how many of 8
    torch.testing.assert_close(kept, kept.round())
    assert len(kept.round().unique()) > 5
    assert (kept[..., 0] - kept[..., 1]).abs().max() > 0.5  # each head drops on its own
    assert kept.mean().item() == pytest.approx(4, abs=4 * math.sqrt(2 / kept.numel()))


def test_a_block_drops_what_attention_and_feed_forward_add_and_never_the_residual():
    """With everything dropped, only the two normalised residuals are left."""
    torch.manual_seed(0)
    block = Block(small(hidden_dropout_prob=1.0, attention_probs_dropout_prob=0.0))
    for p in block.parameters():
        torch.nn.init.normal_(p)
    hidden = torch.randn(3, 5, 16)
    torch.testing.assert_close(block(hidden), block.output_norm(block.attention_norm(hidden)))


def test_without_training_nothing_is_dropped():
    torch.manual_seed(0)
    model = BertForMaskedLM(small(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)).eval()
    plain = BertForMaskedLM(small(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(**inputs()), plain(**inputs()))


def test_bf16_stays_near_fp32():
    torch.manual_seed(0)
    model = BertForMaskedLM(small()).eval()
    plain = model(inputs()["input_ids"])
    with torch.autocast("cpu", torch.bfloat16):
        half = model(inputs()["input_ids"])
    assert half.dtype == torch.bfloat16
    assert (half.float() - plain).norm() / plain.norm() < 0.02


def test_inputs_embeds_replace_the_word_lookup():
    model = BertForMaskedLM(small()).eval()
    ids = inputs()["input_ids"]
    words = model.bert.embeddings.word_embeddings(ids)
    assert torch.equal(model(ids), model(inputs_embeds=words))


def test_a_text_may_fill_every_position():
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=8, max_position_embeddings=8)
    model = BertForMaskedLM(config)
    assert model(torch.ones(1, 8, dtype=torch.long)).shape == (1, 8, 20)
    with pytest.raises(InputError, match="9 tokens"):
        model(torch.ones(1, 9, dtype=torch.long))


# --- heads ----------------------------------------------------------------------------------------

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
    short = model(**batch, positions=query_positions(positions))
    short.square().sum().backward()
    torch.testing.assert_close(short, full, atol=1e-5, rtol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


MASK = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]).bool()


def test_queries_by_hand():
    columns, chosen = query_positions(MASK)
    assert columns.shape == (3, 2) and columns[0].tolist() == [1, 3] and columns[2, 0] == 2
    assert chosen.tolist() == [0, 1, 4]
    assert query_positions(MASK).pick(torch.arange(12).view(3, 4)).tolist() == [1, 3, 10]


@pytest.mark.parametrize("mask", [MASK & False, MASK[:0], MASK | True, torch.rand(9, 40) < 0.3])
def test_picking_queries_is_indexing_by_the_mask(mask):
    values = torch.randn(mask.shape)
    assert torch.equal(query_positions(mask).pick(values), values[mask])


def test_only_counting_the_queries_needs_numbers_from_the_device():
    """Meta tensors have shapes and no numbers: what would make a program wait for a GPU raises."""
    queries, ids = query_positions(MASK), torch.zeros(3, 4, dtype=torch.long)
    queries, ids = Queries(*(x.to("meta") for x in queries)), ids.to("meta")
    model = BertForMaskedLM(small()).to("meta")
    kd_loss(model(ids, ids, ids, positions=queries), model(ids, positions=queries),
            queries.pick(ids), alpha=0.5, temperature=2.0).backward()
    assert model.head.bias.grad.shape == (60,)
    with pytest.raises(RuntimeError, match="[Mm]eta"):
        model(ids)[ids.bool()]


# --- the start of a fresh model -------------------------------------------------------------------

def fresh(local: bool, preset="tiny", **fields) -> BertForMaskedLM:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig.preset(preset, **({"vocab_size": 200} | fields))).eval()
    if local:
        local_start(model)
    return model


def test_local_start_sets_sines_at_a_multiple_of_the_words_size():
    """Vaswani et al. 2017 §3.5: PE(pos, 2i) = sin(pos / 10000^(2i / H)), PE(pos, 2i + 1) = cos."""
    ratios = []
    for preset, H in (("tiny", 128), ("mini", 256)):
        embeddings = fresh(True, preset).bert.embeddings
        words, positions = embeddings.word_embeddings.weight, embeddings.position_embeddings.weight
        assert positions.shape == (512, H)
        rms = positions.square().mean().sqrt()
        ratios.append((rms / words.square().mean().sqrt()).item())
        waves = positions / (rms * math.sqrt(2))
        for pos in (0, 1, 7, 511):
            for i in (0, 1, 20, H // 2 - 1):
                angle = pos / 10000 ** (2 * i / H)
                assert waves[pos, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-4)
                assert waves[pos, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-4)
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-3) and 1 < ratios[0] < 2


def test_local_start_makes_queries_and_keys_read_positions_and_little_of_the_words():
    """The tiny preset: 32 of 128 directions hold nearly all that tells two positions apart."""
    plain, local = fresh(False).state_dict(), fresh(True).state_dict()
    positions = local["bert.embeddings.position_embeddings.weight"][:128]
    between = positions[1:] - positions[:-1]  # (127, H)
    words = local["bert.embeddings.word_embeddings.weight"]  # (200, H)
    for layer in (0, 1):
        name = f"bert.layers.{layer}.attention.query.weight"
        read, before = local[name], plain[name]
        assert torch.equal(local[name.replace("query", "key")], read)
        grown = (between @ read.T).norm() / (between @ before.T).norm()
        assert 2 < grown < 4
        off = (between @ read.T - grown * between @ before.T).norm() / (between @ read.T).norm()
        assert off < 0.05
        share = (words @ read.T).square().sum() / (words @ (grown * before).T).square().sum()
        assert share.item() == pytest.approx(32 / 128, rel=0.15)


def test_local_start_leaves_all_else_untouched():
    plain, local = fresh(False).state_dict(), fresh(True).state_dict()
    assert plain.keys() == local.keys()
    changed = {name for name, value in local.items() if not torch.equal(value, plain[name])}
    attention = [f"bert.layers.{i}.attention" for i in (0, 1)]
    matrices = [f"{name}.{part}.weight" for name in attention for part in ("query", "key")]
    assert changed == {"bert.embeddings.position_embeddings.weight", *matrices}


@torch.no_grad()
def near_over_far(model) -> float:
    """Mean attention to the six nearest other tokens over that to tokens 20 or more away, in the
    first layer, over heads and random texts."""
    ids = torch.randint(5, 200, (8, 64), generator=torch.Generator().manual_seed(1))
    hidden, attention = model.bert.embeddings(ids), model.bert.layers[0].attention
    q = attention.split_heads(attention.query(hidden))
    k = attention.split_heads(attention.key(hidden))
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1).mean((0, 1))  # (L, L)
    distance = (torch.arange(64)[:, None] - torch.arange(64)).abs()
    near, far = weights[(distance > 0) & (distance <= 3)].mean(), weights[distance >= 20].mean()
    return (near / far).item()


@pytest.mark.parametrize("preset", ["tiny", "mini", "small", "medium", "base"])
def test_only_the_local_start_attends_to_neighbours(preset):
    layers = {"num_hidden_layers": 1}  # that of the first is measured
    assert 0.97 < near_over_far(fresh(False, preset, **layers)) < 1.03
    assert near_over_far(fresh(True, preset, **layers)) > 1.3


# --- checkpoints ----------------------------------------------------------------------------------

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


def rewrite(tmp_path, source, change):
    """A copy of a recorded checkpoint whose weights went through `change`."""
    for file in (REFERENCE / source).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = change(read_safetensors(tmp_path / "model.safetensors"))
    write_safetensors(tmp_path / "model.safetensors", weights)
    return tmp_path


def test_a_pytorch_bin_is_read_as_tensors_only(tmp_path):
    model, _, batch, answers = load("bert", "mlm")
    rewrite(tmp_path, "bert-mlm", lambda weights: weights)
    torch.save(read_safetensors(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    again, _ = load_pretrained(tmp_path, head="mlm")
    torch.testing.assert_close(again.eval()(**batch), model(**batch))
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    for content in ({"weights": Path("a class that code could hide in")}, optimizer, [1.0],
                    torch.zeros(2), {"model": model.state_dict()}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(InputError, match="pytorch_model.bin is no sound file of tensors"):
            load_pretrained(tmp_path, head="mlm")


def test_a_model_in_shards_is_named_as_such(tmp_path):
    rewrite(tmp_path, "bert-mlm", lambda weights: weights)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="shards are not read"):
        load_pretrained(tmp_path, head="mlm")


def test_half_precision_weights_with_their_decoder_load(tmp_path):
    model, _, batch, _ = load("bert", "mlm")
    words = "bert.embeddings.word_embeddings.weight"

    def halve(weights):
        tied = weights | {"cls.predictions.decoder.weight": weights[words]}
        return {name: w.half() for name, w in tied.items()}

    again, _ = load_pretrained(rewrite(tmp_path, "bert-mlm", halve), head="mlm")
    assert again.head.bias.dtype == torch.float32
    torch.testing.assert_close(again.eval()(**batch), model(**batch), atol=0.02, rtol=0.02)


def test_a_new_classification_head_is_one_calm_line(caplog):
    """A pretrained checkpoint never has one, and its masked-LM head is left out silently."""
    load_pretrained(REFERENCE / "bert-mlm", head="classification", num_labels=2)
    record, = caplog.records
    assert "bert-mlm: classification head freshly initialised: bert.pooler.weight" in record.message
    assert "classifier.bias" in record.message and "\n" not in record.message


def test_another_number_of_labels_gets_a_fresh_head(caplog):
    checkpoint = REFERENCE / "bert-classification"
    model, _ = load_pretrained(checkpoint, head="classification", num_labels=5)
    assert model.classifier.out_features == 5
    assert "freshly initialised: classifier.weight, classifier.bias" in caplog.text
    same, _ = load_pretrained(checkpoint, head="classification")
    assert same.classifier.out_features == 3


def test_a_missing_masked_lm_head_is_said_and_no_teacher(caplog):
    load_pretrained(REFERENCE / "bert-classification", head="mlm")
    record, = caplog.records
    assert "mlm head freshly initialised: head.bias, head.dense.weight" in record.message
    with pytest.raises(InputError, match="no whole masked-LM head"):
        load_pretrained(REFERENCE / "bert-classification", head="mlm", whole=True)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_is_what_the_caller_asks_for(dropout):
    """In the embeddings, in attention and before the classifier; the checkpoint says 0.1."""
    checkpoint = REFERENCE / "bert-classification"
    model, _ = load_pretrained(checkpoint, head="classification", dropout=dropout)
    ids, attention = inputs()["input_ids"], model.train().bert.layers[0].attention
    hidden = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    for module, example in ((model.bert.embeddings, [ids]), (attention, [hidden, hidden]),
                            (model, [ids])):
        assert torch.equal(module(*example), module(*example)) == (dropout == 0)


def test_a_mistyped_path_never_goes_to_the_hub(tmp_path, monkeypatch):
    """A name of the hub has BERT in it, after an owner, or begins with it: the hub's own models."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/entrpy", "rns/entropy", "model/x", "entrpy", "bert/x", "./bert", "../bert",
                 "a/b/bert", "a/..", "bert base", "a/bert base", "bert", "gpt2", ".x/bert"):
        with pytest.raises(InputError, match="not a model directory"):
            find_pretrained(name)


def test_a_hub_name_is_fetched_with_every_file_that_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda name, allow_patterns: asked.update({name: allow_patterns}) or "here")
    names = ["bert-base-uncased", "distilbert-base-cased", "google/bert_uncased_L-2_H-128_A-2",
             "prajjwal1/bert-tiny", "emilyalsentzer/Bio_ClinicalBERT"]
    (tmp_path / "bert-base-cased").mkdir()
    assert [find_pretrained(name) for name in names] == [Path("here")] * 5
    wanted = ["config.json", "model.safetensors", "pytorch_model.bin", "vocab.txt",
              "tokenizer.json", "tokenizer_config.json", "added_tokens.json",
              "special_tokens_map.json"]
    for patterns in asked.values():
        assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in wanted)
        assert not any(fnmatch("pytorch_model-00001-of-00002.bin", pattern) for pattern in patterns)
    assert [*asked] == names


def test_a_digest_tells_weights_apart_and_not_directories(tmp_path):
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        write_safetensors(tmp_path / name / "model.safetensors", {"x": torch.tensor(value)})
    a, b, c = (weights_digest(tmp_path / name) for name in "abc")
    assert a == b != c
    assert a == hashlib.sha256((tmp_path / "a/model.safetensors").read_bytes()).hexdigest()


def test_a_directory_without_weights_has_no_digest(tmp_path):
    with pytest.raises(InputError, match="neither model.safetensors nor pytorch_model.bin"):
        weights_digest(tmp_path)
    with pytest.raises(InputError, match="is not a model directory"):
        weights_digest(tmp_path / "none")


# --- Hugging Face's names -------------------------------------------------------------------------

def test_hugging_face_names_are_the_recorded_ones():
    for kind, head in CASES:
        model = load(kind, head)[0]
        theirs = read_safetensors(REFERENCE / f"{kind}-{head}" / "model.safetensors")
        assert to_hf(model).keys() == theirs.keys()


def old_names(weights):
    """LayerNorms as BERT's first checkpoints call them."""
    renamed = {}
    for name, w in weights.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        renamed[name.replace("LayerNorm.bias", "LayerNorm.beta")] = w
    return renamed


def bare(weights):
    encoder = {name: w for name, w in weights.items() if name.startswith("bert.")}
    return {name.removeprefix("bert."): w for name, w in encoder.items()}


def extra(weights):
    return weights | {"cls.seq_relationship.weight": torch.zeros(2, 16)}


@pytest.mark.parametrize("change, missing", [
    (old_names, ""), (bare, "head.dense.weight"), (extra, "")])
def test_old_bare_and_larger_checkpoints_load(change, missing, tmp_path, caplog):
    model, _, batch, _ = load("bert", "mlm")
    again, _ = load_pretrained(rewrite(tmp_path, "bert-mlm", change), head="mlm")
    torch.testing.assert_close(again.eval().bert(**batch), model.bert(**batch))
    assert missing in caplog.text and bool(caplog.text) == bool(missing)


def same_logits(model, kind, head):
    _, _, batch, answers = load(kind, head)
    real = batch["attention_mask"].bool() if head == "mlm" else slice(None)
    with torch.no_grad():
        logits = model.eval()(**batch)
    torch.testing.assert_close(logits[real], answers["logits"][real], atol=1e-5, rtol=1e-5)


def renamed(old, new):
    return lambda weights: {new if name == old else name: w for name, w in weights.items()}


def unprefixed(weights):
    return {re.sub("^(distil)?bert[.]", "", name): w for name, w in weights.items()}


WORDS = {kind: f"{kind}.embeddings.word_embeddings.weight" for kind in ("bert", "distilbert")}
DECODER = {"bert": "cls.predictions.decoder.weight", "distilbert": "vocab_projector.weight"}


@pytest.mark.parametrize("kind, head, change", [
    ("bert", "mlm", renamed("cls.predictions.bias", "cls.predictions.decoder.bias")),
    *((kind, "mlm", renamed(WORDS[kind], DECODER[kind])) for kind in WORDS),
    *((*case, unprefixed) for case in CASES),
    ("bert", "mlm", lambda w: unprefixed(w) | {DECODER["bert"]: w[WORDS["bert"]]})])
def test_weights_under_their_other_names_are_found(kind, head, change, tmp_path, caplog):
    """Hugging Face's logits of such files are the recorded ones, to 4e-6."""
    again, _ = load_pretrained(rewrite(tmp_path, f"{kind}-{head}", change), head=head, whole=True)
    same_logits(again, kind, head)
    assert not caplog.records


@pytest.mark.parametrize("kind", WORDS)
def test_a_decoder_that_is_not_tied_is_refused_where_it_is_wanted(kind, tmp_path):
    """Hugging Face then computes with both, and its logits differ by about 1."""
    def untie(weights):
        return weights | {DECODER[kind]: weights[WORDS[kind]] + 1}

    rewrite(tmp_path, f"{kind}-mlm", untie)
    with pytest.raises(InputError, match=f"{DECODER[kind]} is not {WORDS[kind]}"):
        load_pretrained(tmp_path, head="mlm")
    load_pretrained(tmp_path, head="classification")


def configured(tmp_path, source, **fields):
    """A copy of a recorded checkpoint with other fields in its config.json."""
    rewrite(tmp_path, source, lambda weights: weights)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    return tmp_path


@pytest.mark.parametrize("name, value, said", [
    ("model_type", "roberta", "roberta"), ("hidden_act", "gelu_new", "gelu_new"),
    ("hidden_size", "16", "config.json"), ("num_attention_heads", 3, "3 heads"),
    ("hidden_size", 32, "word_embeddings"), ("vocab_size", 50, "word pieces"),
    ("num_hidden_layers", 4, "missing"), ("position_embedding_type", "relative_key", "relative_k"),
    ("is_decoder", True, "is_decoder is True"), ("add_cross_attention", True, "add_cross_att"),
    ("quantization_config", {"load_in_8bit": True}, "quantization_config"),
    ("tie_word_embeddings", False, "tie_word_embeddings is False")])
def test_a_config_that_does_not_fit_is_refused(name, value, said, tmp_path):
    with pytest.raises(InputError, match=said):
        load_pretrained(configured(tmp_path, "bert-mlm", **{name: value}), head="mlm")


@pytest.mark.parametrize("kind, head, fields", [
    ("bert", "mlm", {"hidden_act": "gelu_python"}),
    ("bert", "mlm", {"activation": "relu"}), ("distilbert", "mlm", {"hidden_act": "relu"}),
    ("distilbert", "mlm", {"activation": "gelu_python"}),
    ("distilbert", "mlm", {"layer_norm_eps": 0.1}),
    ("bert", "classification", {"tie_word_embeddings": False})])
def test_fields_that_the_reference_does_not_read_change_nothing(kind, head, fields, tmp_path):
    """Hugging Face's logits with these fields are the recorded ones, to 4e-6."""
    again, _ = load_pretrained(configured(tmp_path, f"{kind}-{head}", **fields), head=head)
    same_logits(again, kind, head)


def test_another_epsilon_is_berts_own_setting(tmp_path):
    """Hugging Face's largest logit moves by 1.695 at 0.1."""
    again, _ = load_pretrained(configured(tmp_path, "bert-mlm", layer_norm_eps=0.1), head="mlm")
    model, _, batch, answers = load("bert", "mlm")
    real = batch["attention_mask"].bool()
    far = (again.eval()(**batch) - answers["logits"])[real].abs().max().item()
    assert far == pytest.approx(1.6953071, abs=1e-4)


# --- tokenizers -----------------------------------------------------------------------------------

def test_the_tokenizer_is_berts():
    """Wordpieces by hand: lower case, accents off, punctuation apart, longest match first."""
    words = [*SPECIAL_TOKENS, "un", "##aff", "##able", "cafe", ",", "!"]
    tokenizer = wordpiece_tokenizer({word: i for i, word in enumerate(words)})
    assert tokenizer.encode("Unaffable, CAFÉ!").tokens == [
        "[CLS]", "un", "##aff", "##able", ",", "cafe", "!", "[SEP]"]
    assert tokenizer.encode("un [MASK] xyz").tokens == ["[CLS]", "un", "[MASK]", "[UNK]", "[SEP]"]


RECORDED = json.loads((REFERENCE / "tokenizers.json").read_text())
CONFIG = {kind: small(model_type=kind) for kind in ("bert", "distilbert")}


def ids_of(tokenizer):
    return [tokenizer.encode(text).ids for text in TEXTS]


def written(files, folder):
    folder.mkdir()
    write_tokenizer(files, folder)
    return folder


@pytest.mark.parametrize("row", RECORDED, ids=lambda row: json.dumps(row["files"])[:90])
def test_ids_are_the_recorded_ones_when_loaded_saved_and_loaded_again(row, tmp_path):
    """Of every tokenizer that can be loaded; Hugging Face reads the saved tokenizer.json as it is,
    under that name of its class."""
    tokenizer = load_tokenizer(written(row["files"], tmp_path / "theirs"))
    assert ids_of(tokenizer) == row["ids"]
    ours = tmp_path / "ours"
    save_pretrained(BertForMaskedLM(small()), tokenizer, ours)
    assert ids_of(load_tokenizer(ours)) == row["ids"]
    assert ids_of(Tokenizer.from_file(str(ours / "tokenizer.json"))) == row["ids"]
    settings = json.loads((ours / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert load_tokenizer(ours).get_vocab() == tokenizer.get_vocab()


def test_what_we_save_hugging_face_cuts_alike(tmp_path):
    """And, where the normaliser is BERT's and cleans, under the class's own name too."""
    transformers = pytest.importorskip("transformers")
    for i, row in enumerate(RECORDED):
        tokenizer = load_tokenizer(written(row["files"], tmp_path / f"{i}"))
        save_pretrained(BertForMaskedLM(small()), tokenizer, tmp_path / f"{i}-ours")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / f"{i}-ours")
        assert [theirs(text)["input_ids"] for text in TEXTS] == row["ids"], row["files"]
        assert theirs.mask_token_id == 4 and theirs.pad_token_id == 0
        if getattr(tokenizer.normalizer, "clean_text", False):
            theirs = transformers.BertTokenizer.from_pretrained(tmp_path / f"{i}-ours")
            assert [theirs(text)["input_ids"] for text in TEXTS] == row["ids"], row["files"]


@pytest.mark.parametrize("kind", CONFIG)
def test_the_saved_settings_tell_hugging_face_what_the_model_takes(kind, tmp_path):
    tokenizer = wordpiece_tokenizer({word: i for i, word in enumerate(SPECIAL_TOKENS)})
    save_pretrained(BertForMaskedLM(CONFIG[kind]), tokenizer, tmp_path)
    types = ["token_type_ids"] if kind == "bert" else []  # DistilBERT's model refuses them
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32,
        "model_input_names": ["input_ids", *types, "attention_mask"], "pad_token": "[PAD]",
        "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
        "do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}


def test_hugging_face_truncates_with_the_saved_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokenizer, _, _ = load("bert", "mlm")
    save_pretrained(model, tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs("w1 " * 900, truncation=True)["input_ids"]  # 902 tokens with [CLS] and [SEP]
    assert len(ids) == 32 and ids[0] == 2 and ids[-1] == 3


def vocabulary(text, folder):
    folder.mkdir()
    (folder / "vocab.txt").write_bytes(text.encode())
    return folder


@pytest.mark.parametrize("extra", [["<image>"], {"image_token": "<image>"}])
def test_special_tokens_of_a_models_own_are_not_cut(extra, tmp_path):
    """Newer files of Hugging Face's give each a role."""
    write_tokenizer({"tokenizer_config.json": {"extra_special_tokens": extra}}, tmp_path)
    tokens = load_tokenizer(tmp_path).encode("<image> image_token").tokens
    assert tokens[1] == "<image>" and "image_token" not in tokens


SPECIALS = "".join(f"{token}\n" for token in SPECIAL_TOKENS)


@pytest.mark.parametrize("text, ids", [  # Hugging Face's
    (SPECIALS + "a\nb\n\n\n", [2, 5, 6, 3]),  # empty lines at the end
    (SPECIALS + "a\nb\na\nz", [2, 7, 6, 3]),  # a repeated line has the id of the last
    (SPECIALS + "a\n\nb", [2, 5, 7, 3]),
    ((SPECIALS + "a\nb\n").replace("\n", "\r\n"), [2, 5, 6, 3]),
    (SPECIALS + "a \nb\t\n", [2, 5, 6, 3])])
def test_a_word_pieces_id_is_the_number_of_its_line(text, ids, tmp_path):
    """Also after saving; the last word piece is within the vocabulary's size."""
    tokenizer = load_tokenizer(vocabulary(text, tmp_path / "theirs"))
    assert tokenizer.encode("a b").ids == ids
    assert max(tokenizer.get_vocab().values()) == max(*ids, tokenizer.token_to_id("z") or 0)
    save_pretrained(BertForMaskedLM(small()), tokenizer, tmp_path / "ours")
    assert load_tokenizer(tmp_path / "ours").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("files, said", [
    ({"vocab.txt": SPECIALS.replace("[MASK]", "<mask>")}, r"lacks \[MASK\]"),
    ({"tokenizer_config.json": {"mask_token": "<mask>"}}, r"lacks \[MASK\]"),
    ({"special_tokens_map.json": {"pad_token": {"content": "<pad>"}}}, r"lacks \[PAD\]"),
    ({"added_tokens.json": {"covid19": 20}}, "covid19 cannot have the id 20"),
    ({"tokenizer_config.json": {"added_tokens_decoder": {"7": {"content": "new"}}}}, "the id 7"),
    ({"tokenizer_config.json": {"do_lower_case": None}}, "cannot be read"),
    ({"tokenizer_config.json": {"tokenizer_class": "BertJapaneseTokenizer"}}, "a BertJapaneseTok"),
    ({"config.json": {"tokenizer_class": "RobertaTokenizerFast"}}, "a RobertaTokenizerFast"),
    ({"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}},
     "tokenizer.json cannot be read"),
    ({"tokenizer.json": json.loads(Tokenizer(BPE()).to_str())}, "no WordPiece")])
def test_a_tokenizer_that_is_not_berts_is_refused(files, said, tmp_path):
    write_tokenizer({}, tmp_path)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        load_tokenizer(tmp_path)


def test_a_tokenizer_keeps_its_own_sign_of_a_words_inside(tmp_path):
    """Not "##" but "@@", for one: what masks whole words takes it from the tokenizer's model."""
    vocab = {word: i for i, word in enumerate([*SPECIAL_TOKENS, "a", "@@b"])}
    tokenizer = wordpiece_tokenizer(vocab)
    tokenizer.model = WordPiece(vocab, unk_token="[UNK]", continuing_subword_prefix="@@")
    save_pretrained(BertForMaskedLM(small()), tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode("ab").tokens == ["[CLS]", "a", "@@b", "[SEP]"]
    assert again.model.continuing_subword_prefix == "@@"


# --- files ----------------------------------------------------------------------------------------

def safetensors_bytes(header, body=b"", length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


ENTRY = json.dumps(entry()).encode()
GOOD = safetensors_bytes({"a": entry(), "b": entry("F16", (3,), (8, 14))}, bytes(14))
BAD = {
    "empty": b"",
    "cut in the length": GOOD[:4],
    "cut after the length": GOOD[:8],
    "cut in the header": GOOD[:30],
    "cut after the header": GOOD[:-14],
    "cut in the first tensor": GOOD[:-10],
    "cut between tensors": GOOD[:-3],
    "cut before the last byte": GOOD[:-1],
    "header length 2^63": safetensors_bytes({"a": entry()}, bytes(8), 2 ** 63),
    "header length 2^64 - 1": safetensors_bytes({"a": entry()}, bytes(8), 2 ** 64 - 1),
    "header length 0": safetensors_bytes({"a": entry()}, bytes(8), 0),
    "header one byte short": safetensors_bytes({"a": entry()}, bytes(8), len(ENTRY) + 6),
    "not JSON": safetensors_bytes(b"{nonsense", bytes(8)),
    "not UTF-8": safetensors_bytes(b'{"\xff": 1}', bytes(8)),
    "a list": safetensors_bytes([entry()], bytes(8)),
    "a number": safetensors_bytes(b"7"),
    "an entry that is no object": safetensors_bytes({"a": 7}, bytes(8)),
    "deeply nested": safetensors_bytes(b"[" * 100_000),
    "no dtype": safetensors_bytes({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "no shape": safetensors_bytes({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "no offsets": safetensors_bytes({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "wrong dtype": safetensors_bytes({"a": entry("F64")}, bytes(8)),
    "a list as dtype": safetensors_bytes({"a": entry(["F32"])}, bytes(8)),
    "shape too large": safetensors_bytes({"a": entry(shape=(3,))}, bytes(8)),
    "shape that overflows": safetensors_bytes({"a": entry(shape=(2 ** 40, 2 ** 40))}, bytes(8)),
    "negative shape": safetensors_bytes({"a": entry(shape=(-1, -2))}, bytes(8)),
    "fractional shape": safetensors_bytes({"a": entry(shape=(2.0,))}, bytes(8)),
    "shape of booleans": safetensors_bytes({"a": entry(shape=(True,), offsets=(0, 4))}, bytes(4)),
    "shape that is a word": safetensors_bytes({"a": entry() | {"shape": "ab"}}, bytes(8)),
    "offsets beyond the file": safetensors_bytes({"a": entry(offsets=(8, 16))}, bytes(8)),
    "offsets backwards": safetensors_bytes({"a": entry(offsets=(8, 0))}, bytes(8)),
    "negative offsets": safetensors_bytes({"a": entry(offsets=(-8, 0))}, bytes(8)),
    "three offsets": safetensors_bytes({"a": entry(offsets=(0, 8, 8))}, bytes(8)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_safetensors_file_is_refused(name, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(BAD[name])
    with pytest.raises(InputError, match="model.safetensors is no sound file of tensors"):
        read_weights(tmp_path)


def test_the_good_file_is_good(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    read = read_weights(tmp_path)
    assert read["a"].tolist() == [0, 0] and read["b"].dtype == torch.float16


def test_a_tensor_that_is_no_weight_is_left_out(tmp_path):
    """Of a type that is not read, one that is not known, or integers."""
    others = {"b": entry("F8_E4M3", (3,), (8, 11)), "c": entry("I64", (1,), (11, 19))}
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes({"a": entry()} | others, bytes(19)))
    assert [*read_safetensors(tmp_path / "x.safetensors")] == ["a"]


def test_the_reference_library_reads_ours_and_we_read_its(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    tensors = {"f32": torch.randn(3, 5), "f16": torch.randn(7).half(),
               "bf16": torch.randn(2, 2).bfloat16(), "f64": torch.randn(2).double(),
               "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    library.save_file(tensors, tmp_path / "theirs.safetensors")
    write_safetensors(tmp_path / "ours.safetensors", tensors)
    for read in (read_safetensors(tmp_path / "theirs.safetensors"),
                 library.load_file(tmp_path / "ours.safetensors")):
        assert read.keys() == tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(read[name], value) and read[name].dtype == value.dtype


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    write_atomic(tmp_path / "file", "old")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(RunError, match="cannot be written .No space left on device.: make room"):
        write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
