"""BERT in PyTorch: the encoder, its two heads, how a fresh model starts, and checkpoints.

BERT is Devlin et al. 2018 (arXiv 1810.04805) §3, on the encoder of Vaswani et al. 2017 (1706.03762)
§3. DistilBERT (Sanh et al. 2019, 1910.01108) is the same without token types, and with a ReLU where
BERT's pooler has a tanh. A reader of the papers needs the encoder, the heads and the start.

Shapes: B texts, L tokens, H hidden, d = H / heads, V vocabulary, M queries in a text (the positions
whose output is wanted), N queries in all.

    model, tokenizer = load_pretrained("runs/entropy", head="mlm")
    logits = model(input_ids, attention_mask)  # (B, L, V)
"""
import argparse
import hashlib
import json
import logging
import math
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import (AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors)
from torch import Tensor, nn
from torch.nn import functional as F

log = logging.getLogger("minimask")
log.setLevel(logging.INFO)


class InputError(ValueError):
    """What the user gave is wrong. The message is one line: what is wrong and what to do."""


class RunError(RuntimeError):
    """The input is right and the run fails all the same: memory, the disk, a diverging loss."""


# --- configuration --------------------------------------------------------------------------------

PRESETS = {  # Turc et al. 2019 (1908.08962), table 1: number of layers, hidden size
    "tiny": (2, 128), "mini": (4, 256), "small": (4, 512), "medium": (8, 512), "base": (12, 768),
}


@dataclass
class BertConfig:
    """The shape of an encoder, in Hugging Face's names; the defaults are bert-base-uncased's."""
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
        H, heads = self.hidden_size, self.num_attention_heads
        if H % heads:
            raise InputError(f"hidden_size is {H}: {heads} heads cannot share it equally")

    @classmethod
    def preset(cls, name: str, **fields) -> "BertConfig":
        """One of PRESETS, other `fields` as given."""
        layers, hidden = PRESETS[name]
        shape = {"num_hidden_layers": layers, "hidden_size": hidden,
                 "num_attention_heads": hidden // 64, "intermediate_size": 4 * hidden}
        return cls(**(shape | fields))


# --- the encoder ----------------------------------------------------------------------------------

class Embeddings(nn.Module):
    """Word, position and token-type embeddings, added and normalised (BERT §3, figure 2)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        H = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, H)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, H)
        types = config.type_vocab_size if config.model_type == "bert" else 0
        self.token_type_embeddings = nn.Embedding(types, H) if types else None
        self.LayerNorm = nn.LayerNorm(H, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, token_type_ids=None, inputs_embeds=None):
        """Hidden states (B, L, H) of input_ids (B, L), or of inputs_embeds (B, L, H): the word
        embeddings themselves, for a caller that wants their gradient. Token types default to 0."""
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        L, most = words.shape[1], self.position_embeddings.num_embeddings
        if L > most:
            raise InputError(f"{L} tokens, but the model has {most} positions: shorten --seq-len")
        hidden = words + self.position_embeddings.weight[:L]  # (B, L, H) + (L, H)
        if self.token_type_embeddings is not None:
            types = self.token_type_embeddings
            hidden = hidden + (types.weight[0] if token_type_ids is None else types(token_type_ids))
        return self.dropout(self.LayerNorm(hidden))


class SelfAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017 §3.2): softmax(Q Kᵀ / √d) V in each head, then a
    projection of all heads together."""
    fused = True  # PyTorch's kernel in place of the formula: the same numbers, sooner

    def __init__(self, config: BertConfig):
        super().__init__()
        H = config.hidden_size
        self.heads = config.num_attention_heads
        self.query, self.key, self.value = nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, H)
        self.output = nn.Linear(H, H)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, query_hidden, hidden, key_mask=None):
        """What each query reads, (B, M, H).

        query_hidden (B, M, H): the hidden states that ask; hidden (B, L, H): those that are read;
        key_mask (B, 1, 1, L): True where a position may be read, None where all may."""
        q = self.split_heads(self.query(query_hidden))  # (B, heads, M, d)
        k = self.split_heads(self.key(hidden))  # (B, heads, L, d)
        v = self.split_heads(self.value(hidden))  # (B, heads, L, d)
        dropout = self.dropout.p if self.training else 0.0
        if self.fused and not (dropout and hidden.device.type == "cpu"):
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask, dropout_p=dropout)
        else:  # also for dropout on a CPU, for which PyTorch has no fused kernel
            # The dot product of d terms of size 1 has size √d. Divided by √d, scores stay near 1;
            # large ones would saturate the softmax, and its gradient would vanish.
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, heads, M, L)
            if key_mask is not None:
                scores = scores.masked_fill(~key_mask, -math.inf)
            mixed = self.dropout(scores.softmax(dim=-1)) @ v  # (B, heads, M, d)
        return self.output(mixed.transpose(1, 2).flatten(2))  # (B, M, H)

    def split_heads(self, x):
        """(B, L, H) -> (B, heads, L, d): each head has its own slice of the width."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Attention, then a feed-forward layer; what each adds to its input goes through dropout.

    Each sum is normalised after the addition (post-LayerNorm), as in Vaswani et al. 2017 §3.1 and
    BERT. Later models normalise before, but BERT's weights fit this order alone."""

    def __init__(self, config: BertConfig):
        super().__init__()
        H = config.hidden_size
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(H, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(H, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, H)
        self.output_norm = nn.LayerNorm(H, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden, key_mask=None, queries=None):
        """(B, L, H) -> (B, L, H), or (B, M, H) with queries (B, M): the columns that are wanted.

        Every position is read as key and value. Queries, and all that comes after attention, are
        needed only where somebody reads the output."""
        query_hidden = hidden  # (B, L, H)
        if queries is not None:
            query_hidden = hidden.take_along_dim(queries[..., None], dim=1)  # (B, M, H)
        attended = self.attention(query_hidden, hidden, key_mask)  # (B, M, H)
        hidden = self.attention_norm(query_hidden + self.dropout(attended))
        transformed = self.output(F.gelu(self.intermediate(hidden)))
        return self.output_norm(hidden + self.dropout(transformed))


class Bert(nn.Module):
    """The encoder. `pooler=True` adds the layer that BERT puts on [CLS] before a classifier."""

    def __init__(self, config: BertConfig, pooler: bool = False):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if pooler else None
        init_weights(self, config)

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None,
                inputs_embeds=None, queries=None):
        """Hidden states (B, L, H), or (B, M, H) with queries (B, M), the columns that are wanted.

        input_ids (B, L), or inputs_embeds (B, L, H) in their place; attention_mask (B, L), 1 on
        tokens and 0 on padding, None where nothing is padded; token_type_ids (B, L)."""
        hidden = self.embeddings(input_ids, token_type_ids, inputs_embeds)  # (B, L, H)
        key_mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        for block in self.layers[:-1]:
            hidden = block(hidden, key_mask)
        # No other block reads the last one's output, so it runs on the queries alone: at 15%
        # masked this saves over a third of the encoder's work in a model of two layers.
        return self.layers[-1](hidden, key_mask, queries)


# --- heads ----------------------------------------------------------------------------------------

class MaskedLMHead(nn.Module):
    """Hidden states -> logits over the vocabulary (BERT §3.1, task 1).

    The decoder is tied: a logit is the dot product with that word's input embedding, plus a bias
    per word. This saves V × H parameters, and every prediction trains the embeddings too."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        init_weights(self, config)

    def forward(self, hidden, word_embeddings):
        """(..., H), (V, H) -> (..., V)"""
        transformed = self.norm(F.gelu(self.dense(hidden)))  # (..., H)
        return F.linear(transformed, word_embeddings, self.bias)


class Queries(NamedTuple):
    """The positions of a batch whose output is wanted. Texts want different numbers of them, but
    the rows of a tensor have one length, M, the number of the fullest text.

    columns (B, M): the wanted columns of each text in order, then others that fill the row.
    chosen (N,): the numbers of the wanted ones among all B · M, text by text."""
    columns: Tensor
    chosen: Tensor

    def pick(self, values: Tensor) -> Tensor:
        """values[mask], (N,), of values (B, L), but the program does not wait for the GPU."""
        return values.gather(1, self.columns).flatten()[self.chosen]


def query_positions(mask: Tensor) -> Queries:
    """The Queries of a mask (B, L) bool.

    >>> query_positions(torch.tensor([[False, True, False, True], [False, False, True, False]]))
    Queries(columns=tensor([[1, 3],
            [2, 0]]), chosen=tensor([0, 1, 2]))
    """
    # A shape is known to the host, so the program waits here for the GPU to count M and N: once a
    # batch, as student, teacher and targets share its queries.
    count = mask.sum(1)  # (B,)
    M, N = torch.stack([count.max(), count.sum()]).tolist() if len(mask) else (0, 0)
    # A stable descending sort of 0s and 1s brings the wanted ones to the front, in their order.
    columns = mask.byte().argsort(dim=1, descending=True, stable=True)[:, :M]
    wanted = mask.gather(1, columns).flatten()  # (B · M,), False on the columns that fill a row
    return Queries(columns, wanted.byte().argsort(descending=True, stable=True)[:N])


class BertForMaskedLM(nn.Module):
    """The encoder and the masked-LM head. `positions` are Queries: the result then holds these N
    positions alone, in the order of hidden[mask]. Pretraining reads no others."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        self.head = MaskedLMHead(config)

    def encode(self, input_ids=None, attention_mask=None, token_type_ids=None,
               inputs_embeds=None, positions: Queries | None = None) -> Tensor:
        """The encoder's output (B, L, H), or (N, H) with positions."""
        inputs = (input_ids, attention_mask, token_type_ids, inputs_embeds)
        if positions is None:
            return self.bert(*inputs)
        hidden = self.bert(*inputs, queries=positions.columns)  # (B, M, H)
        return hidden.flatten(0, 1)[positions.chosen]  # (N, H)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V)"""
        return self.head(hidden, self.bert.embeddings.word_embeddings.weight)

    def forward(self, *inputs, **named_inputs) -> Tensor:
        """Logits (B, L, V), or (N, V) with positions. Takes what `encode` takes."""
        return self.logits(self.encode(*inputs, **named_inputs))


class BertForSequenceClassification(nn.Module):
    """The encoder and a classifier on [CLS] (BERT §3.2 and §4.1)."""

    def __init__(self, config: BertConfig, num_labels: int):
        super().__init__()
        self.config = config
        self.bert = Bert(config, pooler=True)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        init_weights(self.classifier, config)

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None,
                inputs_embeds=None) -> Tensor:
        """Logits (B, num_labels)."""
        batch = input_ids if inputs_embeds is None else inputs_embeds
        first = torch.zeros(len(batch), 1, dtype=torch.long, device=batch.device)  # [CLS]: column 0
        cls = self.bert(input_ids, attention_mask, token_type_ids, inputs_embeds,
                        queries=first)  # (B, 1, H)
        pooled = self.bert.pooler(cls[:, 0])  # (B, H)
        pooled = pooled.tanh() if self.config.model_type == "bert" else pooled.relu()
        return self.classifier(self.dropout(pooled))


# --- the start of a fresh model -------------------------------------------------------------------

POSITION_SCALE = 1.5  # the position embeddings' rms, in units of the word embeddings' rms
POSITION_DIRECTIONS = 32  # 94 to 100% of the variance of 128 positions' waves, at any preset
QUERY_KEY_SCALE = 3.0  # g, on queries and on keys: scores grow ninefold


def init_weights(model: nn.Module, config: BertConfig):
    """Sets matrices to N(0, σ²) and biases to 0, in place: as Hugging Face's BERT, but for σ.

    σ is BERT's 0.02 at BERT-base's width H = 768, and proportional to 1 / √H elsewhere (0.049 at
    `tiny`), so that a sum of H products has the same size at every width. A tiny model learns
    sooner with it. `train.py --plain-start` drops `local_start` (below) alone: this σ stays,
    and so does the decoder's bias, which train.py sets to the frequencies' logarithms."""
    std = 0.02 * math.sqrt(768 / config.hidden_size)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


@torch.no_grad()
def local_start(model: nn.Module):
    """Changes a fresh model's start, in place, so that tokens first attend to their neighbours.

    Without this a model must first discover that neighbours matter, and a short run ends before it
    has. With P (positions, H) the position embeddings, W_Q and W_K a layer's query and key matrix:

    1. P[t, 2i] = s sin(ω_i t) and P[t, 2i + 1] = s cos(ω_i t), where ω_i = 10000^(−2i / H)
       (Vaswani et al. 2017 §3.5). P[t] · P[u] = s² Σ_i cos(ω_i (t − u)): it depends on the distance
       of two positions alone, and on the whole falls with it.
    2. W_K = W_Q. A score q · k is then xᵀ W_Qᵀ W_Q y: how alike the hidden states x and y are
       (Trockman and Kolter 2023, 2305.09828: trained models come close to this).
    3. W_Q becomes g W_Q Dᵀ D, g = QUERY_KEY_SCALE. The rows of D (32, H) are the directions in
       which positions differ: a score reads of x and y only what lies in them. Without this, equal
       words, [MASK] above all, would attend to one another wherever they stand.

    All of it is trained from the first step on."""
    embeddings = model.bert.embeddings
    count, H = embeddings.position_embeddings.weight.shape
    frequency = 10_000 ** (-torch.arange(0, H, 2) / H)  # ω, (H / 2,), radians per token
    angle = torch.arange(count)[:, None] * frequency  # (positions, H / 2)
    waves = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # (positions, H)
    rms = embeddings.word_embeddings.weight.square().mean().sqrt().item()
    scale = POSITION_SCALE * rms * math.sqrt(2)  # s; the waves' own rms is 1/√2
    embeddings.position_embeddings.weight.copy_(scale * waves)
    # The slow waves hardly change within a window: nearly all that tells 128 positions apart lies
    # in their first principal directions.
    window = waves[:128]
    principal = torch.linalg.svd(window - window.mean(0), full_matrices=False).Vh
    directions = principal[:POSITION_DIRECTIONS]  # D, (32, H), orthonormal rows
    for layer in model.bert.layers:
        query, key = layer.attention.query.weight, layer.attention.key.weight  # (H, H)
        query.copy_(QUERY_KEY_SCALE * query @ directions.T @ directions)
        key.copy_(query)


# --- checkpoints ----------------------------------------------------------------------------------

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


@torch.no_grad()
def load_pretrained(name_or_dir: str, head: str, num_labels: int | None = None,
                    dropout: float | None = None, whole: bool = False):
    """(model, tokenizer) of a run of ours, a Hugging Face directory or a hub name.

    head: "mlm" or "classification"; num_labels: the checkpoint's by default, or else 2; dropout
    replaces both of the checkpoint's. A head that it lacks starts fresh, and a line says so;
    whole=True refuses this: a fresh head's guesses are noise. Raises InputError."""
    directory = find_pretrained(str(name_or_dir))
    fields, weights = read_json(directory / "config.json"), read_weights(directory)
    try:
        config = config_from_hf(fields, head)
        if dropout is not None:
            config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
        if config.num_hidden_layers > len(weights):  # refused before a billion layers are built
            raise InputError(f"it asks for {config.num_hidden_layers:,} layers")
        if head == "mlm":
            model = BertForMaskedLM(config)
        else:
            saved_labels = weights.get("classifier.bias", torch.zeros(2)).numel()
            model = BertForSequenceClassification(config, num_labels or saved_labels)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{directory}/config.json makes no model here: {error}") from None
    tokenizer = load_tokenizer(directory)
    pieces = 1 + max(tokenizer.get_vocab().values())
    if pieces > config.vocab_size:
        raise InputError(f"{directory}: the tokenizer has {pieces:,} word pieces, the model "
                         f"{config.vocab_size:,}: they do not belong together")
    missing = from_hf(model, weights, str(directory))
    if missing and whole:
        raise InputError(f"{directory} has no whole masked-LM head: its guesses would be noise")
    if missing:
        log.info("%s: %s head freshly initialised: %s", directory, head, ", ".join(missing))
    return model, tokenizer


def save_pretrained(model: nn.Module, tokenizer: Tokenizer, directory: str | Path):
    """Writes a directory that Hugging Face opens; last the weights, which say that it is whole."""
    config, directory = model.config, Path(directory)
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    settings = ROLES | {
        "tokenizer_class": FILE_TOKENIZERS[0],  # takes tokenizer.json as it is
        "model_input_names": inputs if config.model_type == "bert" else inputs[::2],
        "model_max_length": config.max_position_embeddings,  # where truncation=True cuts
    }
    for theirs, ours in NORMALIZER.items():  # for whoever opens it as a BertTokenizer
        if hasattr(tokenizer.normalizer, ours):
            settings[theirs] = getattr(tokenizer.normalizer, ours)
    write_atomic(directory / "config.json", json.dumps(config_to_hf(model), indent=1) + "\n")
    write_atomic(directory / "tokenizer_config.json", json.dumps(settings, indent=1) + "\n")
    write_atomic(directory / "tokenizer.json", tokenizer.to_str())
    write_safetensors(directory / "model.safetensors", to_hf(model))


def find_pretrained(name_or_dir: str) -> Path:
    """A model's directory: a local one, or the hub's, downloaded. A name of the hub has to say
    BERT, so that a mistyped path, as `rns/entropy`, is not looked for there. Raises InputError."""
    path = Path(name_or_dir)
    if path.is_dir():
        return path
    if not re.fullmatch(r"(?i)(distil)?bert-[\w.-]+|\w[\w.-]*/[\w.-]*bert[\w.-]*", name_or_dir):
        raise InputError(f"{name_or_dir} is not a model directory: give a run or a BERT of the hub")
    from huggingface_hub import snapshot_download  # only here: it takes half a second to import
    files = ["config.json", *WEIGHT_FILES, "vocab.txt", "*token*.json"]
    try:
        return Path(snapshot_download(name_or_dir, allow_patterns=files))
    except Exception as error:  # its own, the network's and the server's errors share no base class
        raise InputError(f"{name_or_dir}: the hub did not give it ({type(error).__name__}): check "
                         "the name and the network") from None


def weight_file(directory: Path) -> Path:
    """The path of the first of WEIGHT_FILES that is there. Raises InputError."""
    for name in WEIGHT_FILES:
        if (directory / name).exists():
            return directory / name
    raise InputError(f"{directory} has neither {' nor '.join(WEIGHT_FILES)}; shards are not read")


def weights_digest(name_or_dir: str | Path) -> str:
    """sha256 of a model's weight file: it tells checkpoints apart, whatever they are called."""
    path = weight_file(find_pretrained(str(name_or_dir)))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_weights(directory: Path) -> dict[str, Tensor]:
    """A model's weights; a pickle is read as plain tensors, never as code. Raises InputError."""
    path = weight_file(directory)
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(weight, Tensor) for weight in weights.values()):
            raise TypeError
        return weights
    except Exception as error:  # a damaged file can raise nearly anything
        raise InputError(f"{path} is no sound file of tensors ({type(error).__name__})") from None


# --- Hugging Face's names -------------------------------------------------------------------------

NAMES = [  # (ours, BERT's, DistilBERT's): a regular expression and what replaces it, in this order
    (r"bert\.layers", "bert.encoder.layer", "distilbert.transformer.layer"),
    (r"bert\.embeddings", "bert.embeddings", "distilbert.embeddings"),
    (r"bert\.pooler", "bert.pooler.dense", "pre_classifier"),
    (r"(\d)\.output\.", r"\1.output.dense.", r"\1.ffn.lin2."),  # not attention.output
    ("output_norm", "output.LayerNorm", "output_layer_norm"),
    ("attention.query", "attention.self.query", "attention.q_lin"),
    ("attention.key", "attention.self.key", "attention.k_lin"),
    ("attention.value", "attention.self.value", "attention.v_lin"),
    ("attention.output", "attention.output.dense", "attention.out_lin"),
    ("attention_norm", "attention.output.LayerNorm", "sa_layer_norm"),
    ("intermediate", "intermediate.dense", "ffn.lin1"),
    ("head.dense", "cls.predictions.transform.dense", "vocab_transform"),
    ("head.norm", "cls.predictions.transform.LayerNorm", "vocab_layer_norm"),
    ("head.bias", "cls.predictions.bias", "vocab_projector.bias"),
]
TIED = {  # a second name of the same weight: some files hold both, some only this one
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight",
}
DISTILBERT_FIELDS = {
    "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim", "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout", "hidden_act": "activation",
}


def to_hf(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights under Hugging Face's names."""
    weights = {}
    for name, value in model.state_dict().items():
        for ours, *theirs in NAMES:
            name = re.sub(ours, theirs[model.config.model_type == "distilbert"], name)
        weights[name] = value
    return weights


def from_hf(model: nn.Module, weights: dict[str, Tensor], source: str) -> list[str]:
    """Copies a Hugging Face state dict into `model`, in place; returns the names of our head's
    weights that it lacks, or has for another number of labels. Raises InputError where a weight of
    the encoder is missing or of another shape, or the decoder is not tied to the embeddings."""
    kind, given, missing = model.config.model_type, {}, []
    for name, value in weights.items():
        # Old files call a LayerNorm's weight and bias gamma and beta; an encoder that was saved
        # alone lacks the prefix `bert.` or `distilbert.`.
        name = re.sub("gamma$", "weight", re.sub("beta$", "bias", name))
        bare = re.match(r"(embeddings|encoder|transformer|pooler)\.", name)
        given[f"{kind}.{name}" if bare else name] = value
    for other, name in TIED.items():
        if other in given:
            tied = torch.equal(given.setdefault(name, given[other]).float(), given[other].float())
            if not tied and hasattr(model, "head"):
                raise InputError(f"{source}: {other} is not {name}, and here they are one weight")
    # What state_dict gives shares the parameters' memory.
    for theirs, (name, ours) in zip(to_hf(model), model.state_dict().items()):
        found = given.get(theirs)
        if found is not None and found.shape == ours.shape:
            ours.copy_(found)
        elif name.startswith(("bert.embeddings.", "bert.layers.")):
            shape = "missing" if found is None else tuple(found.shape)
            raise InputError(f"{source}: {theirs} is {shape}, its config.json asks for "
                             f"{tuple(ours.shape)}")
        else:
            missing.append(name)
    return missing


def config_from_hf(fields: dict, head: str) -> BertConfig:
    """A config.json as BertConfig. Raises InputError on what is not computed here."""
    if fields.get("model_type") == "distilbert":
        fields = fields | {ours: fields.get(theirs) for ours, theirs in DISTILBERT_FIELDS.items()}
        fields["layer_norm_eps"] = None  # not a setting of DistilBERT: always the default
    computed = {  # each field that changes the result, and what it may be
        "model_type": ("bert", "distilbert"),
        "hidden_act": ("gelu", "gelu_python"), "position_embedding_type": ("absolute",),
        "is_decoder": (False,), "add_cross_attention": (False,), "quantization_config": (),
        "tie_word_embeddings": (True,) if head == "mlm" else (True, False),
    }
    for name, values in computed.items():
        if fields.get(name) not in (None, *values):
            raise InputError(f"{name} is {fields[name]!r}, which is not implemented")
    names = asdict(BertConfig())
    return BertConfig(**{name: fields[name] for name in names if fields.get(name) is not None})


def config_to_hf(model: nn.Module) -> dict:
    """The config.json with which Hugging Face opens the model."""
    name = type(model).__name__  # ours are BERT's own; DistilBERT's begin with Distil
    fields = asdict(model.config) | {"hidden_act": "gelu", "architectures": [name]}
    if model.config.model_type == "distilbert":
        fields |= {theirs: fields.pop(ours) for ours, theirs in DISTILBERT_FIELDS.items()}
        fields["architectures"] = ["Distil" + name]
    if hasattr(model, "classifier"):
        fields["id2label"] = {i: f"LABEL_{i}" for i in range(model.classifier.out_features)}
    return fields


# --- tokenizers -----------------------------------------------------------------------------------

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROLES = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}  # pad_token: [PAD], …
FILE_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # tokenizer.json says it all
NORMALIZER = {"do_lower_case": "lowercase", "strip_accents": "strip_accents",
              "tokenize_chinese_chars": "handle_chinese_chars"}


def wordpiece_tokenizer(vocab: dict[str, int]) -> Tokenizer:
    """BERT's tokenizer on a vocabulary: cleans, lower-cases and takes accents off, splits on spaces
    and punctuation, then takes the longest word piece that fits, again and again."""
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([token for token in SPECIAL_TOKENS if token in vocab])
    ends = [(token, vocab.get(token, 0)) for token in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return tokenizer


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in tokenizer.json, or else BERT's with vocab.txt; beside either stand its
    class, settings and added tokens. Raises InputError where it is not BERT's."""
    files = ("config.json", "special_tokens_map.json", "tokenizer_config.json", "added_tokens.json")
    config, special, settings, added = (
        read_json(directory / name) if (directory / name).exists() else {} for name in files)
    kind = settings.get("tokenizer_class") or config.get("tokenizer_class") or "BertTokenizer"
    berts = re.fullmatch("(Distil)?BertTokenizer(Fast)?", kind)
    path = directory / "tokenizer.json"
    if berts and not path.exists():
        path = directory / "vocab.txt"
    try:
        if not berts and kind not in FILE_TOKENIZERS:
            raise ValueError(f"it is a {kind}, not BERT's")
        if path.suffix == ".json":
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_truncation()
            tokenizer.no_padding()
        else:  # a word piece's id is the number of its line
            lines = path.read_bytes().decode().split("\n")
            words = {line.rstrip(): i for i, line in enumerate(lines) if line.strip()}
            tokenizer = wordpiece_tokenizer(words)
        if not isinstance(tokenizer.model, models.WordPiece):
            raise ValueError("it is no WordPiece")
        if berts and isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
            for theirs in NORMALIZER.keys() & settings.keys():  # they count more than the file
                setattr(tokenizer.normalizer, NORMALIZER[theirs], settings[theirs])
        add_tokens(tokenizer, special | settings, added)
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{path} cannot be read ({error}): choose another model") from None
    tokenizer.post_processor = wordpiece_tokenizer(tokenizer.get_vocab()).post_processor
    return tokenizer


def add_tokens(tokenizer: Tokenizer, settings: dict, added: dict[str, int]):
    """Adds the tokens that stand beside a vocabulary, in place. Raises ValueError where one would
    get another id than it has there, or where [MASK] or its like is missing or otherwise named."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    extra = extra.values() if isinstance(extra, dict) else extra  # {role: token} in newer files
    special = [*(settings.get(role) or token for role, token in ROLES.items()), *extra]
    special = [token["content"] if isinstance(token, dict) else token for token in special]
    tokens = {i: {"content": token, "special": token in special} for token, i in added.items()}
    tokens = settings.get("added_tokens_decoder", tokens)
    for i in sorted(tokens, key=int):
        tokenizer.add_tokens([AddedToken(**tokens[i])])
        if tokenizer.token_to_id(tokens[i]["content"]) != int(i):
            raise ValueError(f"{tokens[i]['content']} cannot have the id {i}")
    missing = [token for token in SPECIAL_TOKENS
               if token not in special or tokenizer.token_to_id(token) is None]
    if missing:  # some multilingual BERTs have another model's tokenizer
        raise ValueError(f"it lacks {', '.join(missing)}: is it BERT's?")
    tokenizer.add_special_tokens(special)


# --- files ----------------------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file: 8 bytes of header length, a JSON header that gives each
    tensor's dtype, shape and offsets, then the raw numbers. Other than DTYPES is left out;
    a damaged file raises one error or another."""
    data, tensors = bytearray(path.read_bytes()), {}
    start = 8 + int.from_bytes(data[:8], "little")  # where the numbers begin
    header = json.loads(data[8:start].decode())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if (dtype := DTYPES.get(entry["dtype"])) is None:
            continue
        shape, (first, last) = entry["shape"], entry["data_offsets"]
        if min(first, last, *shape) < 0:  # slices count back from it, reshape guesses a size
            raise ValueError(f"the shape and offsets of {name} do not fit")
        raw = data[start + first:start + last]  # shorter where the file was cut: reshape raises
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(shape)
    return tensors


def write_safetensors(path: Path, tensors: dict[str, Tensor]):
    """Writes what `read_safetensors` and Hugging Face read."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, body = {"__metadata__": {"format": "pt"}}, bytearray()
    for name, tensor in tensors.items():
        flat, start = tensor.detach().cpu().contiguous().reshape(-1), len(body)
        body += flat.view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, len(body)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of 8
    write_atomic(path, len(text).to_bytes(8, "little") + text + body)


def write_atomic(path: str | Path, data: str | bytes):
    """Writes a file whole or not at all. Raises RunError where that fails, as on a full disk."""
    path = Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the old file is gone
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}): make room, or choose another "
                       "place") from None
    finally:
        temporary.unlink(missing_ok=True)  # already gone where all went well


def can_write(path: str | Path) -> bool:
    """Whether a file can be made at `path`: its nearest parent that exists is a writable folder."""
    nearest = next(parent for parent in Path(path).absolute().parents if parent.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK)


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises InputError, which names the file, on anything else."""
    if not path.exists():
        raise InputError(f"{path.parent} has no {path.name}: copy it there, or choose another")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"but a {type(found).__name__}")
        return found
    except ValueError as error:
        raise InputError(f"{path} is not a JSON object ({error}): delete or replace it") from None


# --- what the command lines share -----------------------------------------------------------------

def number(kind, low=-math.inf, high=math.inf, above=-math.inf, below=math.inf):
    """An argparse type: a finite int or float, low <= value <= high and above < value < below."""
    def convert(text: str):
        value = kind(text)
        if not (low <= value <= high and above < value < below and math.isfinite(value)):
            bounds = {"at least": low, "at most": high, "above": above, "below": below}
            said = [f"{words} {bound}" for words, bound in bounds.items() if math.isfinite(bound)]
            raise argparse.ArgumentTypeError(f"{text} is not {' and '.join(said) or 'finite'}")
        return value
    convert.__name__ = kind.__name__  # argparse then says "invalid int value: 'many'"
    return convert


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """argparse's help with defaults, but without "(default: None)"."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse, with one line on an error in place of the whole usage."""

    def __init__(self, **options):
        super().__init__(formatter_class=Help, allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def run_cli(main):
    """Runs a command. An error ends it with one line on stderr: status 2 where the input is wrong,
    1 where the machine is (memory, disk), 130 on Ctrl-C."""
    logging.basicConfig(format="%(message)s")
    try:
        return main()
    except (InputError, RunError, argparse.ArgumentTypeError, OSError, KeyboardInterrupt) as error:
        line = " ".join(str(error).split()) or "interrupted"  # one line, whatever it quotes
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        statuses = {InputError: 2, argparse.ArgumentTypeError: 2, KeyboardInterrupt: 130}
        sys.exit(statuses.get(type(error), 1))
