"""Training for real: `DistillationTrainer` is a `transformers.Trainer` whose model is student + projections in one
module.

Everything that lives in the Trainer therefore works as documented there: Accelerate, mixed precision, accumulation,
gradient checkpointing, checkpoints, resume, callbacks, TensorBoard. The student exports without projections,
as a plain transformers model.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DataCollatorWithFlattening, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from fakit.files import check_room
from fakit.models.kinds import is_causal_lm, ties, untie, without_layerdrop, without_rescaling
from fakit.models.load import is_quantized
from fakit.models.peft_students import base_fingerprint, check_adapter, is_adapted
from fakit.models.random_state import random_state_kept
from fakit.models.tables import TEACHER_BATCH, CheckedCollator, Tables, check_data, tables
from fakit.objective.balancing import GradientNorm, Uncertainty
from fakit.objective.diagnosis import whose_numbers
from fakit.objective.features import Features
from fakit.objective.needs import Needs
from fakit.objective.objective import Objective
from fakit.objective.outputs import Outputs
from fakit.objective.units import Units, fit_units
from fakit.tasks.two_tokenizers import COLUMNS, BothCollator
from fakit.tracing.inputs import MODEL_INPUTS, left_padding, refuse_mixing, taken_columns
from fakit.tracing.trace import Trace
from fakit.training.callbacks import EpochCallback, ScheduleCallback, StandardizationCallback
from fakit.training.checkpoint_files import part, read_settings, read_state, write_objective, write_student
from fakit.training.checkpoints import begin as begin_checkpoint
from fakit.training.checkpoints import check as check_checkpoint
from fakit.training.checkpoints import give_up as give_up_checkpoint
from fakit.training.checkpoints import last_whole_checkpoint, versions
from fakit.training.checkpoints import rotate as rotate_checkpoints
from fakit.training.checkpoints import seal as seal_checkpoint
from fakit.training.distiller import Distiller, refuse_reentrant, teacher_traced, traced
from fakit.training.distributed import (
    check_sharding,
    forget_state,
    load_whole_state,
    own_state,
    shards_on_cpus,
    whole_state,
)
from fakit.training.fit import check_fit, check_parameters, check_two_tokenizers, refuse_shared
from fakit.training.logged import Logged
from fakit.training.on_policy.fit import rollouts
from fakit.training.on_policy.rollouts import WRITTEN
from fakit.training.on_policy.settings import OnPolicy
from fakit.training.ownership import (
    argument_facts,
    bytes_of_checkpoint,
    data_fingerprint,
    objective_facts,
    student_facts,
)
from fakit.training.packed import check_packed
from fakit.training.precision import precision_name, settle
from fakit.training.teacher_cache import TeacherCache
from fakit.training.teacher_cache.fingerprints import fingerprint
from fakit.training.teacher_cache.training import ROW, CachedRowsCollator, CachedTeacher, recorded_teacher, with_rows
from fakit.training.token_counts import counts, shares

logger = logging.getLogger(__name__)


class DistillationTrainer(Trainer):
    """A `transformers.Trainer` for a teacher, a student and an objective.

    Args:
        teacher: frozen here and put in eval mode; moved to the training device unless quantized. May be None where
            there is a cache.
        student: trained; `trainer.save_model(folder)` and `trainer.student.save_pretrained(folder)` export it alone.
        objective: its projections are made here and trained, and checkpointed beside the student.
        args: `transformers.TrainingArguments`; bf16 may be "auto", see `fakit.training.precision`.
        teacher_tokenizer: compared with `processing_class` before training, if both are given. Where they differ, rows
            and batches are those of `fakit.tasks.two_tokenizers`.
        teacher_cache: a `TeacherCache` of the training data, which is read in every step instead of running the
            teacher. The rows of train_dataset are found in it by their tokens, so that shuffling, subsets and padding
            do not matter; a row that it lacks, and a collator that changes tokens (masked language modeling),
            are refused.
        on_policy: `fakit.training.on_policy.OnPolicy`: in some steps a causal language model writes the answers itself,
            and the teacher scores them. The Trainer's own random numbers are the same with it and without.
        kwargs: everything else of `transformers.Trainer` (train_dataset, eval_dataset, data_collator, processing_class,
            compute_metrics, callbacks, optimizers …).

    Logs, beside the Trainer's own: each term before weighting under its name, each layer pair as "features/S1_T2",
    averaged over the steps since the last log that had it; the weights and τ of the last of these steps as
    "weight/features" and "temperature"; of a scheduled weight also the mean of the weighted term,
    "weighted/features". `trainer.objective.weights` may be set while training. On-policy: "on_policy/share" of the
    steps, "on_policy/tokens" an answer, "on_policy/ended", the share of the answers that did, and
    "on_policy/tokens_per_second" of writing.

    Raises:
        ValueError: before any work, when teacher, student and objective do not fit: what both sides have, and the fix.
    """

    def __init__(
        self,
        teacher: PreTrainedModel | None,
        student: PreTrainedModel,
        objective: Objective,
        args=None,
        teacher_tokenizer=None,
        teacher_cache: TeacherCache | None = None,
        on_policy: OnPolicy | None = None,
        **kwargs,
    ):
        if teacher is None and teacher_cache is None:
            raise ValueError("neither a teacher nor a cache of one was given; pass teacher=… or teacher_cache=….")
        args = TrainingArguments("tmp_trainer") if args is None else args
        settle(args)
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor} smooths the Trainer's own loss, and here the "
                "objective makes the loss; leave it 0 (the outputs term is soft labels already)."
            )
        rows = kwargs.get("train_dataset")
        if hasattr(type(rows), "__len__") and len(rows) == 0:
            raise ValueError("train_dataset has no rows: there is nothing to train on.")
        if args.n_gpu > 1:
            logger.warning("Training on one of %d GPUs; `accelerate launch` starts a process on each.", args.n_gpu)
            args._n_gpu = 1  # not DataParallel, whose replicas lose their breakdown
        if args.activation_checkpointing:
            refuse_reentrant(args.activation_checkpointing_kwargs)
        tokenizer = kwargs.get("processing_class")
        described = recorded_teacher(teacher_cache) if teacher is None else teacher
        check_fit(described, student, objective, teacher_tokenizer, tokenizer)
        objective.prepare(*(m.config.get_text_config().hidden_size for m in (student, described)))
        layers = [objective.needs_of(name, "student") for name in objective.terms]
        if any(needs.layers for needs in layers) and (off := without_layerdrop(student)):
            logger.warning(
                "The student's %s is set to 0: its layers are matched, and a layer that is left out has nothing to "
                "match.",
                ", ".join(f"{name} ({value})" for name, value in off.items()),
            )
        for model in (teacher, student):
            if model is not None and without_rescaling(model):
                logger.warning("%s no longer rescales its weights when it is evaluated.", type(model).__name__)
        if is_adapted(student):
            check_adapter(student)
        if teacher is None and any(term.batches for term in objective.of_kind(Units).values()):
            raise ValueError(
                "Units(batches=…) scores units by the teacher's own gradients, which a cache does not hold: score "
                "them beforehand (fakit.objective.units.fit_units), or give the teacher, too."
            )
        if isinstance(kwargs.get("data_collator"), BothCollator):
            check_two_tokenizers(objective, teacher_cache is not None, on_policy is not None)
        self.rollouts = None
        if on_policy is not None:
            collator = kwargs.get("data_collator")
            self.rollouts = rollouts(
                on_policy, teacher, student, objective, rows, collator, tokenizer, teacher_cache is not None
            )
        if teacher is not None:
            refuse_shared(teacher, student)
            teacher.eval().requires_grad_(False)
        self.cached_teacher = None
        if teacher_cache is not None:
            self.cached_teacher = CachedTeacher(teacher_cache, objective, teacher, teacher_tokenizer or tokenizer)
            if kwargs.get("train_dataset") is not None:
                kwargs["train_dataset"] = with_rows(teacher_cache, kwargs["train_dataset"])
        self._bare_rows = rows
        distiller = Distiller(teacher, student, objective)
        if (
            args.neftune_noise_alpha is not None
        ):  # its noise goes to the student's; a method of the class FSDP2 would shard by
            distiller.get_input_embeddings = student.get_input_embeddings
        super().__init__(model=distiller, args=args, **kwargs)
        if self.cached_teacher is not None:
            labeled = teacher_cache.content.tokens != "all"
            self.data_collator = CachedRowsCollator(self.data_collator, labeled)
        elif not is_quantized(teacher):
            teacher.to(self.args.device)
        self._ask_beforehand([student] if self.cached_teacher is not None else [student, teacher], tokenizer)
        self.teacher, self.student, self.objective = teacher, student, objective
        if self.rollouts is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "on-policy distillation and a student in shards (FSDP, DeepSpeed): each of its tokens would gather all "
                "of it. Train a whole student in each process (DDP), or leave on_policy out."
            )
        check_packed(self.train_dataset, self.data_collator, objective, student, teacher, args, self.cached_teacher)
        if isinstance(objective.balancing, GradientNorm):
            self._prepare_gradient_norms(objective.balancing)
        self.epochs = EpochCallback(objective)
        self.add_callback(self.epochs)
        self.add_callback(ScheduleCallback(objective))
        self.add_callback(StandardizationCallback(self.gather_as_asked))
        self.logged = Logged()
        self._is_checkpoint = False
        # settings that the steps follow from and that are not seen here, such as an experiment's: a checkpoint is bound
        # to them, too
        self.bound_to: dict[str, Any] = {}
        self._objective_facts = objective_facts(objective)  # as it was made: weights may be set while training
        self._fingerprints: dict[str, Any] | None = None

    def _prepare_gradient_norms(self, balancing: GradientNorm) -> None:
        wrapped = {"torch_compile": self.args.torch_compile, "FSDP": self.is_fsdp_enabled}
        if asked := [name for name, is_on in wrapped.items() if is_on]:
            raise ValueError(
                f"{asked[0]} and balancing by gradient norms: a term's gradient by itself cannot be taken inside of a "
                "compiled or sharded step. Use balancing='uncertainty', or leave one of the two out."
            )
        balancing.watch(self.student)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The Trainer's; what balancing learns, and a learned temperature, are groups of their own, with their learning
        rates and no weight decay.
        """
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        for place, learning_rate in _own_rates(self.objective).items() if made else ():
            named = (self.model if model is None else model).named_parameters()
            own = [p for name, p in named if place in name]
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if not any(p is one for one in own)]
            optimizer.add_param_group({"params": own, "lr": learning_rate, "weight_decay": 0.0})
        return optimizer

    def _ask_beforehand(self, models: list[PreTrainedModel], tokenizer) -> None:
        """What capture would ask of the models at the first batch that wants it: now, while they are whole,
        and before any work.
        """
        collator = getattr(self.data_collator, "collator", self.data_collator)
        for model in models:
            if isinstance(collator, DataCollatorWithFlattening):
                refuse_mixing(model)
            if getattr(tokenizer, "padding_side", "right") == "left":
                left_padding(model)

    @property
    def distiller(self) -> Distiller:
        """Student and objective without what wraps them (DDP, FSDP, compile)."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def precision(self) -> str:
        """What the forward passes compute in: "float32", or "bf16" (autocast)."""
        return precision_name(self.accelerator.mixed_precision)

    def create_accelerator_and_postprocess(self) -> None:
        """Set up Accelerate; `--use_fsdp` shards on CPUs, too."""
        forget_state()
        with shards_on_cpus():
            super().create_accelerator_and_postprocess()
        own_state(self.accelerator)
        check_sharding(self.accelerator)

    def gather_as_asked(self) -> None:
        """What terms ask to be gathered before the first step."""
        self.standardize_as_asked()
        self.choose_units_as_asked()

    def standardize_as_asked(self) -> None:
        """Gather statistics where terms ask for it (`standardize_batches`) and they are not there yet."""
        asked = [term.standardize_batches for term in self.objective.of_kind(Features).values()]
        batches = max([number for number in asked if number is not None], default=0)
        if batches and not all(self.objective.standardizations.values()):
            self.gather_standardization(batches)

    def choose_units_as_asked(self) -> None:
        """Score the teacher's units where terms ask for it (`Units(batches=…)`) and they are not scored yet."""
        terms = list(self.objective.of_kind(Units).values())
        batches = max([term.batches for term in terms if term.batches is not None], default=0)
        scores = [term.scores(layer) for term in terms for layer in term.layers()]
        if not batches or all(found is not None and int(found.tokens) for found in scores):
            return
        several = self.args.world_size > 1
        read = (Trainer._prepare_inputs(self, batch) for batch in islice(self.get_train_dataloader(), batches))
        own = ({k: v for k, v in batch.items() if k != ROW} for batch in read)
        with random_state_kept(self.args.device), self.accelerator.autocast():
            gather = (lambda x: self.accelerator.gather(x.to(self.args.device))) if several else None
            found = fit_units(self.objective, self.teacher, own, gather)
        logger.info("Units of the teacher are scored, by teacher layer over so many tokens: %s", found)

    def gather_standardization(self, batches: int) -> None:
        """Gather what terms standardize the teacher by over the first training batches. The run's random numbers and
        its data stay where they are.
        """
        needs = Needs()
        for name, term in self.objective.terms.items():
            needs = needs | Needs.of(term.cached(), f"the {name} term's cached()")

        def traces() -> Iterator[Trace]:
            for batch in islice(self.get_train_dataloader(), batches):
                batch = Trainer._prepare_inputs(self, batch)
                rows = batch.pop(ROW, None)
                if rows is not None and self.cached_teacher is not None:
                    yield self.cached_teacher.statistics(rows, self.args.device)
                else:
                    yield traced(self.teacher, batch, replace(needs, logits=False))

        with random_state_kept(self.args.device), torch.no_grad(), self.accelerator.autocast():
            several = self.args.world_size > 1
            found = self.objective.fit_standardization(
                traces(), (lambda x: self.accelerator.gather(x.to(self.args.device))) if several else None
            )
        logger.info("Standardizations of the teacher, and the tokens they are of: %s", found)

    # -- the step -------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, each with its shares where a step has more than one,
        here or in other processes; on-policy as the student wrote them.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.rollouts is not None and batches:
            state, process = self.state, self.args.process_index
            with self.accelerator.autocast():
                batches = self.rollouts.in_place_of(
                    batches, self.args.seed, state.global_step, state.max_steps, process
                )
        if batches and len(batches) * self.args.world_size > 1:
            student = self.distiller.student
            causal, tokens = is_causal_lm(student), student.get_output_embeddings() is not None
            parts = [counts(self.objective, batch, causal, tokens) for batch in batches]
            for batch, share in zip(batches, shares(parts, self.accelerator.gather), strict=True):
                batch["shares"] = share
        return batches, num_items

    def _prepare_inputs(self, inputs: dict) -> dict:
        # a cached teacher is read here, outside of the module that DDP, FSDP or compile wraps
        inputs = super()._prepare_inputs(inputs)
        rows = inputs.pop(ROW, None)
        if rows is not None and self.model.training:
            inputs["theirs"] = self.cached_teacher.trace(rows, self.args.device)
        return inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective's total; the breakdown goes into the running means of the log."""
        outputs = model(**inputs)
        if model.training:
            self._last_inputs = inputs
            self.logged.add(self.objective, self.distiller.breakdown)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _whose_numbers(self, name: str, pairs: list) -> str:
        """On an accelerator, which looks when it logs: the last batch's teacher once more.
        The student has stepped since.
        """
        inputs = {key: x for key, x in self._last_inputs.items() if key not in ("shares", "theirs", WRITTEN)}
        theirs = self._last_inputs.get("theirs")
        if theirs is None and self.teacher is not None and self.objective.needs_of(name, "teacher"):
            with torch.no_grad():
                own = inputs.pop(TEACHER_BATCH, None)
                theirs = teacher_traced(self.teacher, inputs, own, self.objective.needs("teacher"))
        return whose_numbers(self.objective.terms[name], pairs, None, theirs)

    def written(self) -> dict[str, float] | None:
        """What the student wrote on-policy since `train` was called, in all processes
        (`fakit.training.on_policy.rollouts.Tally.summary`); None where it does not. Every process calls it.
        """
        if self.rollouts is None:
            return None
        return self.rollouts.in_all.summary(self.accelerator.gather, self.args.device)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the terms' means since the last log; on an accelerator this is where a NaN is found and named."""
        if "loss" in logs and self.logged.sums:
            self.distiller.breakdown.check(self._whose_numbers)
            logs |= self.logged.take(self.accelerator.gather)
            if self.rollouts is not None:
                logs |= self.rollouts.take(self.accelerator.gather, self.args.device)
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self):
        # the columns worth keeping are those that the student's or the teacher's forward pass takes, not the wrapper's
        if self._signature_columns is None:
            model, self.model = self.model, self.distiller.student
            super()._set_signature_columns_if_needed()
            self.model = model
            for side in (self.distiller.student, self.distiller.teacher):
                taken = None if side is None else taken_columns(side)
                self._signature_columns += sorted(
                    (MODEL_INPUTS if taken is None else taken) - {*self._signature_columns}
                )
            self._signature_columns += [ROW, *COLUMNS]

    # -- checkpoints: the student as transformers writes it, the rest beside it ------------------------------------

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args, **kwargs):
        """The Trainer's, from a checkpoint of this run alone: see `fakit.training.checkpoints`;
        True takes the newest that is whole.

        Raises:
            ValueError: before any step: a checkpoint that is damaged, or was written with other settings, models, data
                or versions (each is named); a folder for checkpoints that cannot be written to or is too full.
        """
        check_parameters("student", self.student)
        if self.teacher is not None:
            check_parameters("teacher", self.teacher)
        self._check_data()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir, self.args.world_size)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"{self.args.output_dir} holds no whole checkpoint to resume from: train() without it, or name one."
                )
        if resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint, self.whose())
            resume_from_checkpoint = str(resume_from_checkpoint)
        if self.args.save_strategy != SaveStrategy.NO and self.args.should_save:
            one = bytes_of_checkpoint(self.student, self.objective, self.args.optim)
            check_room(self.args.output_dir, (1 + (self.args.save_total_limit or 1)) * one, "checkpoints")
        own_state(self.accelerator)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        """The Trainer's, in this trainer's precision."""
        own_state(self.accelerator)
        return super().evaluation_loop(*args, **kwargs)

    @property
    def _labeled(self) -> bool:
        return any(term.needs_labels for term in self.objective.terms.values())

    def _sides(self) -> dict[str, Tables]:
        """The models that read the training data. A cached teacher has read it already."""
        compared = any(self.objective.needs_of(name, "teacher") for name in self.objective.terms)
        runs = {"teacher": self.teacher} if compared and self.cached_teacher is None else {}
        return {side: tables(model) for side, model in (runs | {"student": self.student}).items()}

    def _check_data(self) -> None:
        sides, task = self._sides(), self._labeled
        own = isinstance(self.data_collator, BothCollator)  # the teacher reads other tokens, seen in each batch
        read = {"student": sides["student"]} if own else sides
        check_data(self._bare_rows, self.data_collator, read, "train_dataset", task)
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for name, rows in evaluated.items():
            what = f"eval_dataset[{name!r}]" if name else "eval_dataset"
            check_data(rows, self.data_collator, {"student": sides["student"]}, what, task=True)

    def get_train_dataloader(self):
        """The Trainer's, whose batches are looked at before the models read them."""
        with self._looking_at_batches(self._sides(), self._labeled):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None):
        """The Trainer's, whose batches are looked at before the student reads them."""
        with self._looking_at_batches({"student": tables(self.student)}, task=True):
            return super().get_eval_dataloader(eval_dataset)

    @contextmanager
    def _looking_at_batches(self, sides: dict[str, Tables], task: bool) -> Iterator[None]:
        collator = self.data_collator
        self.data_collator = CheckedCollator(collator, sides, task)
        try:
            yield
        finally:
            self.data_collator = collator

    def whose(self) -> dict[str, Any]:
        """What a checkpoint of this trainer is bound to; plain JSON."""
        if self._fingerprints is None:  # of all bytes of the teacher and the data: only where there is a checkpoint
            cache = self.cached_teacher and self.cached_teacher.cache
            self._fingerprints = {
                "teacher": fingerprint(self.teacher) if cache is None else cache.manifest["teacher"],
                "teacher_cache": None if cache is None else cache.manifest["content"],
                "data": data_fingerprint(self._bare_rows),
            }
            if is_adapted(self.student):  # a checkpoint holds the adapter alone
                self._fingerprints["student's base"] = base_fingerprint(self.student)
        return {
            **self.bound_to,
            "versions": versions(),
            "arguments": argument_facts(self.args),
            "objective": self._objective_facts,
            "student": student_facts(self.student),
            **self._fingerprints,
            **({} if self.rollouts is None else {"on_policy": self.rollouts.facts()}),
        }

    def _save_checkpoint(self, model, trial) -> None:
        """Whole, listed with checksums, and only then are older ones deleted: by step, never by the clock."""
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # the Trainer would go by the clock
        try:
            if self.args.should_save:
                begin_checkpoint(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal_checkpoint(folder, self.whose())
                rotate_checkpoints(folder.parent, self.state.global_step, limit, self.state.best_model_checkpoint)
        except Exception as error:
            failure = give_up_checkpoint(folder, error)
            if failure is error:
                raise
            raise failure from error
        finally:
            self.args.save_total_limit = limit

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Export the student (and the tokenizer, if the trainer has one).
        Checkpoints also hold projections and weights.
        """
        self._is_checkpoint = _internal_call
        try:
            if self.is_fsdp_enabled:  # the Trainer would leave it at shards
                self._save(output_dir, self.accelerator.get_state_dict(self.model))
            else:
                super().save_model(output_dir, _internal_call=_internal_call)
        finally:
            self._is_checkpoint = False

    def whole_student(self) -> PreTrainedModel:
        """The trained student: `self.student`, or under FSDP a whole copy of it. Every process calls it."""
        if not self.is_fsdp_enabled:
            return self.student
        student = type(self.student)._from_config(self.student.config)
        untie(student, ties(student).keys() - ties(self.student).keys())
        student.load_state_dict(part(whole_state(self.model), "student."))
        return student.to(self.args.device).eval()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        distiller = self.distiller
        state = distiller.state_dict() if state_dict is None else state_dict
        write_student(folder, distiller.student, state)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self._is_checkpoint:
            write_objective(folder, distiller.objective, state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder, distiller = Path(resume_from_checkpoint), self.distiller
        state = read_state(folder, distiller)
        if self.is_fsdp_enabled:
            load_whole_state(self.model, state)
        else:
            distiller.load_state_dict(state, strict=not is_adapted(distiller.student))
        read_settings(folder, distiller.objective)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _own_rates(objective: Objective) -> dict[str, float]:
    """Learning rates of what the objective learns at another rate than the student, by its place in the names of
    parameters.
    """
    balancing = objective.balancing
    found = {"objective.balancing.": balancing.learning_rate} if isinstance(balancing, Uncertainty) else {}
    return found | {
        f"objective.projections.{name}_temperature.": term.learning_rate
        for name, term in objective.of_kind(Outputs).items()
        if term.learns_temperature
    }
