"""Names of before, in British spelling, are accepted with a warning; recorded runs keep their ids."""

import json
import warnings

import pytest

from fakit import Features, renamed
from fakit.experiments import ExperimentConfig, RunStore
from fakit.experiments.config import TrainingConfig
from fakit.files import shipped
from fakit.losses import features


def test_a_loss_by_its_old_name_is_the_loss():
    with pytest.warns(FutureWarning, match="normalised_mse is called normalized_mse now"):
        assert features.normalised_mse is features.normalized_mse
    with pytest.warns(FutureWarning, match="normalized_mse"):
        assert Features("normalised_mse").loss == "normalized_mse"
    with pytest.raises(AttributeError, match="has no 'normal_mse'; its losses are mse"):
        _ = features.normal_mse


def test_keys_of_a_configuration(tmp_path):
    (tmp_path / "old.yaml").write_text("features: {loss: normalised_mse}\ntraining: {labelled_fraction: 0.25}\n")
    with pytest.warns(FutureWarning) as said:
        config = ExperimentConfig.from_yaml(tmp_path / "old.yaml")
    assert config.training.labeled_fraction == 0.25
    assert config.features.loss == "normalized_mse"
    assert {str(warning.message).split(" is called")[0] for warning in said} >= {
        "training.labelled_fraction",
        "features.loss: normalised_mse",
    }
    with pytest.warns(FutureWarning, match="labeled_fraction"):
        assert TrainingConfig(labelled_fraction=0.25) == config.training
    with pytest.warns(FutureWarning, match=r"training\.labeled_fraction"):
        assert ExperimentConfig().replace(**{"training.labelled_fraction": 0.25}).training == config.training
    with pytest.raises(ValueError, match=r"old name of training\.labeled_fraction; give one"):
        TrainingConfig.from_dict({"labelled_fraction": 0.25, "labeled_fraction": 0.5})


def test_keywords_of_a_function():
    @renamed(colour="color")
    def dot(size, color="blue"):
        return size, color

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dot(3, color="red") == (3, "red")
    with pytest.warns(FutureWarning, match="color= now"):
        assert dot(3, colour="red") == (3, "red")
    with pytest.raises(TypeError, match="old name of color; give one"):
        dot(3, colour="red", color="red")


@pytest.mark.parametrize("study", ["study", "maps", "weights", "glosses_1400_labels"])
def test_recorded_runs_keep_their_ids(study):
    folder = shipped("data") / "recorded" / study
    assert "labelled_fraction" in (folder / "runs.jsonl").read_text()
    runs = [record for record in RunStore(folder).records() if record.get("kind", "run") == "run"]
    assert all(record["labeled"] > 0 for record in runs)
    for record in runs[::17]:
        config = ExperimentConfig.from_dict(record["config"])
        assert json.loads(json.dumps(config.to_dict())).keys() == record["config"].keys()
        assert config.run_id == record["run_id"]
