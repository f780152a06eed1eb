"""Students that are compressed before the run: by layers or by rank, in one run, from a stop, and in a study."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, TrainerCallback

from fakit.compression import layerwise, local, low_rank
from fakit.experiments import Study
from fakit.experiments.build import prepare, training_texts
from fakit.experiments.config import ExperimentConfig
from fakit.experiments.result import RunResult
from fakit.experiments.run import run_experiment
from fakit.experiments.smaller import kept
from fakit.experiments.store import RunStore
from fakit.experiments.students import make_student

LAYERWISE = {"layerwise": {"layers": 2, "steps": 2, "batch_size": 8, "scored": 16, "bf16": False}}
LOW_RANK = {"low_rank": {"keep": 0.9, "texts": 60, "calibration": 40, "epochs": 1, "batch_size": 8, "bf16": False}}
both = pytest.mark.parametrize("student", [LAYERWISE, LOW_RANK], ids=["layerwise", "low_rank"])


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    one, two = ours.state_dict(), theirs.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_pruned_student_keeps_its_layers_and_their_map(config):
    config = config.replace(student=LAYERWISE, layer_map="kept")
    prepared = prepare(config)
    made = make_student(config, prepared)
    rows, _ = training_texts(prepared.task, prepared.tokenizer, 16)
    work = {"scored": rows.select(range(16)), "steps": 2, "batch_size": 8, "seed": 0}
    alone = layerwise.prune(prepared.teacher, 2, rows, prepared.task.collator(prepared.tokenizer), **work)[-1]
    assert same(made.model, alone.student)
    assert made.kept == ((1, alone.layers[0]), (2, 4))  # the last one aims at the teacher's last
    assert [len(one["layers"]) for one in made.facts["rounds"]] == [3, 2] and made.facts["steps"] == 4
    result = run_experiment(config, progress=False)
    assert result.compression["rounds"][-1]["layers"] == made.facts["rounds"][-1]["layers"]
    assert result.flops is result.flops_per_step is None  # nobody counted the rounds'


@both
def test_runs_of_one_compression_share_it_and_start_alike(config, student, monkeypatch):
    config = config.replace(student=student)
    prepared, worked = prepare(config), []
    for module, name in ((layerwise, "prune"), (local, "distill")):
        monkeypatch.setattr(module, name, _counted(getattr(module, name), worked))
    monkeypatch.setattr(low_rank, "distill", local.distill)
    arms = [config.with_arm("none"), config.with_arm("all"), config.replace(**{"student.freeze_embeddings": True})]
    first, *others = [make_student(arm, prepared) for arm in arms]
    assert len(worked) == 1 and all(same(first.model, other.model) for other in others)
    assert not others[1].model.get_input_embeddings().weight.requires_grad
    assert others[0].model.get_input_embeddings().weight.requires_grad
    with torch.no_grad():  # what a run does to its student is its own
        first.model.get_input_embeddings().weight.zero_()
    assert same(make_student(arms[0], prepared).model, others[0].model) and len(worked) == 1


def _counted(function, calls):
    def counted(*args, **kwargs):
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return counted


class _StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@both
def test_a_stopped_run_ends_as_one_that_was_not(config, student, tmp_path):
    config = config.replace(student=student, out=str(tmp_path / "whole"), **{"training.save_every": 2})
    whole, broken = run_experiment(config, progress=False), config.replace(out=str(tmp_path / "broken"))
    with pytest.raises(KeyboardInterrupt):
        run_experiment(broken, progress=False, callbacks=[_StopAt(5)])
    found = run_experiment(broken, progress=False, resume=True)
    assert same(found.student, whole.student) and found.score == whole.score
    left = {path.name for path in (tmp_path / "broken").iterdir() if path.is_dir()}
    assert left == {"checkpoints"}  # the compression's own files went with the record


@both
def test_what_is_exported_is_what_was_trained(config, student, tmp_path):
    out, store = tmp_path / "student", RunStore.open(tmp_path / "runs")
    config = config.replace(student=student, out=str(out))
    result = run_experiment(config, store, progress=False)
    load = low_rank.load if "low_rank" in student else AutoModelForSequenceClassification.from_pretrained
    assert same(load(out), result.student)
    assert result.parameters < result.teacher_parameters
    again = RunResult.from_store(store, config.run_id)
    assert again.compression == store.record(config.run_id)["compression"] and again.compression["seconds"] > 0
    assert ExperimentConfig.from_yaml(out / "experiment.yaml") == config


def test_a_study_of_students_is_the_same_by_one_and_by_two_workers(config, tmp_path):
    study = Study(
        config,
        vary={
            "shrunk": {},
            "layer by layer": {"student": LAYERWISE, "layer_map": "kept"},
            "low rank": {"student": LOW_RANK},
            "low rank, labels": {"student": LOW_RANK, "features": None, "attention": None, "outputs": None},
        },
        seeds=[0, 1],
        baselines=False,
        count_flops=False,
    )
    scores = []
    for workers in (1, 2):
        store = study.run(tmp_path / str(workers), workers=workers, progress=False)
        scores.append({(one["arm"], one["seed"]): one["test"] for one in store.records()})
    assert scores[0] == scores[1] and len(scores[0]) == 8
    assert Study.from_dict(study.to_dict()) == study


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ({**LAYERWISE, **LOW_RANK}, r"student\.layerwise and student\.low_rank: each makes a student"),
        ({**LOW_RANK, "path": "somewhere"}, r"student\.low_rank and student\.path: each makes a student"),
        ({**LOW_RANK, "layers": 3}, r"student\.layers: is of a teacher that is shrunk, and student\.low_rank makes"),
        ({**LAYERWISE, "init": "random"}, r"student\.init: is of a teacher that is shrunk"),
        ({"layerwise": {"layer": 2}}, r"student\.layerwise\.layer: unknown key .* Did you mean 'layers'\?"),
        ({"low_rank": {"keep": 2.0}}, r"student\.low_rank\.keep: found 2\.0, expected a value at most 1"),
    ],
)
def test_what_does_not_fit_together_is_refused(config, student, said):
    with pytest.raises(ValueError, match=said):
        config.replace(student=student)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_map": [[3, 4]]}, r"3"),
        ({"student": {**LAYERWISE, "lora": {"target_modules": ["nothing"]}}}, r"student\.lora: .* does not fit"),
        ({"student": LOW_RANK, "teacher.dtype": "bfloat16"}, r"the teacher is held in bfloat16, and pairs are made"),
    ],
)
def test_what_does_not_fit_is_said_before_the_compression(config, changes, said, monkeypatch):
    for module, name in ((layerwise, "prune"), (low_rank, "plan"), (low_rank, "spectra")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("compressed"))
    with pytest.raises(ValueError, match=said):
        run_experiment(config.replace(student=LAYERWISE).replace(**changes), progress=False)


def test_one_process_compresses(config, monkeypatch):
    config = config.replace(student=LAYERWISE)
    prepared = prepare(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"student\.layerwise: compresses the teacher in one process, and 2 were"):
        make_student(config, prepared)


def test_a_run_without_a_folder_may_be_asked_to_resume(config):
    assert run_experiment(config.replace(student=LAYERWISE), resume=True, progress=False).steps == 6


def test_equal_compute_beside_a_compression_is_refused_at_once(config):
    with pytest.raises(ValueError, match=r"equal_compute: .* those of the compression before 'low rank'"):
        Study(config, vary={"as it is": {}, "low rank": {"student": LOW_RANK}}, equal_compute=["as it is"])


def test_ids_of_runs_without_a_compression_stay(config):
    assert set(config.to_dict()["student"]) == {"layers", "hidden_size", "heads", "init", "path", "freeze_embeddings"}
    small = config.replace(student=LOW_RANK)
    assert set(small.to_dict()["student"]) == {"freeze_embeddings", "low_rank"} and small.run_id != config.run_id
    assert small.replace(student={"layers": 2}) == config


def test_the_kept_map_of_a_shrunken_student_is_its_layers(config, tmp_path):
    numbered = config.replace(student={"layers": [1, 3]}, layer_map="kept")
    assert make_student(numbered, prepare(numbered)).kept == ((1, 1), (2, 4)) == kept([1, 3], depth=4)
    assert make_student(config, prepare(config)).kept == ((1, 2), (2, 4))
    run_experiment(config.replace(out=str(tmp_path)), progress=False)
    saved = config.replace(student={"path": str(tmp_path)}, layer_map="kept")
    with pytest.raises(
        ValueError, match=r"layer_map: kept is the teacher layer that each student layer was, and nobody"
    ):
        run_experiment(saved, progress=False)


def test_a_student_of_another_family_runs_and_its_file_is_read_again(config):
    family = {"model_type": "roberta", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = config.replace(student={"untrained": {**family, "intermediate_size": 8}}, layer_map="uniform")
    result = run_experiment(config, progress=False)
    assert type(result.student).__name__ == "RobertaForSequenceClassification" and 0 <= result.score <= 1
    assert "layers" not in result.config["student"] and ExperimentConfig.from_dict(result.config) == config
    with pytest.raises(ValueError, match="nobody knows that of an untrained model"):
        run_experiment(config.replace(layer_map="kept"), progress=False)
