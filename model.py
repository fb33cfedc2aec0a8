"""BERT in pure PyTorch: the encoder, the masked-LM head, the classification head, checkpoints in and out.

BERT is Devlin et al. 2018 (arXiv 1810.04805); DistilBERT (Sanh et al. 2019, 1910.01108) is the same encoder without
token types, and with a ReLU where BERT's pooler has a tanh. Parts come first, then the models assembled from them,
then Hugging Face checkpoints, then the few lines about files and errors that every command line here shares.

Shapes: B batch, L tokens, K tokens of interest per row, N tokens of interest in all, H hidden, V vocabulary.

    model, tokenizer = load_pretrained("runs/entropy", head="mlm")
"""
import argparse
import hashlib
import json
import logging
import math
import os
import re
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F

log = logging.getLogger("minimask")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class InputError(ValueError):
    """The user gave something wrong. One line that says what is wrong and what to do."""


class RunError(RuntimeError):
    """The input was right and the run failed all the same: memory, a diverging loss, a lost process. One line."""


# --- configuration ---------------------------------------------------------------------------------------------------

PRESETS = {  # Turc et al. 2019 (1908.08962), table 1: layers, hidden; heads are hidden / 64, the feed-forward 4 × hidden
    "tiny": (2, 128), "mini": (4, 256), "small": (4, 512), "medium": (8, 512), "base": (12, 768),
}


@dataclass
class BertConfig:
    """The shape of an encoder, in Hugging Face's field names; the defaults are bert-base-uncased's."""
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    model_type: str = "bert"  # or "distilbert"

    def __post_init__(self):
        if self.model_type not in ("bert", "distilbert"):
            raise InputError(f"model_type is {self.model_type!r}: only bert and distilbert can be read")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                     "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}: it must be from 0 to 1")
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise InputError(f"pad_token_id {self.pad_token_id} is none of the {self.vocab_size:,} word pieces")
        if self.hidden_size % self.num_attention_heads:
            raise InputError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")

    @classmethod
    def preset(cls, name: str, **fields) -> "BertConfig":
        """One of PRESETS; `fields` override, `vocab_size` above all. Raises InputError on an unknown name."""
        if name not in PRESETS:
            raise InputError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
        layers, hidden = PRESETS[name]
        return cls(**{"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": hidden // 64,
                      "intermediate_size": 4 * hidden, **fields})


# --- the encoder -----------------------------------------------------------------------------------------------------

class Dropout(nn.Dropout):
    """nn.Dropout. A CPU has no quick source of coins, and tossing one for every entry takes a sixth of a small model's
    step; so there four coins share a draw of 64 bits, and the probability is a multiple of 1 / 2¹⁶."""

    def forward(self, x):
        drop = round(self.p * 2 ** 16)
        if not self.training or x.device.type != "cpu" or drop in (0, 2 ** 16):
            return super().forward(x)
        bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-2 ** 63, None)
        coins = bits.view(torch.int16)[:x.numel()].view(x.shape)  # uniform from −2¹⁵ to 2¹⁵ − 1
        return x * (coins >= drop - 2 ** 15).to(x.dtype).mul_(2 ** 16 / (2 ** 16 - drop))


class Embeddings(nn.Module):
    """Word + position + token-type embeddings, normalised (BERT §3, figure 2)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        H = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, H)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, H)
        types = config.type_vocab_size if config.model_type == "bert" else 0
        self.token_type_embeddings = nn.Embedding(types, H) if types else None
        self.LayerNorm = nn.LayerNorm(H, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, token_type_ids=None, inputs_embeds=None):
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds  # (B, L, H)
        L, most = words.shape[1], self.position_embeddings.num_embeddings
        if L > most:
            raise InputError(f"a sequence of {L} tokens, but the model has {most} positions: shorten --seq-len")
        hidden = words + self.position_embeddings.weight[:L]
        if self.token_type_embeddings is not None:
            types = self.token_type_embeddings
            hidden = hidden + (types.weight[0] if token_type_ids is None else types(token_type_ids))
        return self.dropout(self.LayerNorm(hidden))


class SelfAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, §3.2): softmax(Q Kᵀ / √d) V in each head, then a projection.

    `fused` chooses PyTorch's fused kernel over the formula written out; they agree (tests/test_model.py). On a CPU that
    kernel has no dropout."""
    fused = True

    def __init__(self, config: BertConfig):
        super().__init__()
        H = config.hidden_size
        self.heads = config.num_attention_heads
        self.dropout = Dropout(config.attention_probs_dropout_prob)
        self.qkv = nn.Linear(H, 3 * H)
        self.output = nn.Linear(H, H)

    def forward(self, hidden, key_mask=None, rows=None):
        """hidden (B, L, H), key_mask (B, 1, 1, L) True where a key may be read, rows (B, K, H) the hidden states that
        ask, None for all of them. Returns (B, K, H)."""
        H = hidden.shape[-1]
        if rows is None:
            q, k, v = self.qkv(hidden).split(H, dim=-1)  # 3 × (B, L, H)
        else:
            q = F.linear(rows, self.qkv.weight[:H], self.qkv.bias[:H])  # (B, K, H)
            k, v = F.linear(hidden, self.qkv.weight[H:], self.qkv.bias[H:]).split(H, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, K or L, d)
        dropout = self.dropout.p if self.training else 0.0
        if self.fused and not (dropout and hidden.device.type == "cpu"):
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask, dropout_p=dropout)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, heads, K, L)
            if key_mask is not None:
                scores = scores.masked_fill(~key_mask, -math.inf)
            mixed = self.dropout(scores.softmax(dim=-1)) @ v
        return self.output(mixed.transpose(1, 2).flatten(2))  # (B, K, H)


class Block(nn.Module):
    """Attention, then feed-forward, each added to its input and normalised after (post-LayerNorm, as BERT)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        H = config.hidden_size
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(H, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(H, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, H)
        self.output_norm = nn.LayerNorm(H, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, hidden, key_mask=None, rows=None):
        """(B, L, H) -> (B, L, H), or with rows (B, K) -> (B, K, H): the block's output at those columns alone.

        Keys and values need every position; queries and the feed-forward only the positions somebody reads."""
        asked = None if rows is None else hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
        attended = self.dropout(self.attention(hidden, key_mask, asked))
        hidden = self.attention_norm((hidden if rows is None else asked) + attended)
        return self.output_norm(hidden + self.dropout(self.output(F.gelu(self.intermediate(hidden)))))


class Bert(nn.Module):
    """The encoder. `pooler=True` adds the layer that BERT puts on [CLS] before a classifier."""

    def __init__(self, config: BertConfig, pooler: bool = False):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if pooler else None
        init_weights(self, config)

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, inputs_embeds=None, rows=None):
        """input_ids (B, L) or inputs_embeds (B, L, H), the word embeddings; attention_mask (B, L), 1 on real tokens,
        None where nothing is padded. Returns hidden (B, L, H); with rows (B, K), column numbers, hidden (B, K, H) of
        those columns, for which the last block does no other work."""
        hidden = self.embeddings(input_ids, token_type_ids, inputs_embeds)
        key_mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        for block in self.layers[:-1]:
            hidden = block(hidden, key_mask)
        return self.layers[-1](hidden, key_mask, rows)


def init_weights(model: nn.Module, config: BertConfig):
    """Zero biases and N(0, σ²) matrices, σ = 0.02 at BERT-base's width, as in BERT, and growing as 1 / √H below it, so
    that a product of H terms has the same size in a narrow model. A tiny model learns sooner for it."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02 * math.sqrt(768 / config.hidden_size))
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


# --- heads -----------------------------------------------------------------------------------------------------------

class MaskedLMHead(nn.Module):
    """A dense layer, then the dot product with every word embedding (the decoder is tied), plus a bias per word."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        init_weights(self, config)

    def forward(self, hidden, word_embeddings):  # (..., H), (V, H) -> (..., V)
        return F.linear(self.norm(F.gelu(self.dense(hidden))), word_embeddings, self.bias)


class Queries(NamedTuple):
    """Which positions of a batch are read, as the encoder wants them (`query_positions`)."""
    columns: Tensor  # (B, K) the wanted columns of each row in order; a row with fewer is filled up with others
    chosen: Tensor  # (N,) which of the B · K columns, flattened, were wanted


def query_positions(positions: Tensor) -> Queries:
    """positions (B, L) bool, True where the hidden state is wanted; K is the number in the fullest row."""
    K = int(positions.sum(1).max()) if len(positions) else 0  # a GPU's host waits here for the count, and below
    columns = positions.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :K]
    return Queries(columns, positions.gather(1, columns).flatten().nonzero()[:, 0])


class BertForMaskedLM(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        self.head = MaskedLMHead(config)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V)"""
        return self.head(hidden, self.bert.embeddings.word_embeddings.weight)

    def hidden(self, input_ids=None, attention_mask=None, token_type_ids=None, inputs_embeds=None, positions=None):
        """As `forward`, one step before the head: (B, L, H), or (N, H) with positions."""
        inputs = (input_ids, attention_mask, token_type_ids, inputs_embeds)
        if positions is None:
            return self.bert(*inputs)
        queries = query_positions(positions) if isinstance(positions, Tensor) else positions
        return self.bert(*inputs, rows=queries.columns).flatten(0, 1)[queries.chosen]  # (N, H)

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, inputs_embeds=None, positions=None):
        """Logits (B, L, V); with positions, a mask (B, L) bool or its `query_positions`, logits (N, V) in the order of
        `hidden[positions]`."""
        return self.logits(self.hidden(input_ids, attention_mask, token_type_ids, inputs_embeds, positions))


class BertForSequenceClassification(nn.Module):
    def __init__(self, config: BertConfig, num_labels: int):
        super().__init__()
        self.config = config
        self.bert = Bert(config, pooler=True)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        init_weights(self.classifier, config)

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, inputs_embeds=None):
        """Logits (B, num_labels), read off [CLS] (BERT §3.2)."""
        batch = (input_ids if inputs_embeds is None else inputs_embeds)
        first = torch.zeros(len(batch), 1, dtype=torch.long, device=batch.device)
        cls = self.bert(input_ids, attention_mask, token_type_ids, inputs_embeds, rows=first)[:, 0]  # (B, H)
        pooled = self.bert.pooler(cls)
        pooled = pooled.tanh() if self.config.model_type == "bert" else pooled.relu()
        return self.classifier(self.dropout(pooled))


@torch.no_grad()
def local_start(model: "BertForMaskedLM"):
    """Sinusoidal positions at twice the word embeddings' rms; each key matrix a copy of its query."""
    words, positions = (model.bert.embeddings.word_embeddings.weight,
                        model.bert.embeddings.position_embeddings.weight)
    L, H = positions.shape
    angle = torch.arange(L)[:, None] / 10000 ** (torch.arange(0, H, 2) / H)  # (L, H / 2)
    waves = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :H]  # (L, H)
    positions.copy_(waves * (2 * words.square().mean().sqrt() / waves.square().mean().sqrt()))
    for block in model.bert.layers:
        block.attention.qkv.weight[H:2 * H] = block.attention.qkv.weight[:H]


# --- Hugging Face's names --------------------------------------------------------------------------------------------

LAYER_NAMES = {  # ours -> BERT's, DistilBERT's; one fused matrix here is three there
    "attention.qkv": (("attention.self.query", "attention.self.key", "attention.self.value"),
                      ("attention.q_lin", "attention.k_lin", "attention.v_lin")),
    "attention.output": (("attention.output.dense",), ("attention.out_lin",)),
    "attention_norm": (("attention.output.LayerNorm",), ("sa_layer_norm",)),
    "intermediate": (("intermediate.dense",), ("ffn.lin1",)),
    "output": (("output.dense",), ("ffn.lin2",)),
    "output_norm": (("output.LayerNorm",), ("output_layer_norm",)),
}
HEAD_NAMES = {
    "bert.pooler": ("bert.pooler.dense", "pre_classifier"),
    "head.dense": ("cls.predictions.transform.dense", "vocab_transform"),
    "head.norm": ("cls.predictions.transform.LayerNorm", "vocab_layer_norm"),
    "head": ("cls.predictions", "vocab_projector"),
    "classifier": ("classifier", "classifier"),
}
TIED = ("cls.predictions.decoder.weight", "vocab_projector.weight")  # copies of the word embeddings
IGNORED = TIED + ("cls.predictions.decoder.bias", "embeddings.position_ids")
DISTILBERT_FIELDS = {
    "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim", "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}


def hf_names(name: str, model_type: str) -> tuple[str, ...]:
    """The names under which a Hugging Face checkpoint keeps our parameter `name`: one, or three for a fused matrix."""
    column = ("bert", "distilbert").index(model_type)
    module, _, kind = name.rpartition(".")  # kind: weight or bias
    if layer := re.match(r"bert\.layers\.(\d+)\.(.+)", module):
        stem = ("bert.encoder.layer", "distilbert.transformer.layer")[column]
        return tuple(f"{stem}.{layer[1]}.{part}.{kind}" for part in LAYER_NAMES[layer[2]][column])
    if module in HEAD_NAMES:
        return (f"{HEAD_NAMES[module][column]}.{kind}",)
    return (name.replace("bert.", model_type + ".", 1),)


def from_hf(model: nn.Module, weights: dict[str, Tensor], source: str) -> list[str]:
    """Copies a Hugging Face state dict into `model`, in place; logs what was missing and what nobody used. Returns the
    names of what was missing.

    Takes LayerNorms called gamma and beta, and encoders saved without their `bert.` prefix. Raises InputError on a
    shape that does not fit, an encoder weight that is missing, or a decoder that is not tied."""
    kind, old = model.config.model_type, {"gamma": "weight", "beta": "bias"}
    weights = {re.sub(r"(gamma|beta)$", lambda end: old[end[0]], name): w for name, w in weights.items()}
    if not any(name.startswith(kind + ".") for name in weights):
        weights |= {f"{kind}.{name}": weights.pop(name) for name in list(weights)}
    state, missing, used = model.state_dict(), [], set()
    for name, ours in state.items():
        theirs = hf_names(name, kind)
        if name.startswith("classifier.") and theirs[0] in weights and weights[theirs[0]].shape != ours.shape:
            missing.append(name)  # a head for another number of labels
        elif all(part in weights for part in theirs):
            for part, piece in zip(theirs, ours.chunk(len(theirs))):
                if weights[part].shape != piece.shape:
                    raise InputError(f"{source}: {part} is {tuple(weights[part].shape)}, "
                                     f"its config.json asks for {tuple(piece.shape)}")
                piece.copy_(weights[part])  # state_dict shares the parameters' memory
            used.update(theirs)
        else:
            missing.append(name)
    if lost := [name for name in missing if name.startswith(("bert.embeddings", "bert.layers"))]:
        raise InputError(f"{source}: the weights lack {lost[0]} and {len(lost) - 1} more: is it a {kind} checkpoint?")
    words = state["bert.embeddings.word_embeddings.weight"]
    for name in TIED:
        if name in weights and hasattr(model, "head") and not torch.equal(weights[name].to(words), words):
            raise InputError(f"{source}: {name} is not tied to the word embeddings, which this model needs")
    unused = [name for name in weights if name not in used and not name.endswith(IGNORED)]
    if missing:
        log.warning("%s: not found, freshly initialised: %s", source, ", ".join(missing))
    if unused:
        log.warning("%s: not used: %s", source, ", ".join(unused[:6]) + (", ..." if len(unused) > 6 else ""))
    return missing


def to_hf(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights under Hugging Face's names."""
    state = {}
    for name, value in model.state_dict().items():
        names = hf_names(name, model.config.model_type)
        state |= dict(zip(names, value.chunk(len(names))))
    return state


def config_from_hf(fields: dict, source: str) -> BertConfig:
    """config.json -> BertConfig. Raises InputError where it asks for what this encoder does not compute."""
    if fields.get("model_type") == "distilbert":
        fields = fields | {ours: fields[theirs] for ours, theirs in DISTILBERT_FIELDS.items() if theirs in fields}
    activation = fields.get("hidden_act", fields.get("activation", "gelu"))
    if activation != "gelu":
        raise InputError(f"{source}: activation {activation!r}; only gelu is implemented")
    if fields.get("position_embedding_type", "absolute") != "absolute":
        raise InputError(f"{source}: position embeddings are {fields['position_embedding_type']}, not absolute")
    known = {name: fields[name] for name in BertConfig.__dataclass_fields__ if fields.get(name) is not None}
    wrong = [name for name, value in known.items() if type(value) not in (type(getattr(BertConfig, name)), int)]
    if wrong:
        raise InputError(f"{source}: config.json has {wrong[0]} = {known[wrong[0]]!r}")
    return BertConfig(**known)


def config_to_hf(model: nn.Module) -> dict:
    """What config.json must say for Hugging Face to open the model."""
    fields, kind = asdict(model.config), model.config.model_type
    if kind == "distilbert":
        fields |= {theirs: fields.pop(ours) for ours, theirs in DISTILBERT_FIELDS.items()}
        del fields["type_vocab_size"], fields["layer_norm_eps"]
    head = type(model).__name__.removeprefix("Bert")
    fields["architectures"] = [("Bert" if kind == "bert" else "DistilBert") + head]
    if hasattr(model, "classifier"):
        fields["id2label"] = {i: f"LABEL_{i}" for i in range(model.classifier.out_features)}
    return fields | {"activation" if kind == "distilbert" else "hidden_act": "gelu"}


# --- tokenizers ------------------------------------------------------------------------------------------------------

def wordpiece_tokenizer(vocab: dict[str, int], lowercase: bool = True) -> Tokenizer:
    """BERT's tokenizer on a vocabulary: clean, lower-case, split on space and punctuation, longest pieces first."""
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    missing = [token for token in SPECIAL_TOKENS if vocab and token not in vocab]
    if missing:
        raise InputError(f"the vocabulary lacks {', '.join(missing)}: is it BERT's?")
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    cls, sep = (("[CLS]", tokenizer.token_to_id("[CLS]")), ("[SEP]", tokenizer.token_to_id("[SEP]")))
    tokenizer.post_processor = processors.BertProcessing(sep, cls)
    return tokenizer


def load_tokenizer(directory: Path) -> Tokenizer:
    """From tokenizer.json, or else from vocab.txt. Raises InputError when neither can be read."""
    if (path := directory / "tokenizer.json").exists():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{path} cannot be read ({error}): delete it or copy it again") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if missing := [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]:
            raise InputError(f"{path} lacks {', '.join(missing)}: is it BERT's?")
        return tokenizer
    if not (path := directory / "vocab.txt").exists():
        raise InputError(f"{directory} has neither tokenizer.json nor vocab.txt: copy the tokenizer there")
    try:
        words = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte offset {error.start}): copy it again") from None
    vocab = {word.rstrip("\r"): i for i, word in enumerate(words[:-1] if words[-1] == "" else words)}
    settings = directory / "tokenizer_config.json"
    return wordpiece_tokenizer(vocab, not settings.exists() or bool(read_json(settings).get("do_lower_case", True)))


# --- files -----------------------------------------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Reads a .safetensors file: 8 bytes of header length, a JSON header (dtype, shape, offsets), the raw numbers.

    Nothing is believed before it is checked: the header must lie in the file, and the tensors must fill the rest
    without a gap or an overlap. Raises InputError otherwise."""
    def refuse(why):
        raise InputError(f"{path} is not a sound safetensors file ({why}): delete it and copy it again")

    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or start > len(data) or start > 100_000_000:
        refuse("cut off, or its header length is wrong")
    try:
        header = json.loads(data[8:start].decode("utf-8"), object_pairs_hook=unique_keys)
        header.pop("__metadata__", None)
        entries = sorted((first, last, name, DTYPES[entry["dtype"]], tuple(entry["shape"]))
                         for name, entry in header.items() for first, last in [entry["data_offsets"]])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        refuse(f"its header cannot be read: {type(error).__name__} {error}")
    tensors, end = {}, 0
    for first, last, name, dtype, shape in entries:
        if any(type(n) is not int or n < 0 for n in (first, last, *shape)):
            refuse(f"{name} has a shape or an offset that is no whole number")
        if first != end or last - first != math.prod(shape) * dtype.itemsize or start + last > len(data):
            refuse(f"{name} has offsets {first} to {last}, which do not fit its shape or the file")
        flat = torch.frombuffer(data[start + first:start + last], dtype=dtype) if last > first else torch.empty(0)
        tensors[name], end = flat.to(dtype).reshape(shape), last
    if start + end != len(data):
        refuse("it holds more numbers than its header names")
    return tensors


def unique_keys(pairs: list) -> dict:
    """A JSON object as a dict. Raises ValueError where a key stands twice."""
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def write_safetensors(path: Path, tensors: dict[str, Tensor]):
    """Writes what `read_safetensors` and Hugging Face read."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, chunks, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        chunks.append(flat.view(torch.uint8).numpy().tobytes())
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, offset + len(chunks[-1])]}
        offset += len(chunks[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of 8
    write_atomic(path, len(text).to_bytes(8, "little") + text + b"".join(chunks))


def write_atomic(path: Path, data: str | bytes):
    """Writes a file whole or not at all: a temporary file beside it, flushed to the disk, then renamed. Raises RunError
    where the disk is full, or refuses for another reason."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's files are private
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}): make room or choose another place; what was there "
                       "before is untouched") from None
    finally:
        Path(temporary).unlink(missing_ok=True)  # already gone where all went well


def can_write(path: str | Path) -> bool:
    """Whether a file or a folder can be made at `path`: the nearest of its parents that exists is a folder to write in."""
    nearest = next(parent for parent in Path(path).absolute().parents if parent.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK)


def read_json(path: Path) -> dict:
    """A JSON object. Raises InputError, naming the file, on anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}): delete it or copy it again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object: delete it or copy it again")
    return found


def find_pretrained(name_or_dir: str) -> Path:
    """A local directory as it is; anything of the form `name` or `owner/name` that is not there, from the hub.

    Raises InputError when neither has it. A path whose first folder exists here is never looked up on the hub."""
    path = Path(name_or_dir)
    if path.is_dir():
        return path
    is_hub_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name_or_dir)
    if not is_hub_name or ("/" in name_or_dir and Path(path.parts[0]).exists()) or path.exists():
        raise InputError(f"{name_or_dir} is not a model directory: give a run of train.py or a Hugging Face model")
    from huggingface_hub import snapshot_download
    wanted = ["config.json", "model.safetensors", "pytorch_model.bin", "vocab.txt", "tokenizer*.json"]
    try:
        return Path(snapshot_download(name_or_dir, allow_patterns=wanted))
    except Exception as error:  # its own, the network's and the server's errors share no base class
        raise InputError(f"{name_or_dir} is no directory here, and the hub did not give it "
                         f"({type(error).__name__}): check the name and the network") from None


def weights_digest(directory: str | Path) -> str:
    """sha256 of a model directory's weight file: what tells one checkpoint from another, whatever they are called."""
    names = ("model.safetensors", "pytorch_model.bin")
    path = next(path for name in names if (path := Path(directory) / name).exists())
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(directory: Path) -> dict[str, Tensor]:
    """model.safetensors, or else pytorch_model.bin (as plain tensors, never code). Raises InputError."""
    if (path := directory / "model.safetensors").exists():
        return read_safetensors(path)
    if not (path := directory / "pytorch_model.bin").exists():
        raise InputError(f"{directory} has neither model.safetensors nor pytorch_model.bin: is the download complete?")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle can raise nearly anything
        raise InputError(f"{path} cannot be read as plain tensors ({type(error).__name__}): copy it again") from None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{path} is not a state dict of tensors: give the file that Hugging Face saves")
    return weights


@torch.no_grad()
def load_pretrained(name_or_dir: str, head: str, num_labels: int | None = None, dropout: float | None = None,
                    whole: bool = False) -> tuple[nn.Module, Tokenizer]:
    """Reads a BERT or DistilBERT: a run of ours, a Hugging Face directory or a hub name.

    head: "mlm" or "classification"; num_labels defaults to the checkpoint's, or 2; dropout replaces both of the
    checkpoint's. Logs the weights it could not find (the head's are then freshly initialised) and those it did not
    use. whole: the head must be there, for a teacher without one would teach noise. Raises InputError."""
    directory = find_pretrained(str(name_or_dir))
    if not (directory / "config.json").exists():
        raise InputError(f"{directory} has no config.json: is it a model directory?")
    config = config_from_hf(read_json(directory / "config.json"), str(directory))
    if dropout is not None:
        config = replace(config, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    tokenizer = load_tokenizer(directory)
    if (pieces := 1 + max(tokenizer.get_vocab().values())) > config.vocab_size:
        raise InputError(f"{directory}: the tokenizer has {pieces:,} word pieces, the model {config.vocab_size:,}: "
                         "they do not belong together")
    weights = read_weights(directory)
    if config.num_hidden_layers > len(weights):
        raise InputError(f"{directory}: config.json asks for {config.num_hidden_layers:,} layers, more than it has weights")
    try:
        if head == "mlm":
            model = BertForMaskedLM(config)
        else:
            model = BertForSequenceClassification(config, num_labels or len(weights.get("classifier.bias", (0, 1))))
    except RuntimeError:  # PyTorch's for memory
        raise InputError(f"{directory}: config.json asks for a model that no memory holds: copy it again") from None
    if from_hf(model, weights, str(directory)) and whole:
        raise InputError(f"{directory} has no whole masked-LM head: a teacher needs one")
    return model, tokenizer


def save_pretrained(model: nn.Module, tokenizer: Tokenizer, directory: Path):
    """Writes config.json, vocab.txt, tokenizer.json and, last, model.safetensors; Hugging Face opens it."""
    directory = Path(directory)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    write_atomic(directory / "config.json", json.dumps(config_to_hf(model), indent=1) + "\n")
    write_atomic(directory / "vocab.txt", "".join(word + "\n" for word, _ in vocab))
    write_atomic(directory / "tokenizer.json", tokenizer.to_str())
    write_safetensors(directory / "model.safetensors", to_hf(model))


# --- what the command lines share ------------------------------------------------------------------------------------

def number(kind, low=-math.inf, high=math.inf, above=-math.inf, below=math.inf):
    """An argparse type: a finite `kind` (int or float) with low <= value <= high and above < value < below."""
    def convert(text: str):
        value = kind(text)
        if not (low <= value <= high and above < value < below and math.isfinite(value)):
            bounds = {"at least": low, "at most": high, "above": above, "below": below}
            said = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound))
            raise argparse.ArgumentTypeError(f"{text} is not {said or 'finite'}")
        return value
    convert.__name__ = kind.__name__  # argparse says "invalid int value: 'many'"
    return convert


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # no "(default: None)"
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse, with the defaults in its help, and one line on an error instead of the whole usage."""

    def __init__(self, **options):
        super().__init__(formatter_class=Help, allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def run_cli(main):
    """Runs a command: wrong input ends in one line and status 2, a failing world (memory, a full disk) in status 1."""
    try:
        main()
    except InputError as error:
        status, message = 2, f"{error}"
    except RunError as error:
        status, message = 1, f"{error}"
    except OSError as error:
        status, message = 1, f"{error}: see to that file or disk, then try again"
    except KeyboardInterrupt:
        status, message = 128 + signal.SIGINT, "interrupted"
    else:
        return
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)  # one line, whatever it quotes
    sys.exit(status)
