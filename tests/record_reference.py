"""Records what Hugging Face's models and tokenizers answer, for tests/test_model.py. Run once,
where transformers is installed (5.24 recorded the tokenizers):

    python tests/record_reference.py

Writes tests/data/reference/NAME: a small random model as `save_pretrained` leaves it, and its
answers to one padded batch of sentence pairs in answers.safetensors. Writes tokenizers.json: the
files that each tokenizer is made of, and its ids of TEXTS.
"""
import itertools
import json
import tempfile
from pathlib import Path

import torch

SIZES = {
    "bert": dict(vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=4,
                 intermediate_size=24, max_position_embeddings=32, initializer_range=0.2),
    "distilbert": dict(vocab_size=60, dim=16, n_layers=3, n_heads=4, hidden_dim=24,
                       max_position_embeddings=32, initializer_range=0.2),
}
CLASSES = {
    ("bert", "mlm"): "BertForMaskedLM",
    ("bert", "classification"): "BertForSequenceClassification",
    ("distilbert", "mlm"): "DistilBertForMaskedLM",
    ("distilbert", "classification"): "DistilBertForSequenceClassification",
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(55))]


def inputs() -> dict[str, torch.Tensor]:
    """Three pairs of 14, 9 and 5 tokens, padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (3, 14), generator=generator)
    attention_mask = torch.arange(14) < torch.tensor([[14], [9], [5]])
    types = (torch.arange(14) >= torch.tensor([[6], [4], [3]])) & attention_mask
    return {"input_ids": ids * attention_mask, "attention_mask": attention_mask.long(),
            "token_type_ids": types.long()}


def record(kind: str, head: str, folder: Path):
    import transformers  # only here: the tests read `inputs` where it is not installed
    from safetensors.torch import save_file
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, num_labels=3, **SIZES[kind])
    model = getattr(transformers, CLASSES[kind, head])(config).eval()
    for p in model.parameters():  # biases and LayerNorms too, so that a lost one shows
        p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    batch = inputs()
    if kind == "distilbert":
        del batch["token_type_ids"]
    with torch.no_grad():
        answer = model(**batch, output_hidden_states=True)
    hidden = answer.hidden_states[-1].contiguous()
    save_file({"logits": answer.logits, "hidden": hidden}, folder / "answers.safetensors")


# --- tokenizers -----------------------------------------------------------------------------------

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "mochte", "möchte", "Mochte", "Möchte", "漢",
          "字", "漢字", "a", "##b", "ab", "##ab"]
TEXTS = ["Möchte MÖCHTE mochte", "漢字 a漢字", "a\0b a\u00a0b\tab aab",
         "covid19 COVID19 acovid19b ab", "a [MASK] [mask] [E1] [e1]"]
COVID = {"content": "covid19", "lstrip": False, "normalized": True, "rstrip": False,
         "single_word": False, "special": False}


def tokenizer_files() -> list[dict]:
    """Every choice of the three settings that BERT's normaliser has there; tokens beside the
    vocabulary, in each form; tokenizer.json with each kind of normaliser."""
    choices = {"do_lower_case": (..., True, False), "strip_accents": (..., None, True, False),
               "tokenize_chinese_chars": (..., False)}  # ...: the file does not say
    found = []
    for values in itertools.product(*choices.values()):
        given = {name: value for name, value in zip(choices, values) if value is not ...}
        found.append({"tokenizer_config.json": given})
    for fields in (COVID, COVID | {"single_word": True}, COVID | {"normalized": False}):
        found.append({"tokenizer_config.json": {"added_tokens_decoder": {"16": fields}}})
    found.append({"added_tokens.json": {"covid19": 16}})
    found.append({"added_tokens.json": {"[E1]": 17, "covid19": 16},
                  "tokenizer_config.json": {"additional_special_tokens": ["[E1]"]}})
    found.append({"special_tokens_map.json": {"additional_special_tokens": ["[E1]", "ab"]}})
    sequence = [{"type": "NFC"}, {"type": "Lowercase"}]
    for normalizer in ({"lowercase": False}, {"strip_accents": False}, {"clean_text": False},
                       {"handle_chinese_chars": False}, None, {"type": "Lowercase"},
                       {"type": "Sequence", "normalizers": sequence}):
        found.append({"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
                      "tokenizer.json": normalizer})
    for settings in ({"do_lower_case": True}, {"do_lower_case": False, "strip_accents": True},
                     {"do_lower_case": True, "tokenizer_class": "PreTrainedTokenizerFast"}):
        found.append({"tokenizer_config.json": settings, "tokenizer.json": {"lowercase": False}})
    return found


def write_tokenizer(files: dict, folder: Path, kind: str = "bert"):
    """Writes the files, and beside them vocab.txt and a config.json. Of tokenizer.json `files`
    holds the normaliser alone, or what differs in it from BERT's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in PIECES))
    for name, content in files.items():
        if name == "tokenizer.json":
            vocab = {piece: i for i, piece in enumerate(PIECES)}
            tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
            tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            tokenizer.decoder = decoders.WordPiece()
            tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
            tokenizer.add_special_tokens(PIECES[:5])
            berts = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                     "strip_accents": None, "lowercase": True}
            if content is not None and "type" not in content:
                content = berts | content
            content = json.loads(tokenizer.to_str()) | {"normalizer": content}
        (folder / name).write_text(json.dumps(content))


def record_tokenizers(path: Path):
    from transformers import AutoTokenizer
    rows = []
    for files in tokenizer_files():
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(files, Path(folder))
            tokenizer = AutoTokenizer.from_pretrained(folder)
            rows.append({"files": files, "ids": [tokenizer(text)["input_ids"] for text in TEXTS]})
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    reference = Path(__file__).parent / "data" / "reference"
    for kind, head in CLASSES:
        record(kind, head, reference / f"{kind}-{head}")
    record_tokenizers(reference / "tokenizers.json")
