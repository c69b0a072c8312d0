"""What transformers' own Trainer logs as the loss of one step over eight rows; a script that each rank executes.

python hf_trainer.py MODEL FOLDER ACCUMULATION     prints {"mean": plain mean over the rows, "logged": Trainer's}
"""

from __future__ import annotations

import json
import os
import sys

import torch
from transformers import GPTJForSequenceClassification, Trainer, TrainingArguments

ROWS, LENGTH = 8, 12


def main(model: str, folder: str, accumulation: int) -> None:
    torch.manual_seed(0)
    classifier = GPTJForSequenceClassification.from_pretrained(
        model, num_labels=2, pad_token_id=1023
    )
    ids = torch.randint(0, 1000, (ROWS, LENGTH))
    data = [{"input_ids": row, "labels": i % 2} for i, row in enumerate(ids)]
    with torch.no_grad():
        logits = torch.cat([classifier(input_ids=row[None]).logits for row in ids])
    mean = float(torch.nn.functional.cross_entropy(logits, torch.arange(ROWS) % 2))
    ranks = int(os.environ["WORLD_SIZE"])
    arguments = TrainingArguments(
        folder,
        max_steps=1,
        per_device_train_batch_size=ROWS // accumulation // ranks,
        learning_rate=0.0,
        report_to=[],
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        ddp_backend="gloo",
    )
    trainer = Trainer(classifier, arguments, train_dataset=data)
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    if os.environ["RANK"] == "0":
        print("FOUND" + json.dumps({"mean": mean, "logged": logged}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
