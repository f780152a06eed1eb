"""Files and folders of slow tests."""

# What `make unit` leaves out: browsers, several processes, whole runs. One slow test in a quick file is marked there.
SLOW = (
    "browser/",
    "experiments/test_map_search.py",
    "experiments/test_map_study.py",
    "experiments/test_resume.py",
    "experiments/test_run_experiment.py",
    "experiments/test_study.py",
    "figures/test_every_figure.py",
    "planner/",
    "scale/",
    "test_benchmarks.py",
    "test_install.py",
    "test_notebooks_runner.py",
    "test_teacher_cache.py",
    "test_trainer_checkpoints.py",
    "widgets/test_planner.py",
)
