"""Train a teacher that ships in data/, on one CPU core in 5 (reviews, glosses) to 30 minutes (scans).

    OMP_NUM_THREADS=1 python scripts/train_teacher.py reviews|glosses|scans [--steps N]

reviews, glosses: all-MiniLM-L6-v2 with LoRA on every linear layer of the encoder; pooler and classifier are trained in
full. scans: a character-level GPT-2 from scratch, with fresh noise each epoch.
Both are trained on `teacher_train` only; validation is printed, test is measured once, at the end, on what was saved.
"""

import argparse
import math
import random
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from _build import DATA, register
from torch import Tensor, nn
from torch.nn import functional as F

from fakit.evaluation import evaluate
from fakit.models.load import load_teacher, resolve_model
from fakit.tasks import MINILM, TextTask, load_task
from fakit.tasks.scans import add_scan_noise, scan_tokenizer
from fakit.training.precision import autocast


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one teacher; the learning rate falls to a hundredth along a cosine."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01


RECIPES = {
    "reviews": Recipe(steps=564, batch=32, learning_rate=1e-3, warmup=50),
    "glosses": Recipe(steps=700, batch=32, learning_rate=1e-3, warmup=50),
    "scans": Recipe(steps=6400, batch=64, learning_rate=2e-3, warmup=100, betas=(0.9, 0.98)),
}


def fit(
    model: nn.Module,
    groups: list[dict],
    recipe: Recipe,
    epochs: Iterable[list[dict]],
    collate: Callable[[list[dict]], dict[str, Tensor]],
    loss_of: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    validate: Callable[[nn.Module], dict[str, float]],
) -> None:
    """AdamW with a warm-up, then a cosine; bf16 autocast where it is the faster; gradients clipped to norm 1. `epochs`
    yields encoded examples, epoch by epoch.
    """

    def factor(step: int) -> float:
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        done = (step - recipe.warmup) / (recipe.steps - recipe.warmup)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))

    optimizer = torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    parameters = [parameter for group in groups for parameter in group["params"]]
    start, step = time.process_time(), 0
    model.train()
    for examples in epochs:
        order = torch.randperm(len(examples)).tolist()
        for first in range(0, len(order), recipe.batch):
            batch = collate([examples[i] for i in order[first : first + recipe.batch]])
            with autocast("cpu"):
                loss = loss_of(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 100 == 0:
                print(f"step {step:5d}  loss {loss.item():.4f}  cpu {time.process_time() - start:.0f} s", flush=True)
            step += 1
            if step == recipe.steps:
                print(f"trained in {time.process_time() - start:.0f} CPU seconds", flush=True)
                return
        print(f"after {step} steps, validation: {validate(model)}", flush=True)


def train_adapter(task: TextTask, recipe: Recipe) -> None:
    """MiniLM + LoRA (Hu et al. 2022, rank 16, α 32) for a classification; saves the adapter,
    and the config that tells the head's size.
    """
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    base = resolve_model(MINILM)
    names = dict(enumerate(task.label_names))
    ids = {v: k for k, v in names.items()}
    config = AutoConfig.from_pretrained(
        base, num_labels=len(names), id2label=names, label2id=ids, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    model = AutoModelForSequenceClassification.from_pretrained(base, config=config, trust_remote_code=False)
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=r".*encoder.*\.(query|key|value|dense)",
        modules_to_save=["pooler", "classifier"],
    )
    model = get_peft_model(model, lora)
    model.peft_config["default"].base_model_name_or_path = MINILM  # not this machine's path

    def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        labels = batch.pop("labels")  # (B,)
        return F.cross_entropy(model(**batch).logits.float(), labels)  # logits (B, C)

    examples = task.encode("teacher_train", tokenizer).to_list()
    held_out, collate = task.encode("validation", tokenizer), task.collator(tokenizer)
    trained = [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]
    epochs = iter(lambda: examples, None)  # the same examples for ever
    fit(model, trained, recipe, epochs, collate, loss_of, lambda model: evaluate(model, held_out, collate, task))

    folder = DATA / "adapters" / task.name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    config.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    saved = load_teacher(MINILM, task="sequence-classification", adapter=folder)
    print("test:", evaluate(saved, task.encode("test", tokenizer), collate, task))


def train_decoder(task: TextTask, recipe: Recipe) -> None:
    """GPT-2 (Radford et al. 2019), 4 layers of width 128, on characters; no dropout,
    since every epoch brings new noise.
    """
    from datasets import Dataset
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = scan_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_layer=4,
        n_embd=128,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2LMHeadModel(config)
    model.set_attn_implementation("eager")  # at this size a third faster than sdpa under bf16 on a CPU
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    rest = [parameter for parameter in model.parameters() if parameter.ndim < 2]

    def epochs() -> Iterable[list[dict]]:
        lines, seed = task.teacher_train["target"], 1000  # seed 0 is the noise of the splits
        while True:
            pairs = Dataset.from_dict({"source": [add_scan_noise(line, seed) for line in lines], "target": lines})
            yield task.encode(pairs, tokenizer).to_list()
            seed += 1

    def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        labels = batch["labels"][:, 1:]  # (B, T-1)
        hidden = model.transformer(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[
            :, :-1
        ]  # (B, T-1, d)
        counted = labels != -100
        return F.cross_entropy(
            model.lm_head(hidden[counted]).float(), labels[counted]
        )  # the head runs where a label counts only

    held_out, collate = task.encode("validation", tokenizer), task.collator(tokenizer)
    fit(
        model,
        [{"params": matrices}, {"params": rest, "weight_decay": 0.0}],
        recipe,
        epochs(),
        collate,
        loss_of,
        lambda model: evaluate(model, held_out, collate, task, tokenizer),
    )
    folder = DATA / "teachers" / task.name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved, test = load_teacher(folder, task="causal-lm"), task.encode("test", tokenizer)
    print("test:", evaluate(saved, test, collate, task, tokenizer, max_examples=len(test)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(RECIPES))
    parser.add_argument("--steps", type=int, help="fewer or more than the recipe's")
    args = parser.parse_args()
    recipe = RECIPES[args.task]
    if args.steps is not None:
        recipe = Recipe(**{**vars(recipe), "steps": args.steps})
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(1)
    task = load_task(args.task)
    train = train_decoder if args.task == "scans" else train_adapter
    train(task, recipe)
    folder = DATA / ("teachers" if args.task == "scans" else "adapters") / args.task
    trained_on = f"trained on data/{args.task}.jsonl.gz (teacher_train)"
    source = trained_on if args.task == "scans" else f"LoRA adapter of {MINILM} (Apache-2.0), {trained_on}"
    for path in sorted(folder.iterdir()):
        register(path, source=source, license="Apache-2.0", script=f"scripts/train_teacher.py {args.task}")


if __name__ == "__main__":
    main()
