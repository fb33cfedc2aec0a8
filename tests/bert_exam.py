"""BERT's own exam beside ours, so that public logs of pretraining can be placed.

    python tests/bert_exam.py runs/random-0 runs/plain-0 --json out.json

Both ask the same 15% of the held-out tokens. In ours all of them are [MASK]; in BERT's 80% are, 10%
are another token, and 10% stay as they are, so that a model which copies what it reads is right
there, and wrong at the swapped 10%, which look the same. One that does so and else knows
frequencies alone has 0.1 + 0.8 · (frequency alone).
"""
import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from masking import corrupt, evaluating
from model import load_pretrained, query_positions, read_json


def both_exams(run: str) -> dict[str, float]:
    """Accuracies of a run's model: on our exam, on BERT's and on its kept tokens; beside them that
    of frequency alone on our exam, and what copying and frequencies make of BERT's."""
    stored = read_json(Path(run) / "train_args.json")
    args = train.Options(**{each.name: stored[each.name] for each in fields(train.Options)})
    model, tokenizer = load_pretrained(run, "mlm")
    _, windows, _ = train.tokenised_windows(args, tokenizer)
    vocab = train.Vocab(tokenizer, model.config.vocab_size, torch.device("cpu"))
    training, held_out = (train.Texts(windows[part], vocab) for part in ("train", "held_out"))
    exam = train.Exam(held_out, training.token_counts())
    generator = torch.Generator().manual_seed(0)
    right, kept = [], []
    for batch, mask in exam.questions:
        read, _ = corrupt(batch.input_ids, mask, vocab.mask_id, vocab.size, (0.8, 0.1, 0.1),
                          generator, vocab.special_ids)
        with evaluating(model):
            guesses = model(read, positions=query_positions(mask)).argmax(-1)  # (N,)
        right.append(guesses == batch.input_ids[mask])
        kept.append(read[mask] == batch.input_ids[mask])
    right, kept = torch.cat(right), torch.cat(kept)
    frequency = exam.frequency_alone()[1].mean()
    return {"ours": exam.take(model)[1].mean(), "bert": right.float().mean().item(),
            "kept": right[kept].float().mean().item(), "frequency": frequency,
            "copying": 0.1 + 0.8 * frequency}


def main():
    parser = argparse.ArgumentParser(description="Take BERT's exam and ours.")
    parser.add_argument("runs", nargs="+", help="runs of train.py")
    parser.add_argument("--json", type=Path, help="write the accuracies there, too")
    args = parser.parse_args()
    found = {run: both_exams(run) for run in args.runs}
    for run, accuracies in found.items():
        print(run, *(f"{name} {value:.3f}" for name, value in accuracies.items()), sep="  ")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
