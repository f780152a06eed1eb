"""`fakit cache`: the size before, the cache without training, and a run that reads it."""

import re

import pytest

from fakit.__main__ import main
from fakit.experiments.run import cache_experiment
from fakit.training.teacher_cache import TeacherCache
from tests.experiments.test_run_cached import chat, run  # noqa: F401 (a fixture)


def test_the_command_plans_builds_and_goes_on(chat, tmp_path, capsys, monkeypatch):  # noqa: F811
    folder = tmp_path / "cache"
    config = chat.replace(teacher_cache={"folder": str(folder), "top_k": 8, "dtype": "float16"})
    config.to_yaml(tmp_path / "run.yaml")
    asked = ["cache", str(tmp_path / "run.yaml")]
    assert main([*asked, "--plan"]) == 0
    planned = capsys.readouterr().out
    assert "12 rows of " in planned and " bytes in 1 file" in planned and not folder.exists()

    shards, build = [], TeacherCache.__dict__["_build"].__func__
    found = cache_experiment(config, plan=True)
    assert str(found) == planned.strip()
    assert main(asked) == 0
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert written == found.bytes and f"holds 12 rows in {written:,} bytes" in capsys.readouterr().out
    manifest = (folder / "manifest.json").read_text()

    def counted(cls, *args):
        shards.append(len(list(folder.glob("*.safetensors"))))
        return build(cls, *args)

    monkeypatch.setattr(TeacherCache, "_build", classmethod(counted))
    assert main([*asked, "--plan"]) == 0 and "finished, all of its 12 rows are there" in capsys.readouterr().out
    assert run(config).teacher_cache == "float16, top 8"
    assert shards == [1] and (folder / "manifest.json").read_text() == manifest


def test_rows_and_folder_given_at_the_command(chat, tmp_path, capsys):  # noqa: F811
    chat.to_yaml(tmp_path / "run.yaml")
    asked = ["cache", str(tmp_path / "run.yaml"), "--teacher-cache", str(tmp_path / "c"), "--cache-rows", "all"]
    assert main([*asked, "--plan", "--set", "features=null"]) == 0
    alone = capsys.readouterr().out
    assert "logits at " in alone and main([*asked, "--plan"]) == 0
    assert alone != capsys.readouterr().out and "48 rows" in alone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], r"names no teacher cache: teacher_cache: \{folder: …\} in it, or --teacher-cache DIR"),
        (["--teacher-cache", "c", "--set", "on_policy={share: 0.5}"], "texts that are in none"),
        (["--teacher-cache", "c", "--cache-top-k", "8", "--set", "outputs.loss=taid"], "'taid' compares all"),
    ],
)
def test_what_has_no_cache_is_refused(chat, tmp_path, capsys, monkeypatch, changes, message):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    chat.to_yaml("run.yaml")
    assert main(["cache", "run.yaml", *changes]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "c").exists()
