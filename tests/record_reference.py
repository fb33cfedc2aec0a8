"""Records what Hugging Face's models answer, for tests/test_model.py. Run once, where transformers
is installed:

    python tests/record_reference.py

Writes tests/data/reference/NAME: a small random model as `save_pretrained` leaves it, and its
answers to one padded batch of sentence pairs in answers.safetensors.
"""
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


if __name__ == "__main__":
    for kind, head in CLASSES:
        record(kind, head, Path(__file__).parent / "data" / "reference" / f"{kind}-{head}")
